"""The network of `speedrun` as ordinary Keras layers: what is published."""

import keras
import numpy as np
from keras import layers

from training.speedrun.network import EPSILON, WIDTHS, Layout, Statistics, Weights, kernels


def features(x: keras.KerasTensor, layout: Layout) -> keras.KerasTensor:
    """Normalised images [N, S, S, 3] -> [N, 256], from which `logits` is a dense layer.

    Normalisation stands before the pool, where exporters fold it into the convolution: its factor is positive, so the
    largest stays the largest.
    """
    x = layers.Conv2D(2 * layout.directions, layout.kernel, strides=layout.stride, name="whitening")(x)
    x = layers.Activation("silu")(x)
    for n, (_, outputs) in enumerate(layout.convolutions):
        x = layers.Conv2D(outputs, 3, padding="same", use_bias=False, name=f"conv_{n}")(x)
        x = layers.BatchNormalization(scale=False, epsilon=EPSILON, name=f"norm_{n}")(x)
        if n % 2 == 0:
            x = layers.MaxPooling2D()(x)
        x = layers.Activation("silu")(x)
    return layers.Flatten()(layers.MaxPooling2D(x.shape[1])(x))


def fill(model: keras.Model, layout: Layout, weights: Weights, whitening: np.ndarray, running: Statistics) -> None:
    """Give the layers of `model`, those of `features` and `logits`, these weights, as NumPy arrays."""
    ends = np.cumsum([o for _, o in layout.convolutions])[:-1]
    biases, means, variances = (np.split(a, ends) for a in (weights.biases, *running))
    model.get_layer("whitening").set_weights([whitening, weights.whitening_bias])
    for n, kernel in enumerate(kernels(layout, weights.filters)):
        model.get_layer(f"conv_{n}").set_weights([np.asarray(kernel)])
        model.get_layer(f"norm_{n}").set_weights([biases[n], means[n], variances[n]])
    model.get_layer("logits").set_weights([weights.head / WIDTHS[-1], np.zeros(layout.classes, np.float32)])
