"""TensorFlow's threads for the tests of this room, and what `colours.py` makes."""

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import pytest
import tensorflow as tf

from shared.attempt import Attempt

_spec = importlib.util.spec_from_file_location("colours", Path(__file__).with_name("colours.py"))
assert _spec is not None
assert _spec.loader is not None
colours = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(colours)

# Before any test of this process makes TensorFlow start: it can't be told afterwards.
tf.config.threading.set_intra_op_parallelism_threads(colours.THREADS)
tf.config.threading.set_inter_op_parallelism_threads(1)


@pytest.fixture(scope="session")
def write_dataset() -> Callable[..., str]:
    made: Callable[..., str] = colours.write_dataset
    return made


@pytest.fixture(scope="session")
def new_attempt() -> Callable[..., Attempt]:
    made: Callable[..., Attempt] = colours.new_attempt
    return made


@pytest.fixture(scope="session")
def stopped_at_look() -> Callable[..., Attempt]:
    made: Callable[..., Attempt] = colours.AtLook
    return made


@pytest.fixture(scope="session")
def stopped_at_step() -> Callable[..., Attempt]:
    made: Callable[..., Attempt] = colours.AtStep
    return made
