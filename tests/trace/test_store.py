"""Writing: what goes in comes out, memory is bounded, and nothing that stops a run costs the parts before it."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import make_meta, make_rows, write

from collegium.errors import ConfigError, StorageError, TraceError
from collegium.trace import LayerRows, Trace, TraceWriter, remove_trace

HERE = Path(__file__).parent


@settings(max_examples=20, deadline=None)
@given(sizes=st.lists(st.integers(0, 40), min_size=1, max_size=6), part_rows=st.integers(8, 50), ragged=st.booleans())
def test_what_goes_in_comes_out(tmp_path_factory, sizes, part_rows, ragged):
    folder = tmp_path_factory.mktemp("trace")
    runs = [make_rows(N, seed, ragged) for seed, N in enumerate(sizes)]
    with TraceWriter(folder, make_meta(), part_rows=part_rows) as writer:
        for step, (tokens, layers) in enumerate(runs):
            writer.add(tokens, layers, phase="decode", step=step, adapter="french")
    trace = Trace.open(folder)
    assert len(trace) == sum(sizes)
    assert trace.meta.complete
    for name in ("sequence", "document", "position", "token", "domain"):
        assert np.array_equal(trace.column(name), np.concatenate([tokens[name] for tokens, _ in runs]))
    assert trace.column("step").tolist() == [step for step, N in enumerate(sizes) for _ in range(N)]
    assert set(trace.column("adapter")) <= {"french"}
    assert set(trace.column("phase")) <= {1}
    for place, layer in enumerate((1, 3)):
        parts = list(trace.iter_parts())
        assert all(len(part) <= part_rows for part in parts)
        ids = [part.assignments(layer)[1] for part in parts]
        assert np.array_equal(np.concatenate([*ids, []]), np.concatenate([rows[place].expert for _, rows in runs]))
        asked = np.concatenate([rows[place].weight for _, rows in runs])
        weights, experts = trace.weights(layer), trace.experts(layer)
        assert np.array_equal(weights[experts < trace.meta.layer(layer).num_experts], asked)


def test_rows_that_wait_too_long_are_written_though_their_part_is_short(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("collegium.trace.store.time.monotonic", lambda: now[0])
    with TraceWriter(tmp_path, make_meta(), part_rows=50, part_seconds=2.0) as writer:
        for seconds in (0.0, 1.0, 1.0, 1.0, 1.0, 0.0):
            now[0] += seconds
            writer.add(*make_rows(10))
    assert [len(part) for part in Trace.open(tmp_path).iter_parts()] == [30, 30]
    with TraceWriter(tmp_path / "patient", make_meta(), part_rows=50) as writer:
        for _ in range(6):
            now[0] += 1000.0
            writer.add(*make_rows(10))
    assert [len(part) for part in Trace.open(tmp_path / "patient").iter_parts()] == [50, 10]


def test_optional_columns(tmp_path):
    tokens, layers = make_rows(20)
    random = np.random.default_rng(0)
    sampled = random.random(20) < 0.5
    logits = [random.normal(size=(20, entry)).astype(np.float16) for entry in (8, 300)]
    inputs = [random.normal(size=(sampled.sum(), 5)).astype(np.float32) for _ in range(2)]
    full = [LayerRows(r.expert, r.weight, None, a, x) for r, a, x in zip(layers, logits, inputs, strict=True)]
    with TraceWriter(tmp_path, make_meta(logits=True, gate_inputs=True), part_rows=7) as writer:
        writer.add(tokens, full, sampled=sampled)
    found = list(Trace.open(tmp_path).iter_parts())
    for place, layer in enumerate((1, 3)):
        assert np.array_equal(np.concatenate([part.logits(layer) for part in found]), logits[place])
        rows, x = zip(*(part.gate_inputs(layer) for part in found), strict=True)
        assert np.array_equal(np.concatenate(rows), np.flatnonzero(sampled))
        assert np.array_equal(np.concatenate(x), inputs[place])


def test_memory_does_not_grow_with_the_run(tmp_path):
    rows, highest, before = make_rows(1024), 0, pa.total_allocated_bytes()
    with TraceWriter(tmp_path, make_meta(), part_rows=1024) as writer:
        for step in range(60):
            writer.add(*rows, step=step)
            highest = max(highest, pa.total_allocated_bytes() - before)
    whole = sum(part.table.nbytes for part in Trace.open(tmp_path).iter_parts())
    assert highest < whole / 6  # of 60 parts: one being encoded, two waiting, one being filled, and their copies


def test_wide_rows_make_shorter_parts(tmp_path, monkeypatch):
    monkeypatch.setattr("collegium.trace.store.PART_BYTES", 2000)
    write(tmp_path, N=200, part_rows=1000)
    parts = list(Trace.open(tmp_path).iter_parts())
    assert len(parts) > 3
    assert all(part.table.nbytes < 4000 for part in parts)
    assert sum(map(len, parts)) == 200


def test_killed_run_is_readable_up_to_the_last_part(tmp_path):
    program = (
        "import sys, itertools; from pathlib import Path\n"
        f"sys.path.insert(0, {str(HERE)!r})\n"
        "from synthetic import make_meta, make_rows\n"
        "from collegium.trace import TraceWriter\n"
        "with TraceWriter(Path(sys.argv[1]), make_meta(), part_rows=24) as writer:\n"
        "    for step in itertools.count():\n"
        "        writer.add(*make_rows(10, seed=step), step=step)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)])
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("part-*"))) < 5 and time.monotonic() < deadline:
        assert child.poll() is None
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()

    trace = Trace.open(tmp_path)
    assert not trace.meta.complete
    assert len(trace) >= 5 * 24
    asked = np.concatenate([make_rows(10, seed=step)[0]["token"] for step in range(len(trace) // 10 + 1)])
    assert np.array_equal(trace.tokens(), asked[: len(trace)])
    assert trace.counts(1).sum() == 2 * len(trace)


@pytest.fixture
def small_disk(tmp_path, monkeypatch):
    """A folder that is full after some parts: a tiny file system where we may mount one, else a failing write."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode == 0:
        yield folder
        subprocess.run(["umount", str(folder)], check=True)
        return
    original, written = Path.write_bytes, []

    def write_bytes(path, content):
        written.append(path)
        if len(written) > 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(path, content)

    monkeypatch.setattr(Path, "write_bytes", write_bytes)
    yield folder


