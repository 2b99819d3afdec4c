"""Unpickle a dict of uint8 arrays and plain values, and nothing that could run code.

A pickle names the functions that it wants called. Here a name is looked up in a short list of stand-ins and never
imported, and not even NumPy's own restoring of arrays is run: it trusts its input.
"""

import io
import pickle
import pickletools
from typing import Any

import numpy as np

from shared.errors import Refused


class _Type:
    """Stands for numpy.dtype, of which one is known: unsigned bytes."""

    def __init__(self, name: str | bytes, *_: object):
        text = name.decode() if isinstance(name, bytes) else name
        if text not in ("u1", "|u1", "uint8"):
            raise pickle.UnpicklingError(f"an array of {text!r}, expected uint8")

    def __setstate__(self, state: object) -> None:
        """Byte order and fields, of which bytes have none."""


class _Array:
    """Stands for numpy.ndarray while it is being restored; `values` is the array."""

    values: np.ndarray

    def __setstate__(self, state: tuple[int, tuple[int, ...], _Type, bool, bytes]) -> None:
        _, shape, dtype, fortran, data = state
        self.values = _from_buffer(data, dtype, shape, "F" if fortran else "C").values


def _from_buffer(data: bytes, dtype: _Type, shape: tuple[int, ...], order: str) -> _Array:
    if not isinstance(dtype, _Type):
        raise pickle.UnpicklingError("an array without a type")
    array = _Array()
    array.values = np.frombuffer(data, np.uint8).reshape(shape, order="F" if order == "F" else "C")
    return array


def _encode(text: str, encoding: str) -> bytes:
    """How Python 3 writes bytes into the protocols of Python 2."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"the encoding {encoding!r}")
    return text.encode("latin1")


ALLOWED: dict[tuple[str, str], object] = {
    ("_codecs", "encode"): _encode, ("numpy", "dtype"): _Type, ("numpy", "ndarray"): None}
for _core in ("numpy.core", "numpy._core"):  # NumPy 1 and 2
    ALLOWED[_core + ".multiarray", "_reconstruct"] = lambda *_: _Array()
    ALLOWED[_core + ".numeric", "_frombuffer"] = _from_buffer


MOST_OPCODES = 1_000_000  # of a batch of CIFAR-10, some 40,000


def _check_memo(data: bytes) -> None:
    """The machine makes room for the number under which a value is kept: a few bytes could ask for gigabytes."""
    for count, (opcode, number, _) in enumerate(pickletools.genops(data), 1):
        if count > MOST_OPCODES or ("PUT" in opcode.name and number > count):
            raise pickle.UnpicklingError(f"it keeps a value as its {number}th" if count <= MOST_OPCODES else
                                         f"it has more than {MOST_OPCODES:,} steps")


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no dataset needs")
        return ALLOWED[module, name]


def load_plain(data: bytes, what: str) -> dict[str, Any]:
    """A pickled dict, of Python 2 or 3: keys as text, arrays as uint8 ndarrays, lists of bytes or text as they are.

    Raises:
        Refused: (bad_dataset) it asks for anything outside ALLOWED, or is not such a dict.
    """
    try:
        _check_memo(data)
        loaded = _Unpickler(io.BytesIO(data), encoding="bytes").load()
        return {(key.decode() if isinstance(key, bytes) else key): value.values if isinstance(value, _Array) else value
                for key, value in loaded.items()}
    except Exception as e:  # the boundary to hostile bytes: the pickle machine raises whatever it comes upon
        raise Refused(f"{what} is refused as a pickle ({e}): expected a file of CIFAR-10's Python edition",
                      "bad_dataset") from None
