"""The wire form of tensors: little-endian, row-major, without padding; or JSON, nested or flat.

A BYTES element is its length (4 bytes, little-endian) and its bytes. BF16 is a float32 without its lower half.
"""

import math
import struct
from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np

from shared.errors import Refused

NUMBERS = {"BOOL": "?", "UINT8": "<u1", "UINT16": "<u2", "UINT32": "<u4", "UINT64": "<u8", "INT8": "<i1",
           "INT16": "<i2", "INT32": "<i4", "INT64": "<i8", "FP16": "<f2", "FP32": "<f4", "FP64": "<f8"}
DATATYPES = (*NUMBERS, "BF16", "BYTES")
BINARY_ONLY = ("FP16", "BF16")
KINDS = {"b": "b", "u": "iu", "i": "iu", "f": "iuf"}  # kind of a datatype -> kinds of JSON values that it takes


def from_binary(data: bytes | memoryview, datatype: str, shape: Sequence[int], what: str) -> np.ndarray:
    """The tensor of these bytes, a view of them where that can be; BF16 comes as float32, BYTES as object.

    what: "input 'images' for model 'flowers'", for errors. Raises Refused: other bytes than the shape has.
    """
    if datatype == "BYTES":
        return _strings(memoryview(data), shape, what)
    numbers = np.dtype("<u2" if datatype == "BF16" else NUMBERS[datatype])
    expected = math.prod(shape) * numbers.itemsize
    if len(data) != expected:
        raise Refused(f"input byte size mismatch for {what}. Expected {expected}, got {len(data)}", "malformed")
    flat = np.frombuffer(data, numbers)
    if datatype == "BF16":
        flat = (flat.astype("<u4") << 16).view("<f4")
    return flat.reshape(shape)


def to_binary(tensor: np.ndarray, datatype: str) -> bytes:
    """The bytes of a tensor; BF16 of float32, rounded to the nearest, ties to even; BYTES of object (bytes)."""
    if datatype == "BYTES":
        return b"".join(struct.pack("<I", len(item)) + item for item in tensor.reshape(-1))
    if datatype == "BF16":
        bits = np.ascontiguousarray(tensor, "<f4").view("<u4").astype("<u8")
        rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
        return np.where(np.isnan(tensor), bits >> 16 | 0x40, rounded).astype("<u2").tobytes()
    return np.ascontiguousarray(tensor, NUMBERS[datatype]).tobytes()


def from_json(data: Any, datatype: str, shape: Sequence[int], what: str) -> np.ndarray:
    """The tensor of a JSON list, nested or flat; strings become the bytes of their UTF-8. Raises Refused."""
    if datatype in BINARY_ONLY:
        raise Refused(f"sending {datatype} data via JSON is not supported. Please use the binary data format for "
                      f"{what}", "malformed")
    if not isinstance(data, list):
        raise Refused(f"Unable to parse 'data': expected a list for {what}", "malformed")
    try:
        found = _flat(data)
        if len(found) != math.prod(shape):
            raise Refused(f"unable to parse 'data': {what} has {len(found)} elements, its shape {list(shape)} has "
                          f"{math.prod(shape)}", "malformed")
        flat = _texts(found) if datatype == "BYTES" else _numbers(found, datatype)
    except (ValueError, TypeError, OverflowError, RecursionError):
        raise Refused(f"Unable to parse 'data': the list for {what} is ragged, or has values that are not {datatype}",
                      "malformed") from None
    return flat.reshape(shape)


def to_json(tensor: np.ndarray, datatype: str) -> list[Any]:
    """The elements as a flat list; the bytes of BYTES as UTF-8."""
    flat = tensor.reshape(-1).tolist()
    return [item.decode() for item in flat] if datatype == "BYTES" else flat


def _flat(data: list[Any]) -> list[Any]:
    """The elements of nested lists, in order. Raises ValueError where they are ragged.

    Before NumPy sees them: it makes every element of a list as long as the longest text in it.
    """
    while set(map(type, data)) == {list}:
        if len(set(map(len, data))) > 1:
            raise ValueError
        data = list(chain.from_iterable(data))
    return data


def _numbers(data: list[Any], datatype: str) -> np.ndarray:
    numbers = np.dtype(NUMBERS[datatype])
    if not set(map(type, data)) <= {int, float, bool}:
        raise ValueError
    found = np.array(data)
    if found.size == 0:
        return np.empty(0, numbers)
    if datatype == "UINT64" and found.dtype == np.float64:  # NumPy's choice for integers on both sides of 2**63
        if set(map(type, data)) != {int}:
            raise ValueError
        found = np.array(data, object)
    elif found.dtype.kind not in KINDS[numbers.kind]:
        raise ValueError
    if numbers.kind in "iu":
        limits = np.iinfo(numbers)
        if not limits.min <= int(found.min()) <= int(found.max()) <= limits.max:
            raise ValueError
    with np.errstate(over="ignore"):
        return found.astype(numbers).reshape(-1)


def _texts(data: list[Any]) -> np.ndarray:
    if not set(map(type, data)) <= {str}:
        raise ValueError
    return _objects([text.encode() for text in data])


def _strings(data: memoryview, shape: Sequence[int], what: str) -> np.ndarray:
    found, at, expected = [], 0, math.prod(shape)
    while at < len(data):
        if len(found) == expected:
            raise Refused(f"expected {expected} strings for inference {what}, got more", "malformed")
        if len(data) - at < 4:
            raise Refused(f"incomplete string length indicator for inference {what}, expecting 4 bytes but only "
                          f"{len(data) - at} bytes available", "malformed")
        length = int.from_bytes(data[at:at + 4], "little")
        at += 4
        if len(data) - at < length:
            raise Refused(f"incomplete string data for inference {what}, expecting string of length {length} but only "
                          f"{len(data) - at} bytes available", "malformed")
        found.append(bytes(data[at:at + length]))
        at += length
    if len(found) != expected:
        raise Refused(f"expected {expected} strings for inference {what}, got {len(found)}", "malformed")
    return _objects(found).reshape(shape)


def _objects(items: list[bytes]) -> np.ndarray:
    """object [N]: NumPy would make a tensor of fixed-length strings of bytes, and lose trailing zeros."""
    array = np.empty(len(items), object)
    array[:] = items
    return array
