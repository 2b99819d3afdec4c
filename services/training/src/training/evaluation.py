"""What a network's answers are worth, and which epoch's are the best."""

import math
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from shared.errors import Refused

MEGAPIXEL = 2**20
Predict = Callable[..., np.ndarray]


def best_epoch(history: list[dict[str, Any]]) -> int:
    """Index of the epoch with the highest validation accuracy; among equals the lowest validation loss, the first."""
    def rank(i: int) -> tuple[float, float, int]:
        return history[i]["validation_accuracy"], -history[i]["validation_loss"], -i

    return max(range(len(history)), key=rank)


def cross_entropy(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Mean of -log p(label); probabilities float32 [N, K], labels int32 [N]."""
    of_label = probabilities[np.arange(len(labels)), labels].astype(np.float64)
    return float(-np.log(np.maximum(of_label, 1e-12)).mean())


def refuse_divergence(loss: float, epoch: int, rate: float) -> None:
    """Raise Refused when the loss of an epoch (from 1), trained at this highest rate, is no number."""
    if not math.isfinite(loss):
        raise Refused(f"training diverged in epoch {epoch}: the loss is {loss}; ask for a learning_rate below {rate:g}",
                      "diverged")


def tell_epoch(entry: dict[str, Any], step: int) -> None:
    """An epoch's entry of the history, to TensorBoard."""
    for name in ("loss", "accuracy", "learning_rate"):
        tf.summary.scalar(f"train/{name}", entry[name], step)
    for name in ("loss", "accuracy"):
        tf.summary.scalar(f"validation/{name}", entry[f"validation_{name}"], step)


def new_predict(model: keras.Model) -> Predict:
    """predict(images, between): uint8 [N, S, S, 3] -> float32 [N, K], a megapixel at a time.

    `between` is called before each. The graph is made once and follows the model's weights.
    """
    size = model.input_shape[1]

    @tf.function(input_signature=[tf.TensorSpec([None, size, size, 3], tf.uint8)], autograph=False)
    def run(images: tf.Tensor) -> tf.Tensor:
        return model(tf.cast(images, tf.float32), training=False)

    def predict(images: np.ndarray, between: Callable[[], None] = lambda: None) -> np.ndarray:
        batch, found = max(1, MEGAPIXEL // size**2), []
        for at in range(0, len(images), batch):
            between()
            found.append(run(images[at:at + batch]).numpy())
        return np.concatenate(found)

    return predict


def confusion(found: np.ndarray, truth: np.ndarray, classes: int) -> tuple[list[list[int]], list[float | None]]:
    """The confusion matrix' cells that are not 0, [true class, found one, images], and each class's recall.

    Inputs int [N]; of thousands of classes the matrix has millions of cells, and at most N with an image.
    """
    pairs, images = np.unique(truth.astype(np.int64) * classes + found, return_counts=True)
    cells = np.stack([pairs // classes, pairs % classes, images], 1).tolist()
    of = np.bincount(truth, minlength=classes)
    right = np.bincount(truth[found == truth], minlength=classes)
    return cells, [float(r / n) if n else None for r, n in zip(right, of, strict=True)]
