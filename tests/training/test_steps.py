"""Steps over images on the device are the steps that are fed from the host."""

import dataclasses
import functools

import keras
import numpy as np
import pytest
import tensorflow as tf

from shared.datasets import Dataset, Spec
from shared.jobs import TrainJob
from training import fitting, networks
from training.recipes import SEED_CNN, SMALL, resolve
from training.steps import fed, new_optimizer, new_step, resident

SPEC = Spec(32, ("a", "b", "c"), (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))


def after_six_steps(make, recipe=SMALL, size=32, xla=False):
    """Losses, totals and weights after six steps of eight images, in two calls."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (64, size, size, 3), np.uint8)
    labels = rng.integers(0, 3, 64).astype(np.int32)
    chosen = rng.permutation(64)[:48].reshape(6, 8)
    recipe, spec = dataclasses.replace(recipe, batch_size=8), dataclasses.replace(SPEC, size=size)
    keras.utils.set_random_seed(1)
    model = networks.build(recipe, spec)
    totals = tf.Variable(tf.zeros([2], tf.float64))
    step = new_step(model, new_optimizer(recipe, model), recipe, spec, 1, totals, xla)
    run = make(step, images, labels)
    rates = np.linspace(0.001, 0.002, len(chosen), dtype=np.float32)
    losses = [*run(chosen[:2], rates[:2], 0), *run(chosen[2:], rates[2:], 2)]
    return np.array(losses), totals.numpy(), model.get_weights()


def assert_close(one, other):
    np.testing.assert_allclose(one[0], other[0], rtol=1e-4)
    np.testing.assert_allclose(one[1], other[1], rtol=1e-4)
    for x, y in zip(one[2], other[2], strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-5)


def test_resident_steps_equal_fed_steps():
    assert_close(after_six_steps(functools.partial(resident, capacity=5)), after_six_steps(fed))


def test_steps_over_images_read_ahead_equal_fed_steps():
    for ahead in (1, 3, 9):  # a call has two steps, then four
        assert_close(after_six_steps(functools.partial(fed, ahead=ahead)), after_six_steps(fed))


def constants(step):
    shapes = ([8, 32, 32, 3], tf.uint8), ([8], tf.int32), ([], tf.float32), ([], tf.int32)
    graph = tf.function(step).get_concrete_function(*(tf.TensorSpec(*shape) for shape in shapes)).graph
    return [tf.make_ndarray(node.attr["value"].tensor) for node in graph.as_graph_def().node if node.op == "Const"]


def test_a_training_s_seed_is_no_part_of_its_program(tmp_path, write_dataset, new_attempt, monkeypatch):
    """Else each seed would be compiled anew: XLA's cache asks whether programs are the same."""
    seed = 123_456_789
    job = TrainJob("m-1", write_dataset(tmp_path), "colours", batch_size=8, seed=seed)
    monkeypatch.setattr(fitting, "fed", lambda step, *_: step)
    training = fitting.Training(Dataset(tmp_path, job.dataset_id), resolve(job, 225), seed, new_attempt(tmp_path, job))
    assert not [value for value in constants(training.new_run()) if np.any(value == seed)]
    training.seed_variable = seed
    assert [value for value in constants(training.new_run()) if np.any(value == seed)]


@pytest.mark.parametrize("augmentation", [SMALL.augmentation, SEED_CNN.augmentation], ids=["moved", "sampled"])
def test_steps_compiled_as_one_program_equal_fed_steps(augmentation):
    """At a side of 6, which leaves one convolution (XLA runs them slowly on a CPU) and no pooling (whose gradient XLA
    refuses where another test of this process asked for determinism)."""
    recipe = dataclasses.replace(SMALL, augmentation=augmentation)
    program = after_six_steps(functools.partial(resident, capacity=5, xla=True), recipe, 6, xla=True)
    assert_close(program, after_six_steps(fed, recipe, 6))


def test_seed_cnn_with_its_dropout_is_compiled_as_one_program():
    make = functools.partial(resident, capacity=5, xla=True)
    losses, totals, weights = after_six_steps(make, SEED_CNN, 6, xla=True)
    assert losses.sum() * 8 == pytest.approx(totals[0], rel=1e-5)
    assert all(np.isfinite(w).all() for w in weights)
