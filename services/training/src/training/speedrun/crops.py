"""Batches from images that stay on the device as bytes: shuffled, moved with reflected edges, mirrored, by two gathers.

An image is mirrored in every second epoch: which ones in the even epochs is drawn once, so that two epochs in a row
never show the same side.
"""

import tensorflow as tf

Draws = tuple[tf.Tensor, tf.Tensor, tf.Tensor]


def draw(count: int, reach: tuple[int, int], mirror: bool, seed: tf.Tensor, epoch: tf.Tensor) -> Draws:
    """What an epoch does with `count` images: their order int32 [N], shifts int32 [N, 2], mirrored or not bool [N].

    seed and epoch: int32 scalars. Shifts are rows and columns, from -reach to reach, of the image at the same index.
    """
    of_epoch = tf.stack([seed, epoch])
    # From bits alone TensorFlow makes the same numbers with XLA and without.
    bits = tf.random.stateless_uniform([count, 3], of_epoch, None, None, tf.int32)
    order = tf.argsort(bits[:, 0])
    positive = tf.bitwise.bitwise_and(bits[:, 1:], 2**31 - 1)
    shifts = positive % tf.constant([2 * r + 1 for r in reach]) - tf.constant(reach)
    if not mirror:
        return order, shifts, tf.zeros([count], tf.bool)
    sides = tf.random.stateless_uniform([count], tf.stack([seed, 2**31 - 1]), None, None, tf.int32)
    return order, shifts, tf.equal(tf.bitwise.bitwise_and(sides + epoch, 1), 1)


def take(images: tf.Tensor, rows: tf.Tensor, shifts: tf.Tensor, mirrored: tf.Tensor) -> tf.Tensor:
    """uint8 [N, S, S, 3] -> uint8 [B, S, S, 3]: the images at `rows` int32 [B], moved and then mirrored.

    shifts int32 [B, 2], less than S; mirrored bool [B]. The pixel (y, x) is the one at (y, x) + shift before; past an
    edge the image goes on as its reflection.
    """
    size = images.shape[1]
    across = tf.range(size)
    columns = tf.where(mirrored[:, None], across[::-1], across)
    down, right = _reflected(across + shifts[:, :1], size), _reflected(columns + shifts[:, 1:], size)
    return tf.gather(tf.gather(tf.gather(images, rows), down, axis=1, batch_dims=1), right, axis=2, batch_dims=1)


def shifted(images: tf.Tensor, down: int, right: int) -> tf.Tensor:
    """All images [N, S, S, 3] moved alike."""
    size = images.shape[1]
    across = tf.range(size)
    rows = tf.gather(images, _reflected(across + down, size), axis=1)
    return tf.gather(rows, _reflected(across + right, size), axis=2)


def _reflected(index: tf.Tensor, size: int) -> tf.Tensor:
    last = size - 1
    return last - tf.abs(last - tf.abs(index))
