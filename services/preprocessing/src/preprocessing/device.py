"""The one place that picks where tables and pixel statistics are computed: (xp, frames)."""

from types import ModuleType


class MissingLibrary(RuntimeError):
    """DEVICE asks for a library that is not installed."""


def choose(device: str) -> tuple[ModuleType, ModuleType]:
    """(NumPy, pandas) for cpu, the reference; (CuPy, cuDF) for gpu.

    Raises:
        MissingLibrary: DEVICE=gpu without CuPy or cuDF; it is not silently done on the CPU.
    """
    match device:
        case "cpu":
            import numpy
            import pandas

            return numpy, pandas
        case _:
            try:
                import cudf
                import cupy
            except ImportError as e:
                raise MissingLibrary(f"DEVICE=gpu needs CuPy and cuDF ({e}): install the extra, "
                                     "`uv sync --package preprocessing --extra gpu`, or set DEVICE=cpu") from e
            return cupy, cudf
