"""Tokenizers: training is repeatable, text comes back, and token bytes add up to the text for any text at all."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from collegium.data import Corpus, Document, encode_texts, open_corpus, token_bytes, train_tokenizer
from collegium.data import tokenize as module
from collegium.data.tokenize import tokenizer_fingerprint
from collegium.errors import ConfigError, DataError

TEXT = st.text(st.characters(exclude_categories=["Cs"])) | st.sampled_from(["<|endoftext|>", "a<|pad|>b", "\r\n \t"])


def sentencepiece_like(*, byte_fallback: bool = True, prefix: bool = False) -> PreTrainedTokenizerFast:
    """A tokenizer built as Llama's and Gemma's are: spaces as U+2581, unknown characters as bytes."""
    tokens = ["<unk>", "<s>", "</s>"]
    tokens += [f"<0x{byte:02X}>" for byte in range(256)] if byte_fallback else []
    tokens += [
        "\u2581",
        *"abcdefghijklmnopqrstuvwxyz",
        "\u2581t",
        "\u2581th",
        "\u2581the",
        "\u0441\u043b",
        "\u0441",
        "\u043b",
    ]
    merges = [("\u2581", "t"), ("\u2581t", "h"), ("\u2581th", "e"), ("\u0441", "\u043b")]
    vocab = {token: index for index, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=byte_fallback, fuse_unk=True))
    steps = [normalizers.Prepend("\u2581")] if prefix else []
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "\u2581")])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def changed(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()), eos_token=tokenizer.eos_token
    )


def test_training_is_repeatable_and_saving_keeps_everything(
    corpus: Corpus, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    again = train_tokenizer(corpus, 320, tmp_path / "t")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "t")
    assert len(tokenizer) == 320
    assert again.get_vocab() == tokenizer.get_vocab() == loaded.get_vocab()
    assert tokenizer_fingerprint(again) == tokenizer_fingerprint(tokenizer) == tokenizer_fingerprint(loaded)
    assert (loaded.eos_token, loaded.eos_token_id, loaded.bos_token_id) == ("<|endoftext|>", 0, 0)
    assert (loaded.pad_token, loaded.pad_token_id) == ("<|pad|>", 1)
    assert train_tokenizer(corpus, 321, tmp_path / "t").get_vocab() != tokenizer.get_vocab()


def test_fingerprint_sees_what_changes_ids(tokenizer: PreTrainedTokenizerFast) -> None:
    same, other = changed(tokenizer), changed(tokenizer)
    same.backend_tokenizer.enable_truncation(5)
    other.backend_tokenizer.normalizer = normalizers.Lowercase()
    assert tokenizer_fingerprint(same) == tokenizer_fingerprint(tokenizer) != tokenizer_fingerprint(other)
    other = changed(tokenizer)
    other.eos_token = "<|pad|>"
    assert tokenizer_fingerprint(other) != tokenizer_fingerprint(tokenizer)


@settings(max_examples=200, deadline=None)
@given(texts=st.lists(TEXT, max_size=5))
def test_any_text_comes_back_and_its_bytes_add_up(texts: list[str], tokenizer: PreTrainedTokenizerFast) -> None:
    sizes = token_bytes(tokenizer)
    for text, ids in zip(texts, encode_texts(tokenizer, texts), strict=True):
        assert sizes[ids].sum() == len(text.encode())
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
        assert not {tokenizer.eos_token_id, tokenizer.pad_token_id} & set(ids)


def test_special_tokens_stand_for_no_bytes(tokenizer: PreTrainedTokenizerFast) -> None:
    sizes = token_bytes(tokenizer)
    assert sizes.shape == (len(tokenizer),)
    assert [index for index, size in enumerate(sizes) if size == 0] == [0, 1]


@settings(max_examples=100, deadline=None)
@given(text=TEXT.filter(lambda text: text and "\u2581" not in text), prefix=st.booleans())
def test_bytes_add_up_with_byte_fallback(text: str, prefix: bool) -> None:
    tokenizer = sentencepiece_like(prefix=prefix)
    (ids,) = encode_texts(tokenizer, [text])
    assert token_bytes(tokenizer)[ids].sum() == len(text.encode()) + prefix


def test_added_tokens_count_their_text(tokenizer: PreTrainedTokenizerFast) -> None:
    larger = changed(tokenizer)
    larger.add_tokens([AddedToken("größer", special=False)])
    (ids,) = encode_texts(larger, ["noch größer"])
    assert larger.convert_tokens_to_ids("größer") in ids
    assert token_bytes(larger)[ids].sum() == len("noch größer".encode())


def test_tokenizers_that_lose_text_are_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match="does not keep text as it is"):
        token_bytes(sentencepiece_like(byte_fallback=False))
    lower = changed(tokenizer)
    lower.backend_tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    with pytest.raises(DataError, match="does not keep text as it is"):
        token_bytes(lower)
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "the": 1}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(DataError, match="does not keep text as it is"):
        token_bytes(PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]"))
    with pytest.raises(ConfigError, match="slow tokenizer"):
        token_bytes(object())  # type: ignore[arg-type]


def test_encoding_leaves_the_tokenizer_as_it_was(tokenizer: PreTrainedTokenizerFast) -> None:
    short = changed(tokenizer)
    short.backend_tokenizer.enable_truncation(3)
    short.backend_tokenizer.enable_padding(length=8, pad_id=1, pad_token="<|pad|>")
    before = (short.backend_tokenizer.truncation, short.backend_tokenizer.padding)
    ids = encode_texts(short, ["the experts read a token", ""])
    assert ids == encode_texts(tokenizer, ["the experts read a token", ""])
    assert (short.backend_tokenizer.truncation, short.backend_tokenizer.padding) == before
    assert short.backend_tokenizer.encode("<|endoftext|>").ids[0] == 0


def test_a_large_domain_does_not_spend_the_vocabulary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SAMPLE_PER_DOMAIN", 20_000)
    rows = [(Document(f"{n} " + "gate router " * 100, "large", str(n)), None) for n in range(300)]
    rows += [(Document(f"{n} " + "крот " * 40, "small", str(n)), None) for n in range(50)]
    corpus = Corpus("memory", rows)
    taken = {"gate": 0, "крот": 0}
    for piece in module._sample(corpus):
        for word in taken:
            taken[word] += len(piece.encode()) if word in piece else 0
    assert 10_000 < taken["gate"] < 40_000
    assert taken["крот"] == corpus.size("train", "small")[1]
    words = train_tokenizer(corpus, 290, tmp_path / "t")
    assert len(encode_texts(words, [" крот"])[0]) <= 2


def test_refusals_before_anything_is_trained(corpus: Corpus, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"vocab_size is 257; .* at least 258"):
        train_tokenizer(corpus, 257, tmp_path / "t")
    with pytest.raises(DataError, match=r"only gives \d+ tokens"):
        train_tokenizer(corpus, 50_000, tmp_path / "t")
    assert not (tmp_path / "t").exists()
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"holds precious.txt"):
        train_tokenizer(corpus, 300, tmp_path)
    assert open_corpus(tmp_path).size("train")[0] == 1
