"""What holds of training on a real GPU: `python on_gpu.py FOLDER [CHECK ...]`, on a host that has one.

Plain functions in a program of its own: `test_gpu.py` runs it, and it runs where there is no pytest.
"""

import dataclasses
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import tensorflow as tf
from colours import new_attempt, write_dataset

from shared.artifacts import open_artifact
from shared.datasets import Spec
from shared.jobs import TrainJob
from training import augmentation, device, networks
from training.jobs import train
from training.recipes import SEED_CNN, SMALL, Recipe
from training.steps import Run, Step, fed, new_optimizer, new_step, resident

SPEC = Spec(32, ("a", "b", "c"), (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))
LIMIT_MIB = 8192
SLACK_MIB = 32
Make = Callable[[Step, np.ndarray, np.ndarray], Run]


def sampling_is_that_of_tensorflow_s_kernel(root: Path) -> None:
    images = tf.constant(np.random.default_rng(0).integers(0, 256, (64, 32, 32, 3), np.uint8))
    options = {**SEED_CNN.augmentation, "zoom_range": 0.2}

    @tf.function(jit_compile=True)
    def compiled() -> tf.Tensor:
        draws = augmentation.draw(options, 32, 64, tf.constant([1, 2]))
        return augmentation.apply(images, options, draws, (0.0, 0.0, 0.0), xla=True)

    draws = augmentation.draw(options, 32, 64, tf.constant([1, 2]))
    kernel = augmentation.apply(images, options, draws, (0.0, 0.0, 0.0))
    np.testing.assert_allclose(compiled(), kernel, atol=0.05)


def one_program_equals_fed_steps(root: Path) -> None:
    tf.config.experimental.enable_tensor_float_32_execution(False)
    for options in (SMALL.augmentation, SEED_CNN.augmentation):
        recipe = dataclasses.replace(SMALL, augmentation=options)
        one = _steps(recipe, lambda *args: resident(*args, capacity=5, xla=True), True)
        other = _steps(recipe, fed, False)
        for a, b in zip(one, other, strict=True):
            np.testing.assert_allclose(a, b, rtol=0.02, atol=2e-3)


def _steps(recipe: Recipe, make: Make, xla: bool) -> list[np.ndarray]:
    """Losses, totals and weights after six steps of 64."""
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (200, 32, 32, 3), np.uint8), rng.integers(0, 3, 200).astype(np.int32)
    chosen = np.stack([rng.permutation(200)[:64] for _ in range(6)])
    keras.utils.set_random_seed(1)
    model = networks.build(recipe, SPEC)
    totals = tf.Variable(tf.zeros([2], tf.float64))
    step = new_step(model, new_optimizer(recipe, model), recipe, SPEC, 1, totals, xla)
    run = make(step, images, labels)
    rates = np.full(6, 0.002, np.float32)
    losses = [*run(chosen[:3], rates[:3], 0), *run(chosen[3:], rates[3:], 3)]
    return [np.array(losses), totals.numpy(), *model.get_weights()]


def seed_cnn_learns(root: Path) -> None:
    _learns(root, "seed-cnn")


def small_learns(root: Path) -> None:
    _learns(root, "small")


def speedrun_learns(root: Path) -> None:
    _learns(root, "speedrun")


def accurate_learns(root: Path) -> None:
    _learns(root, "accurate", 10)


def _learns(root: Path, recipe: str, epochs: int = 5) -> None:
    """A job end to end within its memory, in bfloat16 where the GPU has it, published in float32."""
    job = TrainJob("m-1", write_dataset(root, images=1500), "colours", recipe, epochs=epochs)
    ctx = new_attempt(root, job, "j-1", "gpu", gpu_memory_mib=LIMIT_MIB)
    began = time.monotonic()
    summary = train(job, ctx)
    manifest = open_artifact(root, job.target)
    assert summary["validation_accuracy"] > 0.9, summary
    assert manifest["precision"] == ("mixed_float16" if recipe == "speedrun" else device.precision(ctx.settings))
    saved = keras.models.load_model(root / job.target / "model.keras", compile=False)
    assert {layer.dtype_policy.name for layer in saved.layers} == {"float32"}
    with tf.device("CPU"):
        golden = np.load(root / job.target / "golden.npz")
        on_cpu = keras.models.load_model(root / job.target / "model.keras", compile=False)
        found = np.asarray(on_cpu(golden["images"].astype(np.float32), training=False))
    np.testing.assert_allclose(found, golden["probabilities"], atol=1e-4)
    peak = tf.config.experimental.get_memory_info("GPU:0")["peak"] >> 20
    assert 0 < peak < LIMIT_MIB
    print(f"{recipe}: {summary['validation_accuracy']:.2f}, computed in {manifest['precision']}, "
          f"{time.monotonic() - began:.0f} s, at most {peak} MiB")


def memory_is_given_back_when_a_job_s_process_ends(root: Path) -> None:
    """A job in a child, as a worker runs it; nvidia-smi's used memory before, during and after. TensorFlow in this
    process has not touched the GPU."""
    job = TrainJob("m-1", write_dataset(root, images=1500), "colours", "small", epochs=2)
    before = _used_mib()
    body = (f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); from pathlib import Path\n"
            "from colours import new_attempt; from shared.jobs import TrainJob; from training.jobs import train\n"
            f"root, job = Path({str(root)!r}), {job!r}\n"
            "train(job, new_attempt(root, job, 'j-1', 'gpu')); print('trained', flush=True); sys.stdin.read()")
    child = subprocess.Popen([sys.executable, "-c", body], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdin is not None
    assert child.stdout is not None
    said, during = child.stdout.readline(), _used_mib()
    child.stdin.close()
    assert (said, child.wait(60)) == ("trained\n", 0)
    end = time.monotonic() + 10
    while (after := _used_mib()) > before + SLACK_MIB and time.monotonic() < end:  # the driver takes a moment
        time.sleep(0.2)
    print(f"used before {before} MiB, while the job was there {during} MiB, after it {after} MiB")
    assert during > before + 10 * SLACK_MIB
    assert after <= before + SLACK_MIB


def _used_mib() -> int:
    """Memory in use on the first GPU, by whomever."""
    text = subprocess.run(["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"], check=True,
                          capture_output=True, text=True).stdout
    return int(text.split()[0])


def two_parts_of_a_gpu_train_what_one_does(root: Path) -> None:
    subprocess.run([sys.executable, Path(__file__).with_name("two_devices.py"), "GPU", root], check=True)


CHECKS = {check.__name__: check for check in (
    sampling_is_that_of_tensorflow_s_kernel, one_program_equals_fed_steps, seed_cnn_learns, small_learns,
    speedrun_learns, accurate_learns, two_parts_of_a_gpu_train_what_one_does,
    memory_is_given_back_when_a_job_s_process_ends)}


if __name__ == "__main__":
    for name in sys.argv[2:] or CHECKS:
        folder = Path(sys.argv[1]) / name
        folder.mkdir(parents=True, exist_ok=True)
        if len(sys.argv) == 3:
            CHECKS[name](folder)
        else:  # each in a process of its own: TensorFlow's devices are set once
            done = subprocess.run([sys.executable, __file__, sys.argv[1], name], check=False)
            print(f"{'FAILED' if done.returncode else 'ok':8}{name}", flush=True)
