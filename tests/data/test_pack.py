"""Packing: nothing is lost, invented or mixed up; the cache is reused, and rebuilt when it is damaged."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from collegium.data import Corpus, Document, Packed, encode_texts, open_corpus, pack
from collegium.errors import ConfigError, DataError, StorageError

LENGTH = 16
module = importlib.import_module("collegium.data.pack")  # the function of that name hides it


@pytest.fixture(scope="module")
def packed(corpus: Corpus, tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Packed:
    return pack(corpus, tokenizer, "train", LENGTH, tmp_path_factory.mktemp("packs"))


def expected(corpus: Corpus, tokenizer: PreTrainedTokenizerFast, split: str) -> dict[tuple[int, ...], str]:
    """Token ids with the end token -> domain, of every document (no two are equal)."""
    documents = list(corpus.documents(split))  # type: ignore[arg-type]
    ids = encode_texts(tokenizer, [d.text for d in documents])
    return {(*i, tokenizer.eos_token_id): d.domain for d, i in zip(documents, ids, strict=True)}


def runs(packed: Packed) -> dict[int, tuple[int, ...]]:
    """Tokens of each document number, read from the two arrays."""
    tokens, document = packed.tokens.ravel(), packed.document.ravel()
    return {int(number): tuple(tokens[document == number].tolist()) for number in np.unique(document)}


def test_every_document_comes_back_exactly(corpus: Corpus, tokenizer: PreTrainedTokenizerFast, packed: Packed) -> None:
    want, got = expected(corpus, tokenizer, "train"), runs(packed)
    total = sum(map(len, want))
    assert len(packed) == total // LENGTH
    assert packed.meta["dropped_tokens"] == total % LENGTH
    *whole, last = (got[number] for number in sorted(got))
    assert set(whole) <= set(want)
    assert any(tokens[: len(last)] == last for tokens in want)
    for number, tokens in list(got.items())[:-1]:
        assert packed.domains[packed.domain_of_document[number]] == want[tokens]
    assert len(packed.domain_of_document) == len(want)
    assert np.all(np.diff(packed.document.ravel()) >= 0)


def test_documents_are_shuffled(packed: Packed) -> None:
    changes = np.count_nonzero(np.diff(packed.domain_of_document))
    assert changes > len(packed.domain_of_document) / 3


def test_batch_fields(packed: Packed, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [3, 0, 5]
    batch = packed.batch(rows)
    assert all(value.dtype == torch.int64 and value.shape == (3, LENGTH) for value in batch.values())
    for at, row in enumerate(rows):
        position = -1
        for s in range(LENGTH):
            ends_before = s > 0 and packed.tokens[row, s - 1] == tokenizer.eos_token_id
            position = 0 if s == 0 or ends_before else position + 1
            number = packed.document[row, s]
            assert batch["position"][at, s] == position
            assert batch["input_ids"][at, s] == packed.tokens[row, s]
            assert batch["document"][at, s] == number
            assert batch["domain"][at, s] == packed.domain_of_document[number]


def test_order_is_a_keyed_permutation(packed: Packed) -> None:
    first = packed.order(0, 0)
    assert sorted(first) == list(range(len(packed)))
    assert np.array_equal(first, packed.order(0, 0))
    assert not np.array_equal(first, packed.order(0, 1))
    assert not np.array_equal(first, packed.order(1, 0))


@settings(max_examples=25, deadline=None)
@given(
    documents=st.lists(
        st.tuples(st.text("ab \n", min_size=1, max_size=40), st.sampled_from("xyz")), min_size=1, max_size=20
    ),
    length=st.integers(2, 30),
    chunk=st.integers(1, 50),
)
def test_by_domain_never_mixes(
    documents: list[tuple[str, str]],
    length: int,
    chunk: int,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    rows = [(Document(text, domain, "d"), "valid") for text, domain in documents]
    corpus = Corpus("memory", rows)  # type: ignore[arg-type]
    totals = dict.fromkeys(corpus.domains, 0)
    for text, domain in documents:
        totals[domain] += len(encode_texts(tokenizer, [text])[0]) + 1
    folder = tmp_path_factory.mktemp("by-domain")
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setattr(module, "_TOKENS", chunk)
        patch.setattr(module, "_CHARACTERS", chunk)
        if not any(total >= length for total in totals.values()):
            with pytest.raises(DataError, match="no sequence of"):
                pack(corpus, tokenizer, "valid", length, folder, by_domain=True)
            return
        packed = pack(corpus, tokenizer, "valid", length, folder, by_domain=True)
    domain = packed.domain_of_document[packed.document]
    assert np.all(domain == domain[:, :1])
    counts = dict(zip(corpus.domains, np.bincount(domain[:, 0], minlength=len(totals)).tolist(), strict=True))
    assert counts == {name: total // length for name, total in totals.items()}


def test_domains_that_fill_no_sequence_are_named(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    rows = [(Document("word " * 50, "long", "1"), "valid"), (Document("a", "short", "2"), "valid")]
    corpus = Corpus("memory", [*rows, (Document("b", "absent", "3"), "train")])  # type: ignore[list-item]
    with pytest.warns(UserWarning, match="no valid sequence of 16 tokens could be filled from absent, short"):
        pack(corpus, tokenizer, "valid", 16, tmp_path, by_domain=True)


def test_the_cache_is_reused_and_keyed_by_everything(
    corpus: Corpus, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = pack(corpus, tokenizer, "valid", LENGTH, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(module, "encode_texts", None)
        again = pack(corpus, tokenizer, "valid", LENGTH, tmp_path)
    assert np.array_equal(first.tokens, again.tokens)
    other = Corpus("other", [(Document("another corpus " * 20, "d", "1"), "valid")])  # type: ignore[list-item]
    pack(corpus, tokenizer, "test", LENGTH, tmp_path)
    pack(corpus, tokenizer, "valid", LENGTH + 1, tmp_path)
    pack(corpus, tokenizer, "valid", LENGTH, tmp_path, by_domain=True)
    pack(other, tokenizer, "valid", LENGTH, tmp_path)
    assert len(list(tmp_path.iterdir())) == 5
    assert not any(file.name == "stream.bin" for file in tmp_path.rglob("*"))


@pytest.mark.parametrize("damage", ["tokens.npy", "document.npy", "domain_of_document.npy", "meta.json", "missing"])
def test_a_damaged_cache_is_rebuilt_loudly(
    damage: str, corpus: Corpus, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    good = pack(corpus, tokenizer, "valid", LENGTH, tmp_path)
    want = good.tokens.tobytes()
    (folder,) = tmp_path.iterdir()
    file = folder / ("tokens.npy" if damage == "missing" else damage)
    content = file.read_bytes()
    file.unlink()
    if damage != "missing":
        file.write_bytes(content[:-5])
    with pytest.raises(DataError, match=str(folder)):
        Packed.open(folder)
    with pytest.warns(UserWarning, match="packing again"):
        again = pack(corpus, tokenizer, "valid", LENGTH, tmp_path)
    assert again.tokens.tobytes() == want
    assert file.read_bytes() == content


def test_a_failure_half_way_leaves_nothing(
    corpus: Corpus, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "_cut", full)
    with pytest.raises(StorageError, match="No space left"):
        pack(corpus, tokenizer, "valid", LENGTH, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_large_vocabularies_use_four_bytes(corpus: Corpus, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    larger = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()), eos_token="<|endoftext|>"
    )
    larger.add_tokens([f"<extra {n}>" for n in range(2**16)])
    small, large = (pack(corpus, t, "test", LENGTH, tmp_path) for t in (tokenizer, larger))
    assert (small.tokens.dtype, large.tokens.dtype) == (np.uint16, np.uint32)
    assert np.array_equal(small.tokens, large.tokens)


def test_a_corpus_that_changes_under_the_reader_is_noticed(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, corpus_writer: Callable[..., Path]
) -> None:
    corpus = open_corpus(corpus_writer(tmp_path / "text", 20))
    for file in (tmp_path / "text" / "sums").iterdir():
        file.write_text(file.read_text() + "more")
    with pytest.raises(DataError, match="has changed since it was opened"):
        pack(corpus, tokenizer, "train", LENGTH, tmp_path / "packs")


def test_refusals(corpus: Corpus, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="sequence_length is 1"):
        pack(corpus, tokenizer, "train", 1, tmp_path)
    with pytest.raises(DataError, match=r"has \d+ tokens: no sequence of 1000000"):
        pack(corpus, tokenizer, "train", 1_000_000, tmp_path)
    endless = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(ConfigError, match="no eos_token"):
        pack(corpus, endless, "train", LENGTH, tmp_path)
    only_train = Corpus("memory", [(Document("text", "d", "1"), "train")])  # type: ignore[list-item]
    with pytest.raises(DataError, match="the test split of memory has 0 tokens"):
        pack(only_train, tokenizer, "test", LENGTH, tmp_path)
    assert list(tmp_path.iterdir()) == []
