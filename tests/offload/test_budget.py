"""Memory: sizes in words, shares, the smallest that works, and a process that stays within what it was given."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from engines import saved
from hypothesis import given
from hypothesis import strategies as st

from collegium.errors import ConfigError
from collegium.offload.budget import MARGIN, parse_bytes, share_slots
from collegium.offload.model import load_offloaded
from collegium.process import resident_memory

CGROUP = Path("/sys/fs/cgroup/memory")


@pytest.mark.parametrize(
    ("text", "nbytes"), [("6GiB", 6 << 30), ("800MB", 800_000_000), ("7000", 7000), ("1.5 k", 1500), ("2kib", 2048)]
)
def test_sizes(text: str, nbytes: int) -> None:
    assert parse_bytes(text) == nbytes


@pytest.mark.parametrize("text", ["", "much", "-3GB", "6 iB", "0", "1e9", "GiB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"size|no memory"):
        parse_bytes(text)


sizes = st.integers(0, 1 << 30)


@given(
    memory=st.integers(1, 1 << 33), process=sizes, weights=sizes, slot=st.integers(1, 1 << 24), low=st.booleans(),
    most=st.integers(1, 4000), least=st.integers(1, 64),
)  # fmt: skip
def test_shares_stay_within_the_memory(
    memory: int, process: int, weights: int, slot: int, low: bool, most: int, least: int
) -> None:
    slots = {16: 2 * slot, 8: slot} if low else {16: 2 * slot}
    given_sizes = {"process": process, "weights": weights, "cache": 10, "working": 20, "slot": slots}
    if most < least:
        with pytest.raises(ConfigError, match="too few"):
            share_slots(memory, **given_sizes, most=most, least=least)
        return
    try:
        budget = share_slots(memory, **given_sizes, most=most, least=least)
    except ConfigError as error:
        smallest = int(re.search(r"(\d+)MiB$", str(error))[1]) << 20  # type: ignore[index]
        assert smallest > memory
        assert share_slots(smallest, **given_sizes, most=most, least=least).total <= smallest
        return
    assert budget.total <= memory * (1 - MARGIN) + 1
    assert all(least <= count <= most for count in budget.slots.values())


PROGRAM = """
import json, sys
import torch
from collegium.process import peak_memory
from collegium.offload.model import load_offloaded

folder, memory = sys.argv[1], int(sys.argv[2]) or None
with load_offloaded(folder, memory=memory, context=64) as found:
    ids = torch.arange(3, 40)[None]
    out = found.model.generate(ids, max_new_tokens=20, do_sample=False, pad_token_id=0, eos_token_id=None)
    budget = found.budget
    print(json.dumps({"fixed": budget.fixed, "slot": budget.slot[32], "slots": budget.slots[32], "peak": peak_memory(),
                      "ids": out[0].tolist(), "evictions": found.counters()["evictions"]}))
"""


def in_process(folder: Path, memory: int, group: Path | None = None) -> dict[str, Any]:
    """Plan and generate in a process of its own, in a memory cgroup if one is given."""
    enter = None if group is None else lambda: (group / "cgroup.procs").write_text(str(os.getpid()))
    command = [sys.executable, "-c", PROGRAM, str(folder), str(memory)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, preexec_fn=enter)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.skipif(
    not (CGROUP / "cgroup.procs").exists() or not os.access(CGROUP, os.W_OK), reason="no writable v1 memory cgroup"
)
def test_a_process_lives_within_its_memory(tmp_path: Path) -> None:
    """Half of 190 MB of experts fit, in a cgroup with page cache counted: it lives, and never holds more."""
    saved(
        "qwen3_moe", tmp_path / "model", hidden_size=256, moe_intermediate_size=480, num_local_experts=64,
        num_experts_per_tok=4, max_position_embeddings=128,
    )  # fmt: skip
    roomy = in_process(tmp_path / "model", 0)
    assert roomy["evictions"] == 0
    memory = int((roomy["fixed"] + 64 * roomy["slot"]) / (1 - MARGIN))
    group = CGROUP / f"collegium-test-{os.getpid()}"
    group.mkdir()
    try:
        (group / "memory.limit_in_bytes").write_text(str(memory))
        tight = in_process(tmp_path / "model", memory, group)
    finally:
        group.rmdir()
    assert 16 < tight["slots"] < 112  # what is measured differs a little from run to run
    assert tight["evictions"] > 0
    assert tight["peak"] <= memory
    assert tight["ids"] == roomy["ids"]


@pytest.mark.skipif(not resident_memory(), reason="memory is seen on Linux only")
def test_too_little_memory_is_refused_with_a_number(tmp_path: Path) -> None:
    folder, _ = saved("qwen3_moe", tmp_path / "model", vocab_size=60_000)
    with pytest.raises(ConfigError, match=r"the smallest memory that works is \d+MiB"):
        load_offloaded(folder, memory="100MiB", context=64)
    with pytest.raises(ConfigError, match=r"even to read the weights .* no less than \d+MiB"):
        load_offloaded(folder, memory="5MB", context=64)
