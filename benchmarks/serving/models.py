"""Publish what is served, as the pipeline would, with random weights: `python models.py FOLDER`.

bench-tiny: two convolutions, at most 50 us an image on one core, so that it is serving that is measured. small: the
recipe's network, seed-cnn another one's. All at 32 x 32 pixels and 10 classes, as ONNX float32.
"""

import sys
from pathlib import Path

import keras
import numpy as np
from keras import layers

from optimization.export import export
from shared import artifacts
from shared.datasets import Spec
from shared.runtimes.onnx import OnnxSession
from training.networks import build, normalise
from training.recipes import SEED_CNN, SMALL

SPEC = Spec(32, tuple(f"class-{i}" for i in range(10)), (0.49, 0.48, 0.45), (0.25, 0.24, 0.26))


def tiny() -> keras.Model:
    image = keras.Input((SPEC.size, SPEC.size, 3))
    x = normalise(SPEC)(image)
    for filters in (8, 16):
        x = layers.Conv2D(filters, 4, 4, activation="relu")(x)
    x = layers.Dense(len(SPEC.labels))(layers.GlobalAveragePooling2D()(x))
    return keras.Model(image, layers.Softmax()(x))


def publish(root: Path, name: str, model: keras.Model, golden: int = 16) -> None:
    """golden: images of its golden batch."""
    staging = artifacts.stage(root, "j-bench")
    images = np.random.default_rng(0).integers(0, 256, (golden, SPEC.size, SPEC.size, 3), np.uint8)
    export(model, "onnx", "fp32", images, staging / "model.onnx")
    session = OnnxSession(staging / "model.onnx")
    np.savez(staging / "golden.npz", images=images, probabilities=session.run(images))
    session.close()
    spec = {"size": SPEC.size, "labels": list(SPEC.labels), "mean": list(SPEC.mean), "std": list(SPEC.std)}
    artifacts.publish(root, staging, f"variants/m-{name}/onnx-fp32",
                      {"format": "onnx", "precision": "fp32", "spec": spec, "model": f"m-{name}", "summary": {}})
    staging = artifacts.stage(root, "j-bench")
    (staging / "model.keras").write_bytes(b"random weights")
    artifacts.publish(root, staging, f"models/m-{name}", {"name": name, "summary": {}})
    version = artifacts.register_version(root, name, f"m-{name}")
    artifacts.promote(root, name, "production", version, "onnx-fp32", by="bench")


if __name__ == "__main__":
    keras.utils.set_random_seed(0)
    publish(Path(sys.argv[1]), "bench-tiny", tiny())
    publish(Path(sys.argv[1]), "small", build(SMALL, SPEC))
    publish(Path(sys.argv[1]), "seed-cnn", build(SEED_CNN, SPEC))
