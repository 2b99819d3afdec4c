"""A Dataset and a trained Model, both published, and attempts at optimizing them."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import pytest
import tensorflow as tf
from redis import Redis

from optimization.reference import use_cpu
from shared.artifacts import publish, stage
from shared.attempt import Attempt
from shared.datasets import Spec
from shared.jobs import OptimizeJob
from shared.ledger import Ledger
from shared.settings import Settings

NOBODY = "redis://127.0.0.1:1/0"  # a closed port: the live view is lost, the record is not
LABELS = ("faint red", "faint blue", "strong red", "strong blue")
SPLITS = {"train": 480, "validation": 900, "test": 60}


def draw(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Tints under noise, stronger to the right: uint8 [N, 32, 32, 3] and int32 [N].

    Swapped channels exchange red and blue; activations clipped too low exchange strong and faint.
    """
    rng = np.random.default_rng(seed)
    labels = (np.arange(count) % len(LABELS)).astype(np.int32)
    tint = np.array([[20, 0, -20], [-20, 0, 20], [70, 0, -70], [-70, 0, 70]])[labels]
    images = 128 + tint[:, None, None] * np.linspace(0.5, 1, 32)[:, None] + rng.normal(0, 20, (count, 32, 32, 3))
    return np.clip(images, 0, 255).astype(np.uint8), labels


def network() -> keras.Model:
    """Trains in seconds; has the layers that exporters stumble over: tensors that are no weights, random ones."""
    keras.utils.set_random_seed(0)
    layers = keras.layers
    image = keras.Input((32, 32, 3))
    x = layers.Normalization(mean=[128.0] * 3, variance=[60.0**2] * 3)(image)
    x = layers.RandomTranslation(0.1, 0.1, seed=0)(x)
    for width in (8, 16):
        x = layers.Conv2D(width, 3, strides=2, padding="same", use_bias=False)(x)
        x = layers.ReLU()(layers.BatchNormalization(momentum=0.8)(x))
    x = layers.Dense(len(LABELS), name="logits")(layers.Flatten()(x))
    return keras.Model(image, layers.Softmax()(x))


@pytest.fixture(scope="session")
def volume(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A volume with datasets/d-1 and models/m-1. Read only: tests that publish work on a copy, `root`."""
    # Before TensorFlow is used: on a GPU host the GPU is the engines'. Threads as in tests/training, which may share
    # this process, and TensorFlow started with them: no job here can then say otherwise.
    use_cpu(2)
    tf.config.list_logical_devices()
    root = tmp_path_factory.mktemp("volume")
    staging = stage(root, "test")
    for number, (split, count) in enumerate(SPLITS.items()):
        images, labels = draw(count, number)
        np.save(staging / f"{split}.npy", images)
        np.save(staging / f"{split}.labels.npy", labels)
    spec = Spec(32, LABELS, (0.5, 0.5, 0.5), (0.24, 0.24, 0.24)).to_json()
    publish(root, staging, "datasets/d-1", {"name": "sides", "spec": spec, "summary": {}})

    images, labels = draw(SPLITS["train"], 0)
    model = network()
    model.compile(keras.optimizers.Adam(3e-3), "sparse_categorical_crossentropy")
    model.fit(images.astype(np.float32), labels, batch_size=32, epochs=4, verbose=0)
    golden = draw(64, 9)[0]
    staging = stage(root, "test")
    model.save(staging / "model.keras")
    np.savez(staging / "golden.npz", images=golden, probabilities=model.predict(golden.astype(np.float32), verbose=0))
    publish(root, staging, "models/m-1", {"name": "sides", "parents": {"dataset": "d-1"}, "spec": spec, "metrics": {},
                                          "recipe": {"name": "test"}, "summary": {}})
    return root


@pytest.fixture
def root(volume: Path, tmp_path: Path) -> Path:
    """A copy of the volume for one test."""
    return Path(shutil.copytree(volume, tmp_path / "artifacts"))


@pytest.fixture(scope="session")
def begin() -> Callable[[Path, OptimizeJob, str], Attempt]:
    """`begin(root, job, job_id)`: an attempt at a job accepted at the first call, with a Redis that does not answer."""
    def attempt(root: Path, job: OptimizeJob, job_id: str = "j-1") -> Attempt:
        ledger = Ledger(root, Redis.from_url(NOBODY))
        ledger.accept(job_id, job)
        return Attempt(job_id, Settings(device="cpu", artifacts=root, redis_url=NOBODY, cpu_threads=1), ledger)
    return attempt
