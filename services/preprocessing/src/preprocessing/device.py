"""The one place that picks where tables and pixel statistics are computed: (xp, frames).

NumPy and pandas are imported at once, so that a worker's jobs find them there: pandas takes longer than 10,000 images.
"""

from importlib.util import find_spec
from types import ModuleType

import numpy
import pandas

REMEDY = "install the extra, `uv sync --package preprocessing --extra gpu`, or set DEVICE=cpu"


class MissingLibrary(RuntimeError):
    """DEVICE asks for a library that is not installed."""


def check(device: str) -> None:
    """Raise MissingLibrary when `choose` would, without an import: after those a process must not be forked."""
    missing = [name for name in ("cudf", "cupy") if device == "gpu" and find_spec(name) is None]
    if missing:
        raise MissingLibrary(f"DEVICE=gpu needs CuPy and cuDF ({' and '.join(missing)} not found): {REMEDY}")


def choose(device: str) -> tuple[ModuleType, ModuleType]:
    """(NumPy, pandas) for cpu, the reference; (CuPy, cuDF) for gpu.

    Raises:
        MissingLibrary: DEVICE=gpu without CuPy or cuDF; it is not silently done on the CPU.
    """
    match device:
        case "cpu":
            return numpy, pandas
        case _:
            try:
                import cudf
                import cupy
            except ImportError as e:
                raise MissingLibrary(f"DEVICE=gpu needs CuPy and cuDF ({e}): {REMEDY}") from e
            return cupy, cudf
