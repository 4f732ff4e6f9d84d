"""Opening corpora: what each kind of source gives, how it is split, and what is refused with which message."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from collegium.data import Corpus, Document, open_corpus
from collegium.data.document import SPLITS, digest, split_of
from collegium.errors import ConfigError, DataError


def members(corpus: Corpus) -> dict[str, set[tuple[str, str]]]:
    return {split: {(d.domain, d.text) for d in corpus.documents(split)} for split in SPLITS}


def in_memory(*texts: str, domain: str = "d") -> Corpus:
    return Corpus("memory", [(Document(text, domain, str(n)), None) for n, text in enumerate(texts)])


def write_jsonl(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def test_folder_splits_partition_and_sizes_agree(corpus: Corpus) -> None:
    assert corpus.domains == ["prose", "russian", "sums"]
    splits = members(corpus)
    assert sum(map(len, splits.values())) == len({(d.domain, d.text) for d in corpus.documents()}) == 180
    for split in SPLITS:
        for domain in corpus.domains:
            texts = [d.text for d in corpus.documents(split) if d.domain == domain]
            assert texts, f"{domain} has nothing in {split}"
            assert corpus.size(split, domain) == (len(texts), sum(len(t.encode()) for t in texts))


def test_adding_a_file_moves_no_other(tmp_path: Path, corpus_writer: Callable[..., Path]) -> None:
    before = open_corpus(corpus_writer(tmp_path, 200))
    old = members(before)
    (tmp_path / "prose" / "new.txt").write_text("a new document")
    after = open_corpus(tmp_path)
    assert after.fingerprint() != before.fingerprint()
    new = members(after)
    assert sum(len(new[s] - old[s]) for s in SPLITS) == 1
    assert all(old[s] <= new[s] for s in SPLITS)


def test_fingerprint_depends_on_content_and_label_not_on_order_or_name() -> None:
    one = in_memory("first text", "second text")
    assert one.fingerprint() == in_memory("second text", "first text").fingerprint()
    assert one.fingerprint() != in_memory("first text", "second text", domain="e").fingerprint()
    assert one.fingerprint() != in_memory("first text", "second text", "second text").fingerprint()


@pytest.mark.parametrize("count", [1, 2, 3, 10])
def test_a_small_domain_keeps_training_text_and_holds_out_what_it_can(count: int) -> None:
    texts = (text for n in itertools.count() if split_of(digest(text := f"text {n}")) == "train")
    corpus = in_memory(*itertools.islice(texts, count))
    sizes = [corpus.size(split)[0] for split in SPLITS]
    assert sizes == [len(list(corpus.documents(split))) for split in SPLITS]
    assert sum(sizes) == count
    assert sizes[1:] == [int(count >= 2), int(count >= 3)]


def test_equal_texts_are_never_held_out_and_trained_on() -> None:
    corpus = in_memory(*["the same"] * 5, *["another"] * 5)
    splits = members(corpus)
    assert not splits["train"] & splits["valid"]
    assert corpus.size("train") == (5, sum(len(d.text) for d in corpus.documents("train")))


def test_folder_with_splits_on_top(tmp_path: Path) -> None:
    for split in ("train", "validation", "test"):
        (tmp_path / split / "law").mkdir(parents=True)
        (tmp_path / split / "law" / "a.txt").write_text(f"text of {split}")
    corpus = open_corpus(tmp_path)
    assert corpus.domains == ["law"]
    assert members(corpus) == {
        s: {("law", f"text of {n}")} for s, n in zip(SPLITS, ("train", "validation", "test"), strict=True)
    }


def test_one_folder_named_train_is_a_domain(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "a.txt").write_text("steam engine")
    assert open_corpus(tmp_path).domains == ["train"]


def test_folder_own_files_have_its_name_and_newlines_are_unified(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffone\r\ntwo\r".encode())
    assert list(open_corpus(tmp_path).documents()) == [Document("one\ntwo\n", tmp_path.name, "a.txt")]


def test_files_that_are_no_text_are_left_out_loudly(tmp_path: Path) -> None:
    (tmp_path / "good.txt").write_text("good")
    (tmp_path / "latin.txt").write_bytes("Größe".encode("latin-1"))
    (tmp_path / "late.bin").write_bytes(b"a" * 100_000 + b"\0")
    with pytest.warns(UserWarning, match=r"left out 2 files .* first late.bin"):
        corpus = open_corpus(tmp_path)
    assert corpus.skipped == {"not text": 2}
    assert [d.name for d in corpus.documents()] == ["good.txt"]


@pytest.mark.parametrize("name", ["a.txt", "b.jsonl", "c.parquet"])
def test_a_file_that_cannot_be_opened_is_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / name
    path.write_text("x")

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("builtins.open", refuse)
    monkeypatch.setattr(pyarrow.parquet, "ParquetFile", refuse)
    with pytest.raises(DataError, match=rf"cannot read .*{name}.*Permission denied"):
        open_corpus(tmp_path if name == "a.txt" else path)


@pytest.mark.parametrize("content", [None, b"\0\1", b" \n"])
def test_nothing_usable_is_an_error(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(DataError, match=f"{tmp_path}.*empty"):
        open_corpus(tmp_path)


def test_jsonl_fields_and_default_domain(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "news.jsonl", {"text": "a"}, {"text": " "}, {"text": "b", "domain": "x"})
    corpus = open_corpus(path)
    assert [(d.text, d.domain) for d in corpus.documents()] == [("a", "news"), ("b", "x")]
    assert corpus.skipped == {"empty": 1}
    path = write_jsonl(tmp_path / "other.jsonl", {"body": "a\r\nb", "label": 3})
    assert [(d.text, d.domain) for d in open_corpus(path, text="body", domain="label").documents()] == [("a\nb", "3")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "cut', "line 3 is not JSON"),
        (b'{"text": "\xff"}', "line 3 is not JSON"),
        (b"[" * 100_000, "line 3 is not JSON"),
        (b'["text"]', "line 3: a record must be a JSON object, got list"),
        (b'{"body": "x"}', "line 3: no field 'text'; there are 'body'"),
        (b'{"text": 7}', "line 3: field 'text' must be a string, got int 7"),
        (b'{"text": "x", "domain": null}', "line 3: field 'domain' must name a domain, got NoneType"),
        (b'{"text": "\\ud800"}', "line 3: the text holds half a surrogate pair"),
    ],
)
def test_a_bad_jsonl_line_is_named(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"text": "fine"}\n\n' + line + b"\n")
    with pytest.raises(DataError, match=message):
        open_corpus(path)


def test_parquet_streams_the_columns_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = 2500
    table = pa.table(
        {"body": [f"text {n}" for n in range(rows)], "kind": ["a", "b"] * (rows // 2), "noise": range(rows)}
    )
    pyarrow.parquet.write_table(table, tmp_path / "t.parquet", row_group_size=700)
    seen: list[tuple[int, list[str]]] = []
    iterate = pyarrow.parquet.ParquetFile.iter_batches

    def spy(*args: object, **options: object) -> object:
        for batch in iterate(*args, **options):
            seen.append((batch.num_rows, batch.schema.names))
            yield batch

    monkeypatch.setattr(pyarrow.parquet.ParquetFile, "iter_batches", spy)
    corpus = open_corpus(tmp_path / "t.parquet", text="body", domain="kind")
    assert corpus.domains == ["a", "b"]
    assert sum(corpus.size(split)[0] for split in SPLITS) == rows
    assert max(count for count, _ in seen) <= 1000
    assert {tuple(names) for _, names in seen} == {("body", "kind")}


def test_parquet_errors(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    pyarrow.parquet.write_table(pa.table({"text": ["a", None]}), path)
    with pytest.raises(DataError, match=r"t.parquet, row 2: field 'text' must be a string, got NoneType"):
        open_corpus(path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"cannot read .*t.parquet as Parquet"):
        open_corpus(path)


def test_the_same_records_give_the_same_corpus_from_any_source(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    records = [{"text": f"text {n}", "domain": "ab"[n % 2]} for n in range(50)]
    pyarrow.parquet.write_table(pa.Table.from_pylist(records), tmp_path / "r.parquet")
    table = datasets.Dataset.from_list(records)
    specs = [write_jsonl(tmp_path / "r.jsonl", *records), tmp_path / "r.parquet", table, table.to_iterable_dataset()]
    opened = [open_corpus(spec) for spec in specs]
    assert len({corpus.fingerprint() for corpus in opened}) == 1
    assert all(members(corpus) == members(opened[0]) for corpus in opened)


def test_datasets_labels_splits_and_refusals() -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["bad", "good"])}
    )
    part = datasets.Dataset.from_dict({"text": ["x", "y"], "label": [1, -1]}, features=features)
    assert open_corpus(part, domain="label").domains == ["good", "unlabelled"]
    both = datasets.DatasetDict(train=part.select([0]), validation=part.select([1]))
    assert members(open_corpus(both)) == {"train": {("text", "x")}, "valid": {("text", "y")}, "test": set()}
    assert sum(open_corpus(datasets.DatasetDict(train=part)).size(s)[0] for s in SPLITS) == 2
    with pytest.raises(DataError, match="no split can be named 'unsupervised'"):
        open_corpus(datasets.DatasetDict(unsupervised=part))
    with pytest.raises(DataError, match="no field 'body'; there are"):
        open_corpus(part, text="body")
    with pytest.raises(DataError, match="cannot be made of list"):
        open_corpus([{"text": "x"}])


def test_options_and_paths_that_do_not_apply(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no corpus at .*missing"):
        open_corpus(tmp_path / "missing")
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(DataError, match=r"a.csv.*must be"):
        open_corpus(tmp_path / "a.csv")
    with pytest.raises(ConfigError, match="no option text"):
        open_corpus(tmp_path, text="body")
    with pytest.raises(ConfigError, match="no option max_bytes_per_domain"):
        open_corpus(tmp_path, max_bytes_per_domain=5)
    with pytest.raises(ConfigError, match="max_bytes_per_domain is 0"):
        open_corpus("local", max_bytes_per_domain=0)
    with pytest.raises(ConfigError, match="no split is named 'dev'"):
        next(in_memory("x").documents("dev"))  # type: ignore[arg-type]
