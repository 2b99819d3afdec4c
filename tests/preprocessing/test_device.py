"""The seam between the CPU and the GPU path."""

import importlib.util

import numpy as np
import pandas as pd
import pytest

from preprocessing.device import MissingLibrary, choose
from preprocessing.inspection import channel_sums


def test_cpu_is_numpy_and_pandas() -> None:
    assert choose("cpu") == (np, pd)


@pytest.mark.skipif(importlib.util.find_spec("cudf") is not None, reason="cuDF is installed")
def test_a_gpu_without_its_libraries_is_an_error_that_says_what_to_install() -> None:
    with pytest.raises(MissingLibrary, match=r"DEVICE=gpu needs CuPy and cuDF .*--extra gpu"):
        choose("gpu")


def test_channel_sums_are_exact() -> None:
    batch = np.random.default_rng(0).integers(0, 256, (256, 40, 40, 3), dtype=np.uint8)
    batch[:, :20] = 255
    sums, squares = channel_sums(np, batch)
    wide = batch.astype(np.int64)
    assert np.array_equal(sums, wide.sum((0, 1, 2)))
    assert np.array_equal(squares, (wide**2).sum((0, 1, 2)))
