"""Data on the page: columns as one block of bytes, compressed, which the page's script inflates and reads.

    u32 length of the header | header, JSON | padding to 8 | arrays, each aligned to 8 bytes, little endian

The header says for every array its type, where it begins and how many values it has; columns of words are codes into a
list of them.
"""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

__all__ = ["pack_block", "round_bits", "script_json"]

Array = np.ndarray[Any, np.dtype[Any]]
_TYPES = {"u1": "Uint8Array", "u2": "Uint16Array", "u4": "Uint32Array", "i1": "Int8Array", "i4": "Int32Array"}


def pack_block(columns: Mapping[str, Sequence[Any] | Array], *, bits: Mapping[str, int] | None = None) -> str:
    """Columns as text for a script element; the page's ``readBlock`` is the other end.

    Args:
        columns: name -> numbers or words.
        bits: name -> bits of the mantissa that its float numbers keep (else 12, four digits).
    """
    header: dict[str, dict[str, Any]] = {}
    parts: list[bytes] = []
    at = 0
    for name, values in columns.items():
        data = np.asarray(values)
        entry: dict[str, Any] = {}
        if data.dtype.kind in "US":
            levels, data = np.unique(data, return_inverse=True)
            entry["words"] = levels.tolist()
        data = _narrow(data, (bits or {}).get(name, 12))
        content = data.tobytes()
        entry |= {"type": _javascript_type(data), "offset": at, "length": data.size}
        header[name] = entry
        padding = -len(content) % 8
        parts.append(content + bytes(padding))
        at += len(content) + padding
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-(len(head) + 4) % 8)
    block = len(head).to_bytes(4, "little") + head + b"".join(parts)
    return base64.b64encode(gzip.compress(block, 9, mtime=0)).decode()


def _narrow(data: Array, bits: int) -> Array:
    """The smallest type that a script can read the values from."""
    if data.dtype.kind == "b":
        return data.astype("u1")
    if data.dtype.kind == "f":
        return round_bits(data, bits)
    if data.dtype == np.int8:
        return data
    low, high = int(data.min(initial=0)), int(data.max(initial=0))
    if low < 0:
        return data.astype("<i4") if high < 2**31 and low >= -(2**31) else data.astype("<f4")
    for kind, limit in (("u1", 1 << 8), ("<u2", 1 << 16), ("<u4", 1 << 32)):
        if high < limit:
            return data.astype(kind)
    return data.astype("<f4")


def _javascript_type(data: Array) -> str:
    return "Float32Array" if data.dtype.kind == "f" else _TYPES[data.dtype.str[1:]]


def round_bits(values: Array, bits: int) -> Array:
    """float32 with all but `bits` bits of the mantissa cleared after rounding, which compresses well."""
    raw = np.ascontiguousarray(values, "<f4").view("<u4")
    drop = 23 - bits
    finite = np.isfinite(values)
    rounded = ((raw.astype(np.uint64) + (1 << (drop - 1))) >> drop << drop).astype("<u4").view("<f4")
    return np.where(finite, rounded, np.float32(np.nan)).astype("<f4")


def script_json(value: Any) -> str:
    """JSON that is safe inside a script element, whatever names and tokens are in it."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
