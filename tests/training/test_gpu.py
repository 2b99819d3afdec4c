"""Training on a real GPU; `on_gpu.py` says what is held to what."""

import subprocess
import sys
from pathlib import Path

import pytest

from shared import gpu

CHECKS = ["sampling_is_that_of_tensorflow_s_kernel", "one_program_equals_fed_steps", "seed_cnn_learns", "small_learns",
          "speedrun_learns", "accurate_learns", "two_parts_of_a_gpu_train_what_one_does",
          "memory_is_given_back_when_a_job_s_process_ends"]


@pytest.mark.gpu
@pytest.mark.parametrize("check", CHECKS)
def test_on_the_gpu(check: str, tmp_path: Path) -> None:
    if not gpu.find():
        pytest.skip("no NVIDIA GPU is visible")
    program = Path(__file__).with_name("on_gpu.py")
    done = subprocess.run([sys.executable, program, tmp_path, check], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-5000:]
