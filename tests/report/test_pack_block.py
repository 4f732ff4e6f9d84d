"""What is packed in Python is what the page's script reads."""

from __future__ import annotations

import base64
import gzip
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from collegium.report.pack import pack_block, round_bits, script_json

DTYPES = {
    "Uint8Array": "u1",
    "Uint16Array": "<u2",
    "Uint32Array": "<u4",
    "Int8Array": "i1",
    "Int32Array": "<i4",
    "Float32Array": "<f4",
}


def read_block(text: str) -> dict[str, Any]:
    """As ``readBlock`` in data.js does."""
    block = gzip.decompress(base64.b64decode(text))
    size = int.from_bytes(block[:4], "little")
    assert (4 + size) % 8 == 0, "typed arrays must be aligned"
    found = {}
    for name, entry in json.loads(block[4 : 4 + size]).items():
        dtype = np.dtype(DTYPES[entry["type"]])
        assert (4 + size + entry["offset"]) % dtype.itemsize == 0
        values = np.frombuffer(block, dtype, entry["length"], 4 + size + entry["offset"])
        found[name] = [entry["words"][code] for code in values] if "words" in entry else values.tolist()
    return found


@given(st.lists(st.integers(-(2**31), 2**32 - 1) | st.integers(-1, 300), max_size=9), st.lists(st.text(), max_size=5))
def test_integers_and_words_come_back_exactly(numbers: list[int], words: list[str]) -> None:
    if min(numbers, default=0) < 0:
        numbers = [number for number in numbers if number < 2**31]
    words = [word.replace("\0", "") for word in words]  # numpy strips trailing zero characters
    found = read_block(pack_block({"numbers": np.array(numbers, np.int64), "words": np.array(words, str), "π": [1]}))
    assert found == {"numbers": numbers, "words": words, "π": [1]}


def test_numbers_keep_the_bits_asked_for() -> None:
    values = np.random.default_rng(0).normal(size=1000)
    for bits in (7, 12):
        error = np.abs(round_bits(values, bits) - values) / np.abs(values)
        assert error.max() <= 2.0 ** -(bits + 1)
    assert np.isnan(round_bits(np.array([np.nan, np.inf]), 7)).all()
    assert round_bits(np.array([0.0, 1.0, -2.5]), 7).tolist() == [0.0, 1.0, -2.5]


def test_fewer_bits_take_less_space() -> None:
    values = np.random.default_rng(0).random(20_000)
    assert len(pack_block({"x": values}, bits={"x": 7})) < 0.8 * len(pack_block({"x": values}, bits={"x": 12}))


def test_json_cannot_end_its_script_element() -> None:
    value = {"</script>": "<!-- & \u2028"}
    text = script_json(value)
    assert "<" not in text
    assert json.loads(text) == value
    with pytest.raises(ValueError, match="JSON"):
        script_json(float("nan"))
