"""The network of `speedrun`: a whitening layer, three groups of two convolutions, the largest of each map, a head.

    image -> whitening -> SiLU -> 3 x [conv -> pool -> norm -> SiLU -> conv -> norm -> SiLU] -> max over the map -> head

Its weights are a few large tensors and its normalisation is written out, so that a step is few kernels. twin.py has the
same network as ordinary Keras layers. SiLU because exact GELU has no ONNX operation.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from shared.datasets import Spec
from shared.errors import Refused

WIDTHS = (64, 256, 256)
MOST_DIRECTIONS = 24
SMALLEST = 32
EPSILON = 1e-5  # added to a channel's variance


class Weights(NamedTuple):
    """float32. filters [6, R, C]: each kernel [3, 3, I, O] as [9 I, O] in the upper left corner, zeros around it."""

    filters: tf.Tensor
    whitening_bias: tf.Tensor  # [F]
    biases: tf.Tensor  # of the normalisations, one after another [sum of O]
    head: tf.Tensor  # [O, K]


class Statistics(NamedTuple):
    """Of the normalisations, one after another: float32 [sum of O]."""

    means: tf.Tensor
    variances: tf.Tensor


@dataclass(frozen=True)
class Layout:
    """What the sizes of a network follow from.

    Larger images have a larger and sparser first layer, so that its map has 31 to 62 places a side and the rest is the
    same whatever the images' size.
    """

    size: int
    classes: int

    @classmethod
    def of(cls, spec: Spec) -> "Layout":
        """Raises Refused for images that are too small."""
        if spec.size < SMALLEST:
            raise Refused(f"recipe speedrun needs images of at least {SMALLEST} pixels a side and this dataset's have "
                          f"{spec.size}: prepare it with size={SMALLEST}, or take another recipe", "too_small")
        return cls(spec.size, len(spec.labels))

    @property
    def stride(self) -> int:
        return self.size // SMALLEST

    @property
    def kernel(self) -> int:
        return 2 * self.stride

    @property
    def places(self) -> int:
        """Side of the first layer's map."""
        return (self.size - self.kernel) // self.stride + 1

    @property
    def directions(self) -> int:
        return min(3 * self.kernel**2, MOST_DIRECTIONS)

    @property
    def convolutions(self) -> list[tuple[int, int]]:
        """Inputs and outputs of each 3 x 3 convolution; every other one, from the first, is followed by a pool."""
        before = [2 * self.directions, *WIDTHS]
        return [pair for i, o in zip(before, WIDTHS, strict=False) for pair in ((i, o), (o, o))]

    @property
    def matrices(self) -> tuple[int, int]:
        """Rows and columns that every filter fits into."""
        return 9 * max(i for i, _ in self.convolutions), max(WIDTHS)


def initial(layout: Layout, rng: np.random.Generator) -> tuple[Weights, Statistics]:
    """New weights, as NumPy arrays.

    A convolution's first outputs hand its inputs on (Dirac), the others are uniform, as PyTorch's; the head has
    standard deviation 1.
    """
    rows, columns = layout.matrices
    filters = np.zeros((len(layout.convolutions), rows, columns), np.float32)
    for n, (i, o) in enumerate(layout.convolutions):
        kernel = rng.uniform(-1, 1, (3, 3, i, o)) / np.sqrt(9 * i)
        kernel[..., :min(i, o)] = 0
        kernel[1, 1, range(min(i, o)), range(min(i, o))] = 1
        filters[n, :9 * i, :o] = kernel.reshape(9 * i, o)
    head = rng.uniform(-1, 1, (WIDTHS[-1], layout.classes))
    channels = sum(o for _, o in layout.convolutions)
    weights = Weights(filters, np.zeros(2 * layout.directions, np.float32), np.zeros(channels, np.float32),
                      (head / head.std()).astype(np.float32))
    return weights, Statistics(np.zeros(channels, np.float32), np.ones(channels, np.float32))


def kernels(layout: Layout, filters: tf.Tensor) -> list[tf.Tensor]:
    """[3, 3, I, O] of each convolution."""
    return [tf.reshape(filters[n, :9 * i, :o], [3, 3, i, o]) for n, (i, o) in enumerate(layout.convolutions)]


def forward(layout: Layout, weights: Weights, whitening: tf.Tensor, images: tf.Tensor,
            running: Statistics | None = None) -> tuple[tf.Tensor, Statistics]:
    """float16 or float32 [B, S, S, 3], normalised -> logits float32 [B, K], and the statistics it normalised by.

    These are the batch's, or `running` where given. Computes in the images' dtype, normalisation in float32.
    """
    dtype = images.dtype
    x = whitened(images, tf.cast(whitening, dtype), layout.stride)
    x = tf.nn.silu(x + tf.cast(weights.whitening_bias, dtype))
    sizes = [o for _, o in layout.convolutions]
    given = zip(*(tf.split(s, sizes) for s in running), strict=True) if running else [None] * len(sizes)
    found = []
    for n, (kernel, bias, known) in enumerate(zip(kernels(layout, tf.cast(weights.filters, dtype)),
                                                  tf.split(weights.biases, sizes), given, strict=True)):
        x = pooled(convolved_evenly(x, kernel)) if n % 2 == 0 else tf.nn.conv2d(x, kernel, 1, "SAME")
        x, statistics = normed(x, bias, known)
        x = tf.nn.silu(x)
        found.append(statistics)
    logits = tf.matmul(tf.reduce_max(x, [1, 2]), tf.cast(weights.head, dtype))
    means, variances = zip(*found, strict=True)
    return tf.cast(logits, tf.float32) / WIDTHS[-1], Statistics(tf.concat(means, 0), tf.concat(variances, 0))


def whitened(images: tf.Tensor, kernel: tf.Tensor, stride: int) -> tf.Tensor:
    return tf.nn.conv2d(images, kernel, stride, "VALID")


def convolved_evenly(x: tf.Tensor, kernel: tf.Tensor) -> tf.Tensor:
    """A 3 x 3 convolution of the same size, without the last row and column of an odd map: no pool reads them."""
    odd = x.shape[1] % 2
    if not odd:
        return tf.nn.conv2d(x, kernel, 1, "SAME")
    return tf.nn.conv2d(tf.pad(x, [[0, 0], [1, 0], [1, 0], [0, 0]]), kernel, 1, "VALID")


def pooled(x: tf.Tensor) -> tf.Tensor:
    """The largest of each 2 x 2, [B, 2 h, 2 w, C] -> [B, h, w, C].

    By reshaping: XLA makes the gradient of a max-pool a scatter, and of this a comparison.
    """
    _, tall, wide, channels = x.shape
    return tf.reduce_max(tf.reshape(x, [-1, tall // 2, 2, wide // 2, 2, channels]), [2, 4])


def normed(x: tf.Tensor, bias: tf.Tensor,
           known: Sequence[tf.Tensor] | None) -> tuple[tf.Tensor, tuple[tf.Tensor, tf.Tensor]]:
    """Mean 0 and variance 1 per channel, and the bias; sums in float32, both in one pass over x."""
    wide = tf.cast(x, tf.float32)
    if known is None:
        mean = tf.reduce_mean(wide, [0, 1, 2])
        variance = tf.maximum(tf.reduce_mean(tf.square(wide), [0, 1, 2]) - tf.square(mean), 0.0)
    else:
        mean, variance = known
    scale = tf.math.rsqrt(variance + EPSILON)
    return tf.cast(wide * scale + (bias - mean * scale), x.dtype), (mean, variance)
