"""Where XLA's caches are: a process that trains reads the flags before it imports TensorFlow."""

import os
import subprocess
import sys

import pytest

from shared import gpu
from training import compiled

CARD = gpu.Gpu("GPU-1", "NVIDIA H100 80GB HBM3", "580.1", 81559, "9.0")


@pytest.fixture(autouse=True)
def no_flags(monkeypatch):
    for name in ("TF_XLA_FLAGS", "XLA_FLAGS"):
        monkeypatch.setenv(name, "")  # remembered, to be put back
        monkeypatch.delenv(name)
    monkeypatch.setattr(gpu, "find", lambda: [CARD])


def test_flags_name_a_folder_of_this_gpu_and_these_libraries(tmp_path, monkeypatch):
    compiled.keep(tmp_path)
    (folder,) = tmp_path.iterdir()
    assert folder.name.startswith("nvidia-h100-80gb-hbm3-580.1")
    assert f"persistent_cache_directory={folder}/" in os.environ["TF_XLA_FLAGS"]
    assert f"autotune_cache_dir={folder}/" in os.environ["XLA_FLAGS"]
    monkeypatch.setattr(gpu, "find", lambda: [gpu.Gpu("GPU-1", "NVIDIA L4", "580.1", 23034, "8.9")])
    compiled.keep(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_tensorflow_takes_every_flag(tmp_path):
    """It would end the process at one that it does not know."""
    compiled.keep(tmp_path)
    body = "import tensorflow as tf; print(float(tf.function(lambda: tf.reduce_sum(tf.ones([3])), jit_compile=True)()))"
    done = subprocess.run([sys.executable, "-c", body], capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("3.0\n", 0), done.stderr[-2000:]


def test_flags_of_the_host_stand_and_the_others_are_added(tmp_path, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_autotune_level=0 --xla_gpu_kernel_cache_file=/mine")
    compiled.keep(tmp_path, ["kernels"], [compiled.ONE_BY_ONE])
    assert os.environ["XLA_FLAGS"].split() == [
        "--xla_gpu_autotune_level=0", "--xla_gpu_kernel_cache_file=/mine", "--xla_gpu_enable_command_buffer=",
        "--xla_gpu_enable_llvm_module_compilation_parallelism=true"]


def test_a_folder_that_has_outgrown_its_limit_is_emptied(tmp_path, monkeypatch):
    compiled.keep(tmp_path)
    (folder,) = tmp_path.iterdir()
    (folder / "kernels").write_bytes(bytes(100))
    compiled.keep(tmp_path)
    assert (folder / "kernels").exists()
    monkeypatch.setattr(compiled, "MOST_BYTES", 99)
    compiled.keep(tmp_path)
    assert not (folder / "kernels").exists()