def test_full_disk_raises_and_earlier_parts_stay(small_disk):
    out = small_disk / "trace"
    with pytest.raises(StorageError, match="could not write"), TraceWriter(out, make_meta(), part_rows=100) as writer:
        for step in range(1000):
            writer.add(*make_rows(100, seed=step), step=step)
    trace = Trace.open(out)
    assert not trace.meta.complete
    assert len(trace) == 100 * len(trace.files) > 0
    assert np.array_equal(trace.tokens()[:100], make_rows(100, seed=0)[0]["token"])


def test_an_error_of_the_thread_surfaces_even_if_nothing_follows(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "write_bytes", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "gone")))
    with pytest.raises(StorageError, match="gone"), TraceWriter(tmp_path / "t", make_meta()) as writer:
        writer.add(*make_rows(3))


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_run_keeps_every_row(tmp_path, error):
    with pytest.raises(error), TraceWriter(tmp_path, make_meta(), part_rows=64) as writer:
        writer.add(*make_rows(100))
        raise error
    trace = Trace.open(tmp_path)
    assert not trace.meta.complete
    assert len(trace) == 100


def test_resume_appends_and_removes_leftovers(tmp_path):
    with pytest.raises(KeyboardInterrupt), TraceWriter(tmp_path, make_meta(), part_rows=32) as writer:
        writer.add(*make_rows(50, seed=0))
        raise KeyboardInterrupt
    (tmp_path / ".partial-1234-part-00000002-00000000.parquet").write_bytes(b"half")
    with TraceWriter(tmp_path, make_meta(), resume=Trace.open(tmp_path), part_rows=32) as writer:
        writer.add(*make_rows(50, seed=1))
    trace = Trace.open(tmp_path)
    assert trace.meta.complete
    assert np.array_equal(trace.tokens(), np.concatenate([make_rows(50, seed=s)[0]["token"] for s in (0, 1)]))
    assert not list(tmp_path.glob(".partial-*"))


def test_resume_refuses_another_run_and_leaves_the_trace_alone(tmp_path):
    write(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(TraceError, match="its data is 'numbers', this run's is 'letters'"):
        TraceWriter(tmp_path, make_meta(data="letters"), resume=Trace.open(tmp_path))
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_unknown_phase_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="phase 'dream' is none of prefill"), TraceWriter(tmp_path, make_meta()) as w:
        w.add(*make_rows(1), phase="dream")


def test_remove_takes_only_what_is_of_the_trace(tmp_path):
    write(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    remove_trace(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]
