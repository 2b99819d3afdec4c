"""The first layer's kernel: makes the patches of the training images uncorrelated, and is never trained."""

import numpy as np
import tensorflow as tf

EPSILON = 5e-4  # added to variances: directions with less of it are noise, not to be blown up
IMAGES = 5000
ELEMENTS = 6e7  # at most so many numbers of patches are looked at


def whitening(images: tf.Tensor, mean: tuple[float, ...], std: tuple[float, ...], kernel: int, stride: int,
              directions: int) -> np.ndarray:
    """float32 [kernel, kernel, 3, 2 * directions] for images uint8 [N, S, S, 3], mean and std per channel of them.

    The principal directions of their patches, those of most variance first, each divided by its standard deviation, and
    then the same negated. Reads the first 5,000 images, of large ones fewer.
    """
    places = (images.shape[1] - kernel) // stride + 1
    enough = max(1, min(IMAGES, int(ELEMENTS / (places**2 * kernel**2 * 3))))
    some = (tf.cast(images[:enough], tf.float32) - mean) / std
    variances, vectors = np.linalg.eigh(_covariance(some, kernel, stride).numpy())
    variances, vectors = variances[::-1][:directions], vectors[:, ::-1][:, :directions]
    half = (vectors / np.sqrt(np.maximum(variances, 0) + EPSILON)).reshape(kernel, kernel, 3, -1)
    return np.concatenate([half, -half], 3).astype(np.float32)


@tf.function(autograph=False)
def _covariance(images: tf.Tensor, kernel: int, stride: int) -> tf.Tensor:
    """float64 [D, D], D = kernel * kernel * 3: the mean of the products, without taking off the patches' mean."""
    patches = tf.image.extract_patches(images, [1, kernel, kernel, 1], [1, stride, stride, 1], [1, 1, 1, 1], "VALID")
    patches = tf.cast(tf.reshape(patches, [-1, kernel * kernel * 3]), tf.float64)
    return tf.matmul(patches, patches, transpose_a=True) / tf.cast(tf.shape(patches)[0], tf.float64)
