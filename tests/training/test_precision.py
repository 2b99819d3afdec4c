"""Mixed precision: computed in bfloat16, kept, validated and published in float32."""

from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

from shared.artifacts import open_artifact
from shared.datasets import Dataset, Spec
from shared.jobs import TrainJob
from shared.settings import Settings
from training import device, fitting, networks
from training.jobs import train
from training.publishing import publish_model
from training.recipes import RECIPES, resolve

# Keras 3.15 saves variables through an __array__ without NumPy 2's copy keyword.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
SPEC = Spec(32, ("a", "b", "c"), (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))


@pytest.mark.parametrize("recipe", RECIPES)
def test_bfloat16_is_between_the_normalised_image_and_the_logits_alone(recipe: str) -> None:
    model = networks.build(RECIPES[recipe], SPEC, "mixed_bfloat16")
    assert {v.dtype for v in model.weights} == {"float32"}
    named = {layer.name: layer.compute_dtype for layer in model.layers}
    assert named["normalise"] == named["logits"] == named["probabilities"] == "float32"
    assert {layer.compute_dtype for layer in model.layers if isinstance(layer, keras.layers.Conv2D)} == {"bfloat16"}
    assert keras.config.dtype_policy().name == "float32"
    plain = networks.build(RECIPES[recipe], SPEC)
    assert {layer.compute_dtype for layer in plain.layers} == {"float32"}
    plain.set_weights(model.get_weights())


def test_it_learns_and_what_is_published_is_float32(tmp_path: Path, write_dataset, new_attempt) -> None:
    job = TrainJob("m-1", write_dataset(tmp_path), "colours", epochs=3)
    ctx = new_attempt(tmp_path, job)
    device.prepare(ctx.settings)
    dataset = Dataset(tmp_path, job.dataset_id)
    training = fitting.Training(dataset, resolve(job, len(dataset.labels("train"))), job.seed, ctx, "mixed_bfloat16")
    training.fit()
    assert {v.dtype for v in training.optimizer.variables if v.path.endswith("momentum")} == {"float32"}
    manifest = publish_model(training, job, ctx, "cpu")
    assert open_artifact(tmp_path, "models/m-1")["precision"] == "mixed_bfloat16"
    assert manifest["metrics"]["validation_accuracy"] > 0.9
    saved = keras.models.load_model(tmp_path / "models/m-1/model.keras", compile=False)
    assert {layer.dtype_policy.name for layer in saved.layers} == {"float32"}
    for kept, trained in zip(saved.get_weights(), training.model.get_weights(), strict=True):
        assert kept.dtype == np.float32
        assert np.array_equal(kept, trained)
    golden = np.load(tmp_path / "models/m-1/golden.npz")
    labels = dataset.labels("validation")
    assert len(golden["images"]) == len(labels)
    found = golden["probabilities"].argmax(1)
    assert (found == labels).mean() == manifest["metrics"]["validation_accuracy"]


def test_float32_is_not_shortened_on_a_gpu(tmp_path: Path, write_dataset, new_attempt) -> None:
    tf.config.experimental.enable_tensor_float_32_execution(True)  # TensorFlow's default
    job = TrainJob("m-1", write_dataset(tmp_path), "colours", epochs=1)
    train(job, new_attempt(tmp_path, job))
    assert not tf.config.experimental.tensor_float_32_execution_enabled()


def test_a_cpu_computes_in_float32() -> None:
    assert device.precision(Settings(device="cpu")) == "float32"
