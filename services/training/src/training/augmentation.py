"""Augmentation inside the training graph, a batch at a time, with the option names of Keras' ImageDataGenerator.

Pixels from outside the image take the nearest edge's, as there by default. Draws are stateless: the same seeds give the
same batch, whichever step a training was resumed at. `views` is none of it: it asks for another figure in the end.
"""

import math
from typing import Any

import tensorflow as tf

Draws = dict[str, tf.Tensor]


def pixels(value: float, size: int) -> float:
    """What an option says, in pixels: below 1 it is a fraction of the side."""
    return value * size if value < 1 else value


def draw(options: dict[str, Any], size: int, count: int, seed: tf.Tensor) -> Draws:
    """What happens to each of `count` images of `size` pixels a side; `seed` is int32 [2].

    flip bool [N]; shift float32 [N, 2], rows and columns in pixels; angle float32 [N], radians; zoom float32 [N, 2];
    hole int32 [N, 2], the centre of the square to blank. Shifts are whole pixels when nothing else needs interpolation.
    """
    # Bits, because from these alone TensorFlow makes the same numbers with XLA and without.
    bits = tf.random.stateless_uniform([count, 8], seed, None, None, tf.int32)
    drawn = tf.cast(tf.bitwise.bitwise_and(bits, 2**24 - 1), tf.float32) / 2**24  # 0 to below 1

    def between(low: float, high: float, column: int, columns: int = 1) -> tf.Tensor:
        return low + drawn[:, column:column + columns] * (high - low)

    down, right = (pixels(options.get(name, 0), size) for name in ("height_shift_range", "width_shift_range"))
    shift = tf.concat([between(-down, down, 0), between(-right, right, 1)], 1)
    zoom = options.get("zoom_range", 0)
    low, high = zoom if isinstance(zoom, (list, tuple)) else (1 - zoom, 1 + zoom)
    angle = math.radians(options.get("rotation_range", 0))
    return {
        "flip": drawn[:, 2] < (0.5 if options.get("horizontal_flip") else 0.0),
        "shift": shift if interpolates(options) else tf.round(shift),
        "angle": between(-angle, angle, 3)[:, 0],
        "zoom": between(low, high, 4, 2),
        "hole": tf.cast(between(0, size, 6, 2), tf.int32),
    }


def interpolates(options: dict[str, Any]) -> bool:
    """Whether pixels fall between pixels: then an image is sampled, else only moved."""
    return bool(options.get("rotation_range")) or bool(options.get("zoom_range"))


def apply(images: tf.Tensor, options: dict[str, Any], draws: Draws, blank: tuple[float, float, float],
          xla: bool = False) -> tf.Tensor:
    """uint8 [N, S, S, 3] -> float32 [N, S, S, 3], 0..255, augmented as drawn; `blank` is the colour of a cutout.

    `xla`: by operations that XLA compiles. On a CPU, without XLA, they take twice the time of TensorFlow's own kernel.
    """
    if interpolates(options):
        images = _gathered(images, _transforms(draws)) if xla else _sampled(images, _transforms(draws))
    elif any(options.get(name) for name in ("horizontal_flip", "width_shift_range", "height_shift_range")):
        images = _shifted(images, draws)
    images = tf.cast(images, tf.float32)
    if options.get("cutout"):
        images = _blanked(images, draws["hole"], round(pixels(options["cutout"], images.shape[1])), blank)
    return images


def _shifted(images: tf.Tensor, draws: Draws) -> tf.Tensor:
    """Whole-pixel shifts and flips: two gathers, no interpolation."""
    size = images.shape[1]
    shift = tf.cast(draws["shift"], tf.int32)
    across = tf.range(size)
    columns = tf.where(draws["flip"][:, None], across[::-1], across) + shift[:, 1:]
    images = tf.gather(images, tf.clip_by_value(across + shift[:, :1], 0, size - 1), axis=1, batch_dims=1)
    return tf.gather(images, tf.clip_by_value(columns, 0, size - 1), axis=2, batch_dims=1)


def _transforms(draws: Draws) -> tuple[tf.Tensor, tf.Tensor]:
    """Where an output pixel is read from: its row and its column, each float32 [3, N].

    Factors of the output's row and column, and an offset, all from the centre: p reads R (Z F p + t), as
    ImageDataGenerator does.
    """
    cos, sin = tf.cos(draws["angle"]), tf.sin(draws["angle"])
    down, right = tf.unstack(draws["shift"], axis=1)
    tall, wide = tf.unstack(draws["zoom"], axis=1)
    wide *= tf.where(draws["flip"], -1.0, 1.0)
    return (tf.stack([cos * tall, -sin * wide, cos * down - sin * right]),
            tf.stack([sin * tall, cos * wide, sin * down + cos * right]))


def _sampled(images: tf.Tensor, transforms: tuple[tf.Tensor, tf.Tensor]) -> tf.Tensor:
    """One bilinear sampling by TensorFlow's kernel, which XLA lacks."""
    rows, columns = transforms
    centre = images.shape[1] / 2 - 0.5
    none = tf.zeros_like(rows[0])
    matrix = tf.stack([columns[1], columns[0], columns[2] + centre * (1 - columns[0] - columns[1]),
                       rows[1], rows[0], rows[2] + centre * (1 - rows[0] - rows[1]), none, none], 1)
    return tf.raw_ops.ImageProjectiveTransformV3(
        images=tf.cast(images, tf.float32), transforms=matrix, output_shape=images.shape[1:3], fill_value=0.0,
        interpolation="BILINEAR", fill_mode="NEAREST")


def _gathered(images: tf.Tensor, transforms: tuple[tf.Tensor, tf.Tensor]) -> tf.Tensor:
    """The same sampling as four gathers of bytes and their weighted mean, which XLA makes one kernel of."""
    size = images.shape[1]
    across = tf.range(size, dtype=tf.float32) - (size / 2 - 0.5)
    flat = tf.reshape(images, [-1, size * size, 3])

    def source(factors: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """The pixel before, the pixel behind, int32 [N, S, S], and how far it is from the one to the other."""
        of_row, of_column, offset = tf.unstack(factors[..., None, None])
        place = of_row * across[:, None] + of_column * across + offset + (size / 2 - 0.5)
        place = tf.clip_by_value(place, 0.0, size - 1.0)
        before = tf.cast(place, tf.int32)
        return before, tf.minimum(before + 1, size - 1), (place - tf.cast(before, tf.float32))[..., None]

    top, bottom, down = source(transforms[0])
    left, right, along = source(transforms[1])

    def row(at: tf.Tensor) -> tf.Tensor:
        one, other = (tf.cast(tf.gather(flat, at * size + x, batch_dims=1), tf.float32) for x in (left, right))
        return one + along * (other - one)

    upper, lower = row(top), row(bottom)
    return upper + down * (lower - upper)


def _blanked(images: tf.Tensor, hole: tf.Tensor, side: int, blank: tuple[float, float, float]) -> tf.Tensor:
    across = tf.range(images.shape[1]) + side // 2
    inside = (across >= hole[:, :, None]) & (across < hole[:, :, None] + side)  # [N, rows and columns, S]
    return tf.where((inside[:, 0, :, None] & inside[:, 1, None, :])[..., None], tf.constant(blank, tf.float32), images)
