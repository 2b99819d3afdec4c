"""CuPy and cuDF give what NumPy and pandas give, op by op, and the same bytes for whole datasets."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from preprocessing import device
from shared import gpu

_spec = importlib.util.spec_from_file_location("parity", Path(__file__).with_name("parity.py"))
assert _spec is not None
assert _spec.loader is not None
parity = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(parity)


@pytest.mark.gpu
@pytest.mark.parametrize("check", parity.CHECKS)
def test_on_the_gpu(check: Callable[[ModuleType, ModuleType, str], None]) -> None:
    if not gpu.find():
        pytest.skip("no NVIDIA GPU is visible")
    check(*device.choose("gpu"), "gpu")


@pytest.mark.parametrize("check", parity.CHECKS)
def test_the_checks_hold_for_the_reference_itself(check: Callable[[ModuleType, ModuleType, str], None]) -> None:
    check(*device.choose("cpu"), "cpu")
