"""Where XLA's programs are kept: a process that trains reads the flags before it imports TensorFlow."""

import os
import subprocess
import sys
from importlib import metadata
from types import SimpleNamespace

import pytest

from shared import gpu
from shared.attempt import Stopped
from shared.settings import Settings
from training import compiled

CARD = gpu.Gpu("GPU-1", "NVIDIA H100 80GB HBM3", "580.1", 81559, "9.0")


@pytest.fixture
def ctx(tmp_path, monkeypatch):
    monkeypatch.setenv("TF_XLA_FLAGS", "")  # remembered, to be put back
    monkeypatch.setattr(gpu, "find", lambda: [CARD])
    return SimpleNamespace(settings=Settings(device="gpu"), root=tmp_path, work=tmp_path / "work/j-1")


def store(ctx):
    (folder,) = (ctx.root / compiled.FOLDER).iterdir()
    return folder


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_what_an_attempt_compiled_is_there_for_the_next(ctx):
    with compiled.kept(ctx):
        own = ctx.work / "compiled"
        assert f"persistent_cache_directory={own} " in os.environ["TF_XLA_FLAGS"]
        (own / "a.pb").write_bytes(b"program")
    assert store(ctx).name.startswith("nvidia-h100-80gb-hbm3-580.1-")
    assert f"keras-{metadata.version('keras')}" in store(ctx).name
    assert names(store(ctx)) == ["a.pb"]
    os.environ["TF_XLA_FLAGS"] = ""
    ctx.work = ctx.root / "work/j-2"
    with compiled.kept(ctx):
        assert (ctx.work / "compiled/a.pb").read_bytes() == b"program"
    assert not (ctx.work / "compiled").exists()


def test_another_gpu_has_its_own(ctx, monkeypatch):
    with compiled.kept(ctx):
        pass
    monkeypatch.setattr(gpu, "find", lambda: [gpu.Gpu("GPU-1", "NVIDIA L4", "580.1", 23034, "8.9")])
    os.environ["TF_XLA_FLAGS"] = ""
    with compiled.kept(ctx):
        pass
    assert len(names(ctx.root / compiled.FOLDER)) == 2


def test_a_crash_leaves_nothing_and_the_next_attempt_does_without(ctx):
    with compiled.kept(ctx):
        (ctx.work / "compiled/good.pb").write_bytes(b"program")
    os.environ["TF_XLA_FLAGS"] = ""

    def half(error):
        with compiled.kept(ctx):
            (ctx.work / "compiled/half.pb").write_bytes(b"pro")
            raise error

    with pytest.raises(RuntimeError):
        half(RuntimeError)
    assert names(store(ctx)) == ["good.pb"]
    os.environ["TF_XLA_FLAGS"] = ""
    with compiled.kept(ctx):
        assert os.environ["TF_XLA_FLAGS"] == ""
        assert names(store(ctx)) == []  # a program that can't be loaded would fail every first attempt


def test_what_is_stopped_keeps_its_programs(ctx):
    def stopped():
        with compiled.kept(ctx):
            (ctx.work / "compiled/a.pb").write_bytes(b"program")
            raise Stopped

    with pytest.raises(Stopped):
        stopped()
    assert names(store(ctx)) == ["a.pb"]


def test_a_store_that_has_outgrown_its_limit_is_emptied(ctx, monkeypatch):
    with compiled.kept(ctx):
        (ctx.work / "compiled/a.pb").write_bytes(bytes(100))
    os.environ["TF_XLA_FLAGS"] = ""
    monkeypatch.setattr(compiled, "MOST_BYTES", 99)
    with compiled.kept(ctx):
        assert (names(store(ctx)), names(ctx.work / "compiled")) == ([], [])


def test_a_cpu_and_flags_of_the_host_are_left_alone(ctx, monkeypatch):
    monkeypatch.setenv("TF_XLA_FLAGS", "--tf_xla_persistent_cache_directory=/mine")
    with compiled.kept(ctx):
        assert os.environ["TF_XLA_FLAGS"] == "--tf_xla_persistent_cache_directory=/mine"
    ctx.settings = Settings(device="cpu")
    monkeypatch.setenv("TF_XLA_FLAGS", "")
    with compiled.kept(ctx):
        assert os.environ["TF_XLA_FLAGS"] == ""
    assert not (ctx.root / compiled.FOLDER).exists()


PROGRAM = """
import tensorflow as tf
variable = tf.Variable(1.0)
print(float(tf.function(lambda: tf.reduce_sum(variable + tf.ones([3])), jit_compile=True)()))
"""


def test_tensorflow_takes_the_flags_and_writes_its_programs(ctx, monkeypatch):
    """It would end the process at a flag that it does not know. On the CPU, whose cache is the same code."""
    monkeypatch.setattr(compiled, "DEVICES", compiled.DEVICES.replace("GPU", "CPU"))
    kept = []
    for number in (1, 2):
        ctx.work, os.environ["TF_XLA_FLAGS"] = ctx.root / f"work/j-{number}", ""
        with compiled.kept(ctx):
            done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)
        assert (done.stdout, done.returncode) == ("6.0\n", 0), done.stderr[-2000:]
        kept.append({path: path.stat().st_ino for path in store(ctx).iterdir()})
    assert len(kept[0]) == 1
    assert kept[1] == kept[0]  # loaded: what is compiled again would be another file, or one more
