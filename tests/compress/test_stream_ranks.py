"""Two processes gather what one does, also after they were cut short."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_stream import DOMAINS, Stop, batches, folder_of

from collegium.compress.collectors_inputs import InputSample
from collegium.compress.collectors_outputs import HiddenSums
from collegium.compress.gradients import HiddenGradients, WeightGradients
from collegium.compress.stream import calibrate
from collegium.errors import ConfigError
from collegium.measure.statistics import Statistics
from collegium.measure.super_experts import DownMax

SCRIPT = """
import sys
from pathlib import Path
from test_stream import Stop
from test_stream_ranks import run
from collegium.train.ranks import open_ranks

source, out = map(Path, sys.argv[1:])
steps = []

def cut_short(done, steps, share):
    if (done, share > 0) == ((3, True), (1, False))[mine.rank]:
        raise Stop

# both runs in one launch: importing the libraries is what takes time
with open_ranks() as mine:
    try:
        run(source, out, progress=cut_short)
    except Stop:
        mine.barrier()
    assert not out.exists()
    assert {folder.name for folder in out.parent.glob("two.partial*")} == {f"two.partial-{i}-of-2" for i in range(2)}
    found = run(source, out, progress=lambda done, steps_, share: steps.append(done))
    assert found.meta.tokens == 48, found.meta.tokens
    assert min(steps) == (3, 1)[mine.rank], steps
"""


def run(source: Path, out: Path, **settings: object) -> Statistics:
    # the second process has fewer tokens than a sample has rows
    collectors = [DownMax(), HiddenSums(), HiddenGradients(), WeightGradients(), InputSample(rows=20)]
    return calibrate(source, batches(), collectors, out, domains=DOMAINS, data="numbers", **settings)  # type: ignore[arg-type]


def test_two_processes_gather_what_one_does_though_cut_short_at_different_steps(tmp_path: Path) -> None:
    source, out = folder_of("qwen3_moe", tmp_path), tmp_path / "two"
    here = Path(__file__).parent
    (tmp_path / "script.py").write_text(SCRIPT)
    path = os.pathsep.join([str(here), str(here.parent), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(tmp_path / "script.py"), str(source), str(out)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.glob("two.partial*"))
    two, one = Statistics.load(out), run(source, tmp_path / "one")
    assert two.meta.model_copy(update={"created": ""}) == one.meta.model_copy(update={"created": ""})
    for key, tensor in one.tensors.items():
        if tensor.dtype == torch.int64:
            assert torch.equal(two.tensors[key], tensor), key
        else:
            torch.testing.assert_close(two.tensors[key], tensor, rtol=1e-5, atol=1e-8, msg=lambda m, k=key: f"{k}: {m}")


def test_what_another_number_of_processes_left_goes_only_on_demand(tmp_path: Path) -> None:
    source = folder_of("qwen3_moe", tmp_path)

    def progress(done: int, steps: int, share: float) -> None:
        if done == 1:
            raise Stop

    with pytest.raises(Stop):
        run(source, tmp_path / "s", progress=progress)
    left = tmp_path / "s.partial-1-of-3"
    (tmp_path / "s.partial").rename(left)
    (tmp_path / "s.partially").mkdir()  # nobody's
    with pytest.raises(ConfigError, match="a run of 3 processes"):
        run(source, tmp_path / "s")
    run(source, tmp_path / "s", resume=False)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["qwen3_moe", "s", "s.partially"]
