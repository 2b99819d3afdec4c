"""Steps over images on the device are the steps that are fed from the host."""

import dataclasses

import keras
import numpy as np
import tensorflow as tf

from shared.datasets import Spec
from training import networks
from training.recipes import SMALL
from training.steps import fed, new_optimizer, new_step, resident

SPEC = Spec(32, ("a", "b", "c"), (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))


def weights_after(make, images, labels, chosen):
    recipe = dataclasses.replace(SMALL, batch_size=chosen.shape[1])
    keras.utils.set_random_seed(1)
    model = networks.build(recipe, SPEC)
    totals = tf.Variable(tf.zeros([2], tf.float64))
    step = new_step(model, new_optimizer(recipe, model), recipe, SPEC, 1, totals)
    run = make(step, images, labels)
    rates = np.linspace(0.01, 0.02, len(chosen), dtype=np.float32)
    run(chosen[:2], rates[:2], 0)
    loss = run(chosen[2:], rates[2:], 2)
    return float(loss), totals.numpy(), model.get_weights()


def test_resident_steps_equal_fed_steps():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (64, 32, 32, 3), np.uint8)
    labels = rng.integers(0, 3, 64).astype(np.int32)
    chosen = rng.permutation(64)[:48].reshape(6, 8)
    a, b = (weights_after(make, images, labels, chosen) for make in (fed, resident))
    assert np.isclose(a[0], b[0], rtol=1e-4)
    np.testing.assert_allclose(a[1], b[1], rtol=1e-4)
    for x, y in zip(a[2], b[2], strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-5)
