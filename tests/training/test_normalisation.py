"""One kernel for batch normalisation is what Keras' own is, and no published Model holds it."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from shared.datasets import Dataset, Spec
from shared.jobs import TrainJob
from training import device, fitting, networks
from training.jobs import train
from training.normalisation import FusedNormalization
from training.recipes import RECIPES, resolve

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
SPEC = Spec(32, ("a", "b", "c"), (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))


@pytest.mark.parametrize("shape", [(8, 5, 7, 3), (1, 2, 2, 4), (2, 1, 1, 4)])
def test_outputs_gradients_and_statistics_are_keras_s(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    images, weights = rng.normal(3, 2, shape).astype(np.float32), rng.normal(0, 1, shape).astype(np.float32)
    found = []
    for make in (FusedNormalization, keras.layers.BatchNormalization):
        layer, x = make(momentum=0.8), tf.constant(images)
        layer.build(shape)
        layer.gamma.assign(np.linspace(0.5, 2, shape[-1]))
        layer.beta.assign(np.linspace(-1, 1, shape[-1]))
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, training=True)
            loss = tf.reduce_sum(y * weights)
        gradients = tape.gradient(loss, [x, *(w.value for w in layer.trainable_variables)])
        found.append([y, *gradients, *layer.get_weights(), layer(x, training=False)])
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("recipe", [name for name, recipe in RECIPES.items() if recipe.network in networks.FUSIBLE])
def test_a_network_s_weights_fit_its_twin_which_answers_the_same(recipe: str) -> None:
    fused, plain = networks.build(RECIPES[recipe], SPEC, fused=True), networks.build(RECIPES[recipe], SPEC)
    images = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3)).astype(np.float32)
    fused(images, training=True)
    plain.set_weights(fused.get_weights())
    np.testing.assert_allclose(fused(images), plain(images), atol=1e-5)


def test_on_a_cpu_it_is_what_trains_and_not_what_is_published(tmp_path, write_dataset, new_attempt) -> None:
    job = TrainJob("m-1", write_dataset(tmp_path, images=48), "colours", "small", epochs=1)
    ctx = new_attempt(tmp_path, job)
    device.prepare(ctx.settings)
    training = fitting.Training(Dataset(tmp_path, job.dataset_id), resolve(job, 36), 0, ctx)
    assert any(isinstance(layer, FusedNormalization) for layer in training.trained.layers)
    train(job, ctx)
    saved = keras.models.load_model(tmp_path / "models" / "m-1" / "model.keras", compile=False)
    kinds = {type(layer) for layer in saved.layers}
    assert keras.layers.BatchNormalization in kinds
    assert FusedNormalization not in kinds
