"""Memory: sizes in words, shares, the smallest that works, and a process that stays within what it was given."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from collegium.errors import ConfigError
from collegium.offload.budget import MARGIN, parse_bytes, share_slots

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


def planned(*arguments: str) -> dict[str, int]:
    """What ``collegium run demo --plan`` says, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "collegium", "run", "demo", "--plan", "--json", *arguments],
        capture_output=True,
        text=True,
        check=True,
    )
    found: dict[str, int] = json.loads(done.stdout)
    return found


@pytest.mark.skipif(
    not (CGROUP / "cgroup.procs").exists() or not os.access(CGROUP, os.W_OK), reason="no writable v1 memory cgroup"
)
def test_a_process_lives_within_its_memory(tmp_path: Path) -> None:
    """Fewer experts than there are, in a cgroup with page cache counted: it finishes and is never over."""
    fixed = planned()
    slot = fixed["slot"]["16"]  # type: ignore[index]
    memory = int((fixed["total"] - 40 * slot) / (1 - MARGIN)) + (24 << 20)  # a measured part differs between runs
    group = CGROUP / f"collegium-test-{os.getpid()}"
    group.mkdir()
    try:
        (group / "memory.limit_in_bytes").write_text(str(memory))
        arguments = [sys.executable, "-m", "collegium", "run", "demo", "--memory", str(memory)]
        arguments += ["--prompt", "def main(", "--greedy", "--max-new-tokens", "24", "--json"]
        done = subprocess.run(
            arguments,
            capture_output=True,
            text=True,
            check=False,
            preexec_fn=lambda: (group / "cgroup.procs").write_text(str(os.getpid())),
        )
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["tokens"] == 24
        assert int((group / "memory.max_usage_in_bytes").read_text()) <= memory
    finally:
        group.rmdir()
