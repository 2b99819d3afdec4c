"""Balanced classes: every class counts the same in the loss, however many images it has."""

import dataclasses

import keras
import numpy as np
import pytest
import tensorflow as tf
from sklearn.utils.class_weight import compute_class_weight

from shared.artifacts import open_artifact
from shared.datasets import Spec
from shared.errors import Refused
from shared.jobs import TrainJob, parse
from training import networks
from training.jobs import train
from training.recipes import SMALL, resolve
from training.steps import class_weights, fed, new_optimizer, new_step

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")
SPEC = Spec(32, ("a", "b", "c"), (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))
BALANCED = dataclasses.replace(SMALL, class_weights="balanced", label_smoothing=0.0, augmentation={}, batch_size=8)


def test_the_weights_are_those_of_scikit_learn_and_an_empty_class_counts_nothing():
    labels = np.repeat([0, 1, 2], [50, 7, 13]).astype(np.int32)
    expected = compute_class_weight("balanced", classes=np.arange(3), y=labels)
    np.testing.assert_allclose(class_weights(BALANCED, labels, 3), expected, rtol=1e-6)
    weights = class_weights(BALANCED, labels, 4)
    assert weights[3] == 0
    assert class_weights(SMALL, labels, 3) is None


def test_a_step_s_loss_is_the_weighted_mean():
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (8, 32, 32, 3), np.uint8), np.array([0, 0, 0, 0, 0, 0, 1, 2], np.int32)
    keras.utils.set_random_seed(1)
    model = networks.build(BALANCED, SPEC)
    weights = class_weights(BALANCED, labels, 3)
    scores = networks.logits_of(model)(images.astype(np.float32), training=True).numpy()
    logs = scores - np.log(np.exp(scores).sum(1, keepdims=True))
    expected = (weights[labels] * -logs[np.arange(8), labels]).mean()
    totals = tf.Variable(tf.zeros([2], tf.float64))
    step = new_step(model, new_optimizer(BALANCED, model), BALANCED, SPEC, 1, totals, weights_of=weights)
    losses = fed(step, images, labels)(np.arange(8)[None], np.array([0.01], np.float32), 0)
    assert float(losses[0]) == pytest.approx(expected, rel=1e-4)


def test_a_job_asks_for_it_and_the_model_says_so(tmp_path, write_dataset, new_attempt):
    job = TrainJob("m-1", write_dataset(tmp_path, images=120), "colours", "small", epochs=1, class_weights="balanced")
    train(job, new_attempt(tmp_path, job, "j-1"))
    manifest = open_artifact(tmp_path, "models/m-1")
    assert manifest["recipe"]["class_weights"] == "balanced"
    low, high = manifest["metrics"]["validation_interval"]
    assert 0 <= low <= manifest["metrics"]["validation_accuracy"] <= high <= 1
    assert high > low


def test_other_weights_are_refused():
    with pytest.raises(Refused, match="class_weights is 'heavy': expected balanced"):
        parse("train", {"model_id": "m-1", "dataset_id": "d-1", "name": "x", "class_weights": "heavy"})
    assert resolve(TrainJob("m-1", "d-1", "x", class_weights="balanced"), 100).class_weights == "balanced"
