"""Padded batches of documents."""

from __future__ import annotations

from collections import Counter

import pytest

from collegium.data import Corpus, Document, document_batches, train_tokenizer


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    rows = [
        (Document(f"{domain} number {i} " + "some words that go on and on " * (40 * i), domain, f"{domain}{i}"), None)
        for domain in ("alpha", "beta")
        for i in range(6)
    ]
    return Corpus("words", rows)


@pytest.fixture(scope="module")
def tokenizer(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory):
    return train_tokenizer(corpus, 270, tmp_path_factory.mktemp("tokenizer"))


def rows(corpus: Corpus, tokenizer, **settings):
    for batch in document_batches(corpus, tokenizer, None, **settings):
        B = len(batch["input_ids"])
        mask = batch.get("attention_mask")
        for b in range(B):
            keep = slice(None) if mask is None else mask[b].bool()
            yield int(batch["document"][b]), int(batch["domain"][b]), batch["input_ids"][b][keep].tolist()


@pytest.mark.parametrize("left", [False, True])
def test_rows_of_a_document_join_to_its_text(corpus: Corpus, tokenizer, left: bool) -> None:
    found: dict[int, list[int]] = {}
    for document, domain, ids in rows(corpus, tokenizer, sequence_length=16, batch_size=3, left=left):
        assert len(ids) <= 16
        found.setdefault(document, []).extend(ids)
        assert domain == document // 6
    texts = [document.text for document in corpus.documents()]
    assert [tokenizer.decode(found[i], skip_special_tokens=True) for i in range(12)] == texts
    assert all(ids[0] == tokenizer.bos_token_id for ids in found.values())


def test_a_limit_is_shared_among_domains_and_documents(corpus: Corpus, tokenizer) -> None:
    domains, documents = Counter(), Counter()
    for document, domain, ids in rows(corpus, tokenizer, sequence_length=16, batch_size=4, max_tokens=200):
        domains[domain] += len(ids)
        documents[document] += len(ids)
    assert domains[0] == domains[1] == 100
    assert max(documents.values()) <= 17
    assert len(documents) >= 10


def test_padding_is_masked_and_on_the_asked_side(corpus: Corpus, tokenizer) -> None:
    for left in (False, True):
        masks = [
            batch["attention_mask"]
            for batch in document_batches(corpus, tokenizer, None, sequence_length=50, batch_size=5, left=left)
            if "attention_mask" in batch and not batch["attention_mask"].all()
        ]
        assert masks
        for mask in masks:
            steps = mask.diff(dim=1)
            assert bool((steps >= 0).all() if left else (steps <= 0).all())
