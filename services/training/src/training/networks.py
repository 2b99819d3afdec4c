"""The networks of the recipes: plain Keras layers that export to ONNX and LiteRT, raw RGB in, probabilities out."""

import functools

import keras
from keras import layers

from shared.datasets import Spec
from training import residual, transfer
from training.normalisation import FusedNormalization, Norm
from training.recipes import Recipe
from training.speedrun import twin
from training.speedrun.network import Layout

SMALLEST_STD = 1 / 255  # of a channel that never changes: one grey level
FUSIBLE = ("compact", "residual")  # networks whose batch normalisation can be of another make


def build(recipe: Recipe, spec: Spec, precision: str = "float32", replicas: int = 1,
          fused: bool = False) -> keras.Model:
    """A new network for a Dataset's spec.

    Input float32 [N, size, size, 3], RGB 0..255; output float32 [N, classes], probabilities. Normalisation by the
    spec's mean and std and the softmax are layers of it; `logits_of` gives what the loss is computed from.

    `precision` is what is computed in between, float32 or mixed_bfloat16; variables, normalisation and logits are
    float32 in any case. With several `replicas` batch normalisation takes its statistics over all of them; `fused`, it
    is one kernel, quick on a CPU, of one replica in float32. None of it changes what the weights are: those of one such
    network fit the others.
    """
    norm = FusedNormalization if fused else functools.partial(layers.BatchNormalization, synchronized=replicas > 1)
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(precision)
    try:
        return _build(recipe, spec, norm)
    finally:
        keras.config.set_dtype_policy(before)


def _build(recipe: Recipe, spec: Spec, norm: Norm) -> keras.Model:
    image = keras.Input((spec.size, spec.size, 3), name="image")
    x = (_as_imagenet() if recipe.network == "mobilenet-v2" else normalise(spec))(image)
    match recipe.network:
        case "plain":
            x = _plain(x, spec.size)
        case "compact":
            x = _compact(x, spec.size, norm)
        case "residual":
            x = residual.features(x, norm)
        case "speedrun":
            x = twin.features(x, Layout.of(spec))
        case "mobilenet-v2":
            x = transfer.features(x, spec.size)
        case other:
            raise ValueError(f"network {other!r} of recipe {recipe.name} is unknown: "
                             "expected plain, compact, residual, speedrun or mobilenet-v2")
    x = layers.Dense(len(spec.labels), dtype="float32", name="logits")(x)
    return keras.Model(image, layers.Softmax(dtype="float32", name="probabilities")(x), name=recipe.name)


def normalise(spec: Spec) -> layers.Layer:
    """Raw RGB, 0..255, to mean 0 and standard deviation 1 over the training split; float32."""
    std = [max(s, SMALLEST_STD) for s in spec.std]
    offset = [-m / s for m, s in zip(spec.mean, std, strict=True)]
    return layers.Rescaling(scale=[1 / (255 * s) for s in std], offset=offset, dtype="float32", name="normalise")


def _as_imagenet() -> layers.Layer:
    """Raw RGB, 0..255, to -1..1, in which MobileNetV2 has learnt; float32."""
    return layers.Rescaling(scale=[1 / 127.5] * 3, offset=[-1.0] * 3, dtype="float32", name="normalise")


def logits_of(model: keras.Model) -> keras.Model:
    """The same layers up to the logits: float32 [N, classes]."""
    return keras.Model(model.input, model.get_layer("logits").output)


def _plain(x: keras.KerasTensor, size: int) -> keras.KerasTensor:
    """Conv-Conv-pool blocks of 32, 64, 128, ... filters until the map is at most 8 x 8, then a hidden layer of 512."""
    width = 32
    while size > 8:
        for _ in range(2):
            x = layers.Conv2D(width, 3, padding="same", activation="relu")(x)
        x = layers.MaxPooling2D()(x)
        x = layers.Dropout(0.25)(x)
        width, size = min(2 * width, 128), size // 2
    x = layers.Dense(512, activation="relu")(layers.Flatten()(x))
    return layers.Dropout(0.5)(x)


def _compact(x: keras.KerasTensor, size: int, norm: Norm) -> keras.KerasTensor:
    """A strided stem, then Conv-pool stages, each of half the side and up to twice the filters, down to 2 x 2 or 3 x 3.

    Normalisation stands right behind each convolution, so that exporters fold it in.
    """
    stride = 2 if size < 64 else 4
    x = _normed(layers.Conv2D(32, 2 * stride, strides=stride, padding="same", use_bias=False)(x), norm)
    size, width = -(-size // stride), 32
    while size > 3:
        x = _normed(layers.Conv2D(width, 3, padding="same", use_bias=False)(x), norm)
        x = layers.MaxPooling2D()(x)
        width, size = min(2 * width, 128), size // 2
    return layers.Flatten()(x)


def _normed(x: keras.KerasTensor, norm: Norm) -> keras.KerasTensor:
    return layers.ReLU()(norm(momentum=0.8)(x))
