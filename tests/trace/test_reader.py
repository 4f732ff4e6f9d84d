"""Reading: the arrays are right, and bytes from anywhere give a TraceError that names the file and the field."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from synthetic import make_meta, make_rows, write

from collegium.errors import ConfigError, TraceError
from collegium.trace import LayerMeta, LayerRows, Trace, TraceWriter
from collegium.trace.schema import META, column_names, write_meta


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "trace")
    return tmp_path / "trace"


def read_everything(folder: Path) -> list[object]:
    trace = Trace.open(folder)
    found: list[object] = [len(trace), trace.meta]
    for layer in trace.layers:
        found += [trace.experts(layer).tolist(), trace.weights(layer).tolist()]
    for name in ("sequence", "token", "domain", "phase", "adapter"):
        found.append(trace.column(name).tolist())
    found += [trace.counts().tolist(), trace.counts(by="domain").tolist(), len(trace.scan().collect())]
    return found


def forge(folder: Path, table: pa.Table, number: int = 0) -> None:
    """Replace a part by `table`, with a checksum that fits."""
    next(folder.glob(f"part-{number:08d}-*")).unlink()
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    content = sink.getvalue().to_pybytes()
    (folder / f"part-{number:08d}-{zlib.crc32(content):08x}.parquet").write_bytes(content)


def change_meta(folder: Path, **changes: object) -> None:
    body = json.loads((folder / META).read_text())
    body.pop("checksum")
    body |= changes
    body["checksum"] = f"{zlib.crc32(json.dumps(body, sort_keys=True).encode()):08x}"
    (folder / META).write_text(json.dumps(body))


def test_arrays_of_one_part_are_views(tmp_path):
    write(tmp_path, N=30, part_rows=100)
    part = next(Trace.open(tmp_path).iter_parts())
    for array in (part.experts(1), part.experts(3), part.weights(1), part.column("token")):
        assert not array.flags.owndata
    assert part.experts(1).dtype == np.uint8
    assert part.experts(3).dtype == np.uint16


def test_unused_slots_hold_the_sentinel(tmp_path):
    write(tmp_path, N=60, ragged=True, part_rows=16)
    trace = Trace.open(tmp_path)
    experts, weights = trace.experts(1), trace.weights(1)
    assert experts.shape == weights.shape == (60, 2)
    assert (experts == 8).any()
    assert (weights[experts == 8] == 0).all()
    assert (np.sort(experts == 8, axis=1) == (experts == 8)).all(), "used slots come first"


def test_sentinel_of_256_experts_gets_a_wider_type(tmp_path):
    layer = LayerMeta(layer=0, path="mlp", num_experts=256, top_k=1, score="softmax")
    meta = make_meta(layers=(layer,), columns=column_names([0], logits=False, gate_inputs=False))
    tokens, _ = make_rows(3)
    rows = LayerRows(np.array([255, 0]), np.ones(2), np.array([1, 0, 1]))
    with TraceWriter(tmp_path, meta) as writer:
        writer.add(tokens, [rows])
    assert Trace.open(tmp_path).experts(0).tolist() == [[255], [256], [0]]


def test_sentinel_of_256_experts_when_only_another_part_is_wider(tmp_path):
    layer = LayerMeta(layer=0, path="mlp", num_experts=256, top_k=1, score="softmax")
    meta = make_meta(layers=(layer,), columns=column_names([0], logits=False, gate_inputs=False))
    tokens, _ = make_rows(1)
    with TraceWriter(tmp_path, meta, part_rows=1) as writer:
        writer.add(tokens, [LayerRows(np.array([7]), np.ones(1))])
        writer.add(tokens, [LayerRows(np.array([8, 9]), np.ones(2))])
    assert Trace.open(tmp_path).experts(0).tolist() == [[7, 256], [8, 9]]


def test_a_token_with_more_than_top_k_experts_widens_the_array(tmp_path):
    tokens, layers = make_rows(2)
    wide = LayerRows(np.array([1, 2, 3, 4, 5]), np.ones(5), np.array([4, 1]))
    with TraceWriter(tmp_path, make_meta()) as writer:
        writer.add(tokens, [wide, layers[1]])
        writer.add(*make_rows(2))
    assert Trace.open(tmp_path).experts(1).shape == (4, 4)


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("by", [None, "domain", "phase", "sequence", "document", "position", "step", "adapter"])
def test_counts_agree_with_counting_by_hand(tmp_path, by, ragged):
    write(tmp_path, N=70, ragged=ragged)
    trace = Trace.open(tmp_path)
    keys = [None] if by is None else range(len(trace.groups(by))) if by in ("domain", "phase") else trace.groups(by)
    labels = np.zeros(70) if by is None else trace.column(by)
    asked = np.zeros((len(keys), 2, 300), int)
    for place, layer in enumerate(trace.layers):
        for row, label in zip(trace.experts(layer).tolist(), labels.tolist(), strict=True):
            for expert in row:
                if expert < trace.meta.layer(layer).num_experts:
                    asked[0 if by is None else list(keys).index(label), place, expert] += 1
    assert np.array_equal(trace.counts(by=by), asked[0] if by is None else asked)
    assert np.array_equal(trace.counts(1, by=by), asked[0, 0, :8] if by is None else asked[:, 0, :8])


def test_scan_gives_the_same_rows_to_polars(folder):
    trace = Trace.open(folder)
    frame = trace.scan().collect()
    assert frame["token"].to_numpy().tolist() == trace.tokens().tolist()
    assert frame["expert_3"].to_list() == trace.experts(3).tolist()
    code = frame.filter(pl.col("domain") == "code").select(pl.col("expert_1").explode().value_counts(sort=True))
    assert sum(row["expert_1"]["count"] for row in code.to_dicts()) == trace.counts(1, by="domain")[0].sum()


def test_an_empty_trace_reads_as_one(tmp_path):
    with TraceWriter(tmp_path, make_meta()):
        pass
    trace = Trace.open(tmp_path)
    assert len(trace) == 0
    assert trace.experts(1).shape[0] == len(trace.tokens()) == trace.counts().sum() == 0
    assert trace.scan().collect().shape == (0, len(trace.meta.columns))


def test_reading_needs_no_torch(folder):
    program = (
        "import sys; from collegium.trace import Trace\n"
        f"trace = Trace.open({str(folder)!r})\n"
        "trace.experts(1), trace.counts(by='domain'), trace.scan().collect()\n"
        "assert not {'torch', 'transformers'} & sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_unknown_names_are_refused_with_the_known_ones(folder):
    trace = Trace.open(folder)
    with pytest.raises(TraceError, match=r"layer 2 is not in this trace; its layers are \[1, 3\]"):
        trace.experts(2)
    with pytest.raises(ConfigError, match="'mood' is no token column; they are sequence, document"):
        trace.column("mood")
    with pytest.raises(TraceError, match="recorded without logits"):
        next(trace.iter_parts()).logits(1)
    with pytest.raises(ConfigError, match="'expert_3' was not read"):
        next(trace.iter_parts(["expert_1"])).experts(3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema_version": 2}, "schema_version is 2; this collegium reads version 1"),
        ({"extra": 1}, "field 'extra'"),
        ({"ids": "physical"}, "field 'ids'"),
        ({"layers": []}, "field 'layers'"),
        ({"tokens": "many"}, "field 'tokens'"),
        ({"tokens": None}, "must say how many tokens"),
        ({"domains": ["code", "code"]}, "repeat a name"),
        ({"columns": ["sequence", "../../etc/passwd"]}, "do not fit the layers"),
        ({"parts": 9}, "field 'parts'"),
        ({"model": 7}, "field 'model'"),
    ],
)
def test_wrong_meta_is_refused_by_field(folder, changes, message):
    change_meta(folder, **changes)
    with pytest.raises(TraceError, match=message):
        Trace.open(folder)


def test_edited_meta_is_noticed(folder):
    text = (folder / META).read_text()
    (folder / META).write_text(text.replace("synthetic", "authentic"))
    with pytest.raises(TraceError, match="field 'checksum'"):
        Trace.open(folder)


def test_folder_without_a_trace(tmp_path):
    with pytest.raises(TraceError, match=r"is not a trace: it has no meta\.json"):
        Trace.open(tmp_path)


def test_missing_and_linked_parts_are_refused(folder):
    part = next(folder.glob("part-00000001-*"))
    moved = folder.parent / part.name
    part.rename(moved)
    with pytest.raises(TraceError, match="part 1 is missing"):
        Trace.open(folder)
    part.symlink_to(moved)
    with pytest.raises(TraceError, match="not a plain file"):
        Trace.open(folder)


def test_tokens_of_the_meta_must_be_those_of_the_parts(folder):
    change_meta(folder, tokens=99)
    with pytest.raises(TraceError, match="field 'tokens' of its meta is 99, its parts hold 100"):
        Trace.open(folder).tokens()


def test_expert_ids_are_checked_against_the_layer(folder):
    table = pq.read_table(next(folder.glob("part-00000000-*")))
    lists = table.column("expert_1").combine_chunks()
    values = lists.values.to_numpy().copy()
    values[3] = 8
    bad = pa.ListArray.from_arrays(lists.offsets, pa.array(values), type=lists.type)
    place = table.schema.get_field_index("expert_1")
    forge(folder, table.set_column(place, table.schema.field("expert_1"), bad))
    for use in (lambda t: t.experts(1), lambda t: t.counts(), lambda t: next(t.iter_parts()).assignments(1)):
        with pytest.raises(TraceError, match="column 'expert_1' holds expert 8 of only 8"):
            use(Trace.open(folder))


def test_column_types_are_checked(folder):
    table = pq.read_table(next(folder.glob("part-00000000-*")))
    place = table.schema.get_field_index("token")
    forge(folder, table.set_column(place, pa.field("token", pa.int64(), nullable=False), table["token"].cast("int64")))
    with pytest.raises(TraceError, match=r"column 'token' is .*int64"):
        Trace.open(folder).tokens()


def test_missing_column_is_named(folder):
    forge(folder, pq.read_table(next(folder.glob("part-00000000-*"))).drop_columns(["weight_3"]))
    with pytest.raises(TraceError, match="not those of the meta: weight_3"):
        Trace.open(folder).tokens()


def test_unknown_domain_name_is_refused(folder):
    table = pq.read_table(next(folder.glob("part-00000000-*")))
    place = table.schema.get_field_index("domain")
    forge(folder, table.set_column(place, table.schema.field("domain"), pa.array(["poetry"] * len(table))))
    with pytest.raises(TraceError, match="column 'domain' holds a name that is none of code, prose"):
        Trace.open(folder).counts(by="domain")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_files_give_a_trace_error_or_the_right_data(folder, data):
    asked = read_everything(folder)
    victim = data.draw(st.sampled_from(sorted(folder.iterdir())))
    content = bytearray(victim.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        content[place] ^= 1 << data.draw(st.integers(0, 7))
    else:
        del content[place:]
    copy = folder.parent / "damaged"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder, copy)
    (copy / victim.name).write_bytes(content)
    try:
        found = read_everything(copy)
    except TraceError:
        return
    assert found == asked


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_forged_parts_never_crash_the_reader(folder, data):
    """A checksum that fits proves nothing about who wrote the part."""
    copy = folder.parent / "forged"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder, copy)
    victim = next(copy.glob("part-00000000-*"))
    content = bytearray(victim.read_bytes())
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=4)):
        content[place] ^= 1 << data.draw(st.integers(0, 7))
    victim.unlink()
    (copy / f"part-00000000-{zlib.crc32(content):08x}.parquet").write_bytes(content)
    trace = Trace.open(copy)
    for read in (trace.tokens, trace.counts, lambda: trace.experts(3), lambda: trace.weights(1)):
        try:
            read()
        except TraceError:
            continue


def test_meta_round_trips(tmp_path):
    meta = make_meta(fingerprint="f00", tokenizer="cafe", logits=True, gate_inputs=True)
    write_meta(tmp_path, meta)
    assert Trace.open(tmp_path).meta == meta


def test_checksums_can_be_left_out_for_a_trace_one_trusts(folder):
    part = next(folder.glob("part-00000000-*"))
    part.rename(folder / "part-00000000-00000000.parquet")
    with pytest.raises(TraceError, match="do not fit the checksum in its name"):
        Trace.open(folder).tokens()
    assert len(Trace.open(folder, verify=False).tokens()) == 100
