"""The wire form of tensors, of every datatype: what goes in comes out, and nothing malformed crashes it."""

import contextlib
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from inference.v2.tensors import BINARY_ONLY, DATATYPES, NUMBERS, from_binary, from_json, to_binary, to_json
from shared.errors import Refused

WHAT = "input 'images' for model 'colors'"
SHAPES = npst.array_shapes(max_dims=4, max_side=5)


@st.composite
def tensors(draw: st.DrawFn, datatypes: tuple[str, ...] = DATATYPES, texts: bool = False) -> tuple[str, np.ndarray]:
    """(datatype, a tensor of it); BF16 as the float32 that it can hold."""
    datatype = draw(st.sampled_from(datatypes))
    shape = draw(SHAPES)
    if datatype == "BYTES":
        items = st.text().map(str.encode) if texts else st.binary()
        flat = draw(st.lists(items, min_size=int(np.prod(shape)), max_size=int(np.prod(shape))))
        array = np.empty(len(flat), object)
        array[:] = flat
        return datatype, array.reshape(shape)
    if datatype == "BF16":
        halves = draw(npst.arrays("<u2", shape))
        return datatype, (halves.astype("<u4") << 16).view("<f4")
    kind = np.dtype(NUMBERS[datatype])
    elements = None if kind.kind != "f" else {"allow_nan": not texts, "allow_infinity": not texts}
    return datatype, draw(npst.arrays(kind, shape, elements=elements))


def same(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and (a.dtype == object or a.dtype == b.dtype) and np.array_equal(
        a, b, equal_nan=a.dtype.kind == "f")


@settings(deadline=None)
@given(tensors())
def test_what_was_written_in_binary_is_read(written: tuple[str, np.ndarray]) -> None:
    datatype, tensor = written
    assert same(from_binary(to_binary(tensor, datatype), datatype, tensor.shape, WHAT), tensor)


@settings(deadline=None)
@given(tensors(tuple(d for d in DATATYPES if d not in BINARY_ONLY), texts=True), st.booleans())
def test_what_was_written_in_json_is_read_nested_or_flat(written: tuple[str, np.ndarray], nested: bool) -> None:
    datatype, tensor = written
    data = to_json(tensor, datatype)
    if nested:
        array = np.empty(len(data), object)
        array[:] = data
        data = array.reshape(tensor.shape).tolist()
    assert same(from_json(data, datatype, tensor.shape, WHAT), tensor)


@settings(deadline=None)
@given(tensors(), st.binary(min_size=1, max_size=9))
def test_left_over_or_missing_bytes_are_refused(written: tuple[str, np.ndarray], more: bytes) -> None:
    datatype, tensor = written
    data = to_binary(tensor, datatype)
    for wrong in (data + more, data[:-1]):
        with pytest.raises(Refused):
            from_binary(wrong, datatype, tensor.shape, WHAT)


@settings(deadline=None)
@given(st.binary(max_size=64), st.sampled_from(DATATYPES), SHAPES)
def test_any_bytes_are_a_tensor_of_that_shape_or_refused(data: bytes, datatype: str, shape: tuple[int, ...]) -> None:
    with contextlib.suppress(Refused):
        assert from_binary(data, datatype, shape, WHAT).shape == shape


@settings(max_examples=300, deadline=None)
@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
                    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)),
       st.sampled_from(DATATYPES), SHAPES)
def test_any_json_is_a_tensor_of_that_shape_or_refused(data: object, datatype: str, shape: tuple[int, ...]) -> None:
    with contextlib.suppress(Refused):
        assert from_json(data, datatype, shape, WHAT).shape == shape


@pytest.mark.parametrize(("datatype", "data"), [
    ("UINT8", [256, 0]), ("UINT8", [-1, 0]), ("UINT8", [1.5, 0]), ("UINT8", ["1", "2"]), ("INT8", [128, 0]),
    ("UINT64", [1 << 64, 0]), ("INT64", [1 << 63, 0]), ("BOOL", [1, 0]), ("FP32", ["1", "2"]), ("FP32", [None, 1]),
    ("BYTES", [1, 2]), ("FP32", [[1], [2, 3]]), ("FP16", [1, 2]), ("BF16", [1, 2]), ("FP32", {"0": 1})])
def test_json_of_other_values_than_the_datatype_s_is_refused(datatype: str, data: object) -> None:
    with pytest.raises(Refused):
        from_json(data, datatype, [2], WHAT)


def test_integers_on_both_sides_of_2_to_the_63_stay_whole() -> None:
    assert from_json([(1 << 63) + 1, 3], "UINT64", [2], WHAT).tolist() == [(1 << 63) + 1, 3]
    for wrong in ([float(1 << 63), 3], [1 << 64, 3.0], [1 << 63, -1]):
        with pytest.raises(Refused):
            from_json(wrong, "UINT64", [2], WHAT)


def test_the_bytes_are_little_endian_row_major_with_lengths_before_strings() -> None:
    assert to_binary(np.array([[1, 2], [3, 4]], np.int64).T, "INT16") == struct.pack("<4h", 1, 3, 2, 4)
    assert to_binary(np.array([b"ab", b""], object), "BYTES") == b"\2\0\0\0ab\0\0\0\0"
    assert to_binary(np.array([1.0, np.nan], np.float32), "BF16") == b"\x80\x3f\xc0\x7f"
    assert to_binary(np.array([True, False]), "BOOL") == b"\1\0"


@settings(deadline=None)
@given(st.floats(width=32, allow_nan=False))
def test_bf16_is_the_nearest_there_is(value: float) -> None:
    tensor = np.array([value], np.float32)
    read = float(from_binary(to_binary(tensor, "BF16"), "BF16", [1], WHAT)[0])
    assert read == value or abs(read - value) <= 2 ** -8 * abs(value) or np.isinf(read) or abs(value) < 1e-37


@pytest.mark.parametrize(("data", "sentence"), [
    (b"\2\0", "incomplete string length indicator for inference input 'images' for model 'colors', expecting 4 bytes "
              "but only 2 bytes available"),
    (b"\2\0\0\0a", "incomplete string data for inference input 'images' for model 'colors', expecting string of "
                   "length 2 but only 1 bytes available"),
    (b"\1\0\0\0a", "expected 2 strings for inference input 'images' for model 'colors', got 1"),
    (b"\1\0\0\0a" * 3, "expected 2 strings for inference input 'images' for model 'colors', got more")])
def test_malformed_strings_are_told_as_triton_tells_them(data: bytes, sentence: str) -> None:
    with pytest.raises(Refused) as refused:
        from_binary(data, "BYTES", [2], WHAT)
    assert str(refused.value) == sentence
