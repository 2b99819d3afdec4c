"""The network of the recipe `accurate`: wide, with a sum in each group, after airbench96 of cifar10-airbench.

Kept from there: three groups of three convolutions, the first before a pool, the other two beside a shortcut, and SiLU
in GELU's place. Left out, because a training of minutes does not need them: its whitening layer, Dirac kernels and
rates of their own for biases. Normalisation stands right behind each convolution, so that exporters fold it in.
"""

import keras
from keras import layers

from training.normalisation import Norm

STEM = 32
WIDTHS = (128, 512, 512)
LARGEST = 63  # side of the map that the groups begin with: the stem halves larger images until they are as small
MOMENTUM = 0.9  # of the statistics; the average of the weights is one of them too
SCALE = 0.125  # of the features: else the first answers are far too sure of themselves


def features(x: keras.KerasTensor, norm: Norm) -> keras.KerasTensor:
    """Normalised images [N, S, S, 3] -> [N, 512]. `norm` makes its layers of batch normalisation.

    Of 32 x 32 pixels 0.8 G multiply-adds an image, 12.7 M weights.
    """
    stride = 1 if x.shape[1] <= LARGEST else 2
    x = _convolved(x, STEM, norm, stride)
    while x.shape[1] > LARGEST:
        x = _convolved(x, 2 * STEM, norm, stride)
    for width in WIDTHS:
        x = layers.MaxPooling2D()(_convolved(x, width, norm, active=False))
        x = shortcut = layers.Activation("silu")(x)
        x = _convolved(x, width, norm)
        x = _convolved(x, width, norm, active=False)
        x = layers.Activation("silu")(layers.Add()([x, shortcut]))
    return layers.Rescaling(SCALE, name="scale")(layers.GlobalMaxPooling2D()(x))


def _convolved(x: keras.KerasTensor, width: int, norm: Norm, stride: int = 1,
               active: bool = True) -> keras.KerasTensor:
    x = layers.Conv2D(width, 3, strides=stride, padding="same", use_bias=False)(x)
    x = norm(momentum=MOMENTUM)(x)
    return layers.Activation("silu")(x) if active else x
