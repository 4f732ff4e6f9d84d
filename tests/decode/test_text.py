"""Text as it comes: whole characters, and nothing of a stop text."""

from __future__ import annotations

from decoding import Bytes, demo
from hypothesis import example, given, settings
from hypothesis import strategies as st

from collegium.decode.text import Detokenizer, StopTexts


@settings(deadline=None)  # the first one reads the tokenizer
@given(st.text(max_size=40))
@example("naïve 🙂🙂 漢字 \n\n x")
def test_pieces_are_the_text(text: str) -> None:
    _, tokenizer = demo()
    ids = tokenizer(text, add_special_tokens=False).input_ids
    one = Detokenizer(tokenizer)
    pieces = [one.push(token) for token in ids] + [one.flush()]
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True)
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces), "half a character was sent"


@settings(deadline=None)
@given(st.lists(st.integers(1, 255), max_size=60))
def test_damaged_bytes_do_not_hold_the_text_back(ids: list[int]) -> None:
    one, sent = Detokenizer(Bytes()), ""
    for count, token in enumerate(ids, 1):
        sent += one.push(token)
        assert len(Bytes().decode(ids[:count])) - len(sent) < 8 + 1
    assert (sent + one.flush()).replace("\ufffd", "") == Bytes().decode(ids).replace("\ufffd", "")


def test_special_tokens_are_no_text() -> None:
    _, tokenizer = demo()
    ids = tokenizer("once upon").input_ids
    one = Detokenizer(tokenizer)
    assert "".join(one.push(token) for token in [0, ids[0], 0, *ids[1:], 1]) == "once upon"


WORDS = st.text("ab", min_size=1, max_size=4)


@given(st.lists(st.text("ab", max_size=3), max_size=12), st.lists(WORDS, max_size=3))
def test_stop_texts_cut_wherever_the_pieces_are_cut(pieces: list[str], stops: list[str]) -> None:
    watch, sent, whole = StopTexts(stops), "", ""
    for piece in pieces:
        sent, whole = sent + watch.push(piece), whole + piece
        assert not any(stop in sent for stop in stops)
        if watch.hit:
            break
    # the first prefix that holds a stop text decides
    assert watch.hit == any(stop in whole for stop in stops)
    if watch.hit:
        assert sent == whole[: min(at for stop in stops if (at := whole.find(stop)) >= 0)]
        assert watch.push("more") == ""
    else:
        assert sent + watch.flush() == whole
