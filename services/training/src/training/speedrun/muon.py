"""Muon: momentum whose matrices are made nearly orthogonal before each step.

Keras' own Muon does so for matrices alone and gives convolutions AdamW. Here the kernels of all convolutions lie in one
tensor [L, R, C], each as the matrix [height * width * inputs, outputs] in its upper left corner, zeros around it: one
batch of products instead of one a layer. Zeros stay zeros.
"""

import tensorflow as tf

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of x, x^3, x^5: the steepest at 0 that keeps singular values near 1
STEPS = 3
EPSILON = 1e-7


def orthogonal(matrices: tf.Tensor, dtype: tf.DType = tf.bfloat16) -> tf.Tensor:
    """[L, R, C], R >= C -> `dtype` [L, R, C]: the same singular vectors, singular values near 1 (about 0.5 to 1.5).

    A quintic Newton-Schulz iteration, computed in `dtype` with sums in float32.
    """
    a, b, c = COEFFICIENTS
    x = tf.cast(matrices / (norms(matrices) + EPSILON), dtype)
    for _ in range(STEPS):
        square = tf.matmul(x, x, transpose_a=True)
        x = a * x + tf.matmul(x, b * square + c * tf.matmul(square, square))
    return x


def norms(matrices: tf.Tensor) -> tf.Tensor:
    """Frobenius norms of [L, R, C]: [L, 1, 1]."""
    return tf.sqrt(tf.reduce_sum(tf.square(matrices), [1, 2], keepdims=True))


def step(filters: tf.Tensor, gradients: tf.Tensor, momenta: tf.Tensor, outputs: tf.Tensor, rate: tf.Tensor,
         momentum: float, dtype: tf.DType) -> tuple[tf.Tensor, tf.Tensor]:
    """The filters and momenta, float32 [L, R, C], after one step of size `rate`.

    Filters are first scaled to the norm sqrt(outputs), float32 [L, 1, 1]: with normalisation behind each convolution
    their length has no effect but on how far a step turns them. `dtype`: what the iteration is computed in.
    """
    momenta = momentum * momenta + gradients
    update = orthogonal(gradients + momentum * momenta, dtype)
    filters = filters * (tf.sqrt(outputs) / norms(filters))
    return filters - rate * tf.cast(update, tf.float32), momenta
