"""A training over several devices, here two that one CPU is split into; `test_gpu.py` splits a GPU."""

import subprocess
import sys
from pathlib import Path

import pytest

from shared.errors import Refused
from shared.jobs import TrainJob
from training.recipes import resolve


def test_two_devices_train_what_one_does_and_resume_and_publish(tmp_path: Path) -> None:
    program = Path(__file__).with_name("two_devices.py")
    done = subprocess.run([sys.executable, program, "CPU", tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "stopped and resumed" in done.stdout


@pytest.mark.parametrize(("replicas", "batch"), [(1, 64), (2, 64), (3, 63), (5, 60)])
def test_a_batch_is_shared_evenly(replicas: int, batch: int) -> None:
    assert resolve(TrainJob("m-1", "d-1", "name"), 40_000, replicas).batch_size == batch


def test_a_batch_smaller_than_the_gpus_is_refused_with_the_remedy() -> None:
    with pytest.raises(Refused, match="batch_size of at least 4, or set GPUS_PER_TRAINING lower"):
        resolve(TrainJob("m-1", "d-1", "name", batch_size=3), 40_000, 4)
