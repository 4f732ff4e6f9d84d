"""Every published system trained by two processes ends as by one.

What decides is whether anything looks at a micro-batch as a whole. Where nothing does, one process takes the batch in
one piece; else in two (`run.accumulate`), so that its micro-batches are those of the two processes.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small import STRAINED, SYSTEMS

from collegium.models import MoEConfig
from collegium.systems import expand
from collegium.train import Recipe, read_metrics, train

SCRIPT = """
import sys
from collegium.train import Recipe, ranks, train
# all runs in one launch and one process group: importing the libraries is what takes time
with ranks.open_ranks():
    for plan, out in zip(sys.argv[1::2], sys.argv[2::2]):
        train(Recipe.load(plan), out)
"""


def plan(system: str) -> tuple[dict[str, Any], int]:
    """Fields of the MoE layers, and the micro-batches in which one process takes a step."""
    plain = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    moe = expand({**plain, "router": STRAINED.get(system, system)})
    config = MoEConfig.model_validate(moe)
    router = config.build_router(8)
    # random choices have the micro-batch's number in their key, and a capacity has a queue of all its tokens
    routing = any(part.draws or not part.batch_invariant for part in router.parts) or router.capacity is not None
    if routing and config.balance.scope == "global":
        # a loss over the whole batch, which other systems hold, sees half of it in the first of two micro-batches
        moe["balance"] = {**moe["balance"], "scope": "micro_batch"}
    # a document that goes on in another sequence of the micro-batch is one for the scope "sequence", too
    whole = routing or config.balance.scope != "global"
    return moe, 2 if whole else 1


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Sums over threads round differently for different numbers of threads; the launch has OMP_NUM_THREADS=1."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents of a few made-up words, of two domains and many lengths."""
    folder, draw = tmp_path_factory.mktemp("corpus"), random.Random(1)
    words = {"sea": ["wave", "salt", "gull", "sail", "tide"], "wood": ["moss", "fern", "bark", "owl", "root", "elm"]}
    for domain, known in words.items():
        for number in range(60):
            place = folder / ("valid" if number % 10 == 0 else "train") / domain
            place.mkdir(parents=True, exist_ok=True)
            text = " ".join(draw.choice(known) for _ in range(draw.randrange(10, 70)))
            (place / f"{number}.txt").write_text(text, encoding="utf-8")
    return folder


def recipe(corpus: Path, system: str, processes: int) -> Recipe:
    moe, micro_batches = plan(system)
    return Recipe.parse(
        {
            "model": {
                "family": "qwen3",
                "hidden_size": 32,
                "intermediate_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "head_dim": 16,
                # larger than usual, so that routing decisions are not near-ties
                "config": {"initializer_range": 0.2},
            },
            "moe": moe,
            "data": {
                "corpus": str(corpus),
                "vocab_size": 300,
                "sequence_length": 32,
                "cache": str(corpus.parent / "cache"),
            },
            # with the default eps AdamW turns rounding in a gradient near zero into a part of the learning rate
            "optim": {"lr": 3e-3, "eps": 1e-6},
            "run": {
                "steps": 3,
                "batch_size": 8,
                "accumulate": micro_batches if processes == 1 else 1,
                "log_every": 1,
            },
        }
    )


@pytest.fixture(scope="module")
def launched(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the run of every system by two processes."""
    folder = tmp_path_factory.mktemp("launched")
    arguments = []
    for system in SYSTEMS:
        (folder / f"{system}.yaml").write_text(recipe(corpus, system, 2).dump())
        arguments += [str(folder / f"{system}.yaml"), str(folder / system)]
    (folder / "script.py").write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         str(folder / "script.py"), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("system", SYSTEMS)
def test_two_processes_end_as_one(launched: Path, corpus: Path, tmp_path: Path, system: str) -> None:
    one = train(recipe(corpus, system, 1), tmp_path)
    assert one["processes"] == 1
    two, single = (load_file(folder / "model" / "model.safetensors") for folder in (launched / system, tmp_path))
    assert two.keys() == single.keys()
    for key, tensor in single.items():
        torch.testing.assert_close(two[key], tensor, rtol=1e-4, atol=1e-5, msg=lambda m, key=key: f"{key}: {m}")
    tables = [read_metrics(folder / "metrics.jsonl") for folder in (launched / system, tmp_path)]
    assert tables[0]["step"].to_list() == tables[1]["step"].to_list()
    assert tables[0].columns == tables[1].columns
    own_time = {"seconds", "tokens_per_second"}
    numbers = [name for name in tables[1].columns if name not in own_time and tables[1][name].dtype.is_numeric()]
    assert {"loss", "grad_norm", "max_violation", "entropy", "bits_per_byte"} <= set(numbers)
    for column in numbers:
        ours, theirs = ([v for v in table[column] if v is not None] for table in tables)
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6), column


def test_both_ways_to_split_a_batch_are_there() -> None:
    assert {plan(system)[1] for system in SYSTEMS} == {1, 2}
