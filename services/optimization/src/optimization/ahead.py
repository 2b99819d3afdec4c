"""What an optimize job imports and loads, for a process that waits for one: seconds of work that touch no GPU."""

import ctypes
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import tf2onnx.convert  # noqa: F401 - Keras imports it when it exports

from optimization import release  # noqa: F401

BUILDER = "libnvinfer_builder_resource.so*"  # a gigabyte of kernels to choose from, which the builder loads
PACKAGES = ("tensorrt_libs", "tensorrt")  # that have it, by TensorRT's version


def load_builder() -> None:
    """TensorRT and the library of its builder, where they are installed."""
    from optimization import engine  # noqa: F401

    for name in PACKAGES:
        spec = find_spec(name)
        for folder in spec.submodule_search_locations or [] if spec else []:
            for library in Path(folder).glob(BUILDER):
                ctypes.CDLL(str(library))


with suppress(ImportError, OSError):
    load_builder()
