"""What two devices train is what one does: `python two_devices.py CPU|GPU FOLDER` splits one device of this host.

A program of its own, because TensorFlow's devices can be set once in a process; `test_replicas.py` and `test_gpu.py`
run it. Ends with status 0 and a line of figures, or with an AssertionError.
"""

import contextlib
import dataclasses
import os
import sys
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
import keras
import numpy as np
import tensorflow as tf
from colours import new_attempt, write_dataset

from shared import attempt
from shared.attempt import Stopped
from shared.datasets import Dataset, Spec
from shared.jobs import TrainJob
from training import checkpoints, fitting, networks, publishing
from training.recipes import SMALL, resolve
from training.replicas import mirrored
from training.steps import Average, fed, new_optimizer, new_step

SPEC = Spec(32, ("a", "b", "c"), (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))
RECIPE = dataclasses.replace(SMALL, batch_size=16, average=0.9)
STEPS = 6


def split(kind: str) -> tf.distribute.Strategy:
    limit = 4096 if kind == "GPU" else None  # MiB
    tf.config.set_logical_device_configuration(tf.config.list_physical_devices(kind)[0],
                                               [tf.config.LogicalDeviceConfiguration(memory_limit=limit)] * 2)
    tf.config.experimental.enable_tensor_float_32_execution(False)
    if kind == "CPU":
        tf.config.experimental.enable_op_determinism()
    # NCCL, the default on GPUs, refuses two parts of one GPU.
    return tf.distribute.MirroredStrategy([f"{kind}:0", f"{kind}:1"],
                                          cross_device_ops=tf.distribute.ReductionToOneDevice())


def train(strategy: tf.distribute.Strategy, way: str) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """Losses, totals, and weights and their average after a few steps."""
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (64, 32, 32, 3), np.uint8), rng.integers(0, 3, 64).astype(np.int32)
    chosen = np.stack([rng.permutation(64)[:RECIPE.batch_size] for _ in range(STEPS)])
    with strategy.scope():
        keras.utils.set_random_seed(1)
        model = networks.build(RECIPE, SPEC, replicas=strategy.num_replicas_in_sync)
        optimizer, average = new_optimizer(RECIPE, model), Average(model, RECIPE.average)
        totals = tf.Variable(tf.zeros([2], tf.float64), trainable=False, aggregation=tf.VariableAggregation.SUM,
                             synchronization=tf.VariableSynchronization.ON_READ)
    step = new_step(model, optimizer, RECIPE, SPEC, 1, totals, average=average)
    run = fed(step, images, labels) if way == "one" else mirrored(strategy, step, images, labels, way == "resident")
    losses = run(chosen, np.full(STEPS, 0.01, np.float32), 0)
    return np.array(losses), totals.numpy(), [*model.get_weights(), *average.numpy()]


def steps_are_those_of_one_device(strategy: tf.distribute.Strategy) -> None:
    one = train(tf.distribute.get_strategy(), "one")
    for way in ("fed", "resident"):
        two = train(strategy, way)
        for a, b in zip([*one[:2], *one[2]], [*two[:2], *two[2]], strict=True):
            np.testing.assert_allclose(b, a, rtol=5e-3, atol=5e-4, err_msg=way)


def a_training_stops_resumes_and_publishes(strategy: tf.distribute.Strategy, root: Path) -> float:
    job = TrainJob("m-1", write_dataset(root, images=120), "colours", epochs=4)
    dataset = Dataset(root, job.dataset_id)
    recipe = dataclasses.replace(resolve(job, len(dataset.labels("train")), 2), average=RECIPE.average)

    def new(job_id: str) -> fitting.Training:
        ctx = new_attempt(root, job, job_id)
        return fitting.Training(dataset, recipe, job.seed, ctx, "float32", strategy)

    alone, stopped = new("j-alone"), new("j-stopped")
    alone.fit()
    run, calls = stopped.new_run(), []

    def asked_to_stop_in_the_second(*args):
        calls.append(args)
        attempt._stop["asked"] = len(calls) == 2
        return run(*args)

    stopped.steps_a_call = 3
    with contextlib.suppress(Stopped):
        stopped._run_steps(asked_to_stop_in_the_second)
        raise AssertionError("it went on after it was asked to stop")
    attempt._stop["asked"] = False
    assert checkpoints.newest(stopped.ctx.work)[0]["step"] == 6
    resumed = new("j-stopped")
    resumed.fit()
    if not tf.config.list_logical_devices("GPU"):
        pairs = zip(resumed.model.get_weights(), alone.model.get_weights(), strict=True)
        assert all(np.array_equal(a, b) for a, b in pairs)
    else:  # whose sums come in any order, so that weights drift apart from step to step
        images = dataset.images("validation")
        assert np.abs(resumed.predict(images) - alone.predict(images)).mean() < 0.03
    manifest = publishing.publish_model(resumed, job, resumed.ctx, "two devices")
    saved = keras.models.load_model(root / "models" / "m-1" / "model.keras", compile=False)
    assert {v.dtype for v in saved.weights} == {"float32"}
    return manifest["metrics"]["validation_accuracy"]


if __name__ == "__main__":
    over = split(sys.argv[1])
    assert over.num_replicas_in_sync == 2
    steps_are_those_of_one_device(over)
    accuracy = a_training_stops_resumes_and_publishes(over, Path(sys.argv[2]))
    assert accuracy > 0.6
    print(f"two parts of one {sys.argv[1]}: steps equal, stopped and resumed; accuracy {accuracy:.2f}")
