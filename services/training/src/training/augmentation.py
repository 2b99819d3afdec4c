"""Augmentation inside the training graph, a batch at a time, with the option names of Keras' ImageDataGenerator.

Pixels from outside the image take the nearest edge's, as there by default. Draws are stateless: the same seeds give the
same batch, whichever step a training was resumed at.
"""

import math
from typing import Any

import tensorflow as tf

from shared.errors import Refused

OPTIONS = {
    "horizontal_flip": "true or false",
    "width_shift_range": "a fraction of the width below 1, or pixels",
    "height_shift_range": "a fraction of the height below 1, or pixels",
    "rotation_range": "degrees, 0 to 180",
    "zoom_range": "a number from 0 to below 1, or [lowest, highest] above 0",
    "cutout": "side of a square to blank, a fraction of the side below 1, or pixels",
}
Draws = dict[str, tf.Tensor]


def check(options: dict[str, Any], size: int) -> None:
    """Raises Refused for an option that is unknown or has a value it can't take at `size` pixels a side."""
    for name, value in options.items():
        if name not in OPTIONS:
            raise Refused(f"augmentation has no option {name!r}: expected some of {', '.join(OPTIONS)}",
                          "bad_augmentation")
        if not _valid(name, value, size):
            raise Refused(f"augmentation {name} is {value!r}: expected {OPTIONS[name]}", "bad_augmentation")


def _valid(name: str, value: Any, size: int) -> bool:
    if name == "horizontal_flip":
        return isinstance(value, bool)
    if name == "zoom_range" and isinstance(value, (list, tuple)):
        return len(value) == 2 and all(_number(v) for v in value) and 0 < value[0] <= value[1] <= 10
    if not _number(value) or value < 0:
        return False
    return bool(value <= {"rotation_range": 180, "zoom_range": 0.99}.get(name, size))


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _pixels(value: float, size: int) -> float:
    return value * size if value < 1 else value


def draw(options: dict[str, Any], size: int, count: int, seed: tf.Tensor) -> Draws:
    """What happens to each of `count` images of `size` pixels a side; `seed` is int32 [2].

    flip bool [N]; shift float32 [N, 2], rows and columns in pixels; angle float32 [N], radians; zoom float32 [N, 2];
    hole int32 [N, 2], the centre of the square to blank. Shifts are whole pixels when nothing else needs interpolation.
    """
    seeds = tf.random.experimental.stateless_split(seed, 6)

    def uniform(stream: int, low: float, high: float, columns: int) -> tf.Tensor:
        return tf.random.stateless_uniform([count, columns], seeds[stream], low, high)

    down, right = (_pixels(options.get(name, 0), size) for name in ("height_shift_range", "width_shift_range"))
    shift = tf.concat([uniform(0, -down, down, 1), uniform(1, -right, right, 1)], 1)
    zoom = options.get("zoom_range", 0)
    low, high = zoom if isinstance(zoom, (list, tuple)) else (1 - zoom, 1 + zoom)
    angle = math.radians(options.get("rotation_range", 0))
    return {
        "flip": uniform(2, 0, 1, 1)[:, 0] < (0.5 if options.get("horizontal_flip") else 0.0),
        "shift": shift if interpolates(options) else tf.round(shift),
        "angle": uniform(3, -angle, angle, 1)[:, 0],
        "zoom": uniform(4, low, high, 2),
        "hole": tf.cast(uniform(5, 0, size, 2), tf.int32),
    }


def interpolates(options: dict[str, Any]) -> bool:
    """Whether pixels fall between pixels: then an image is sampled, else only moved."""
    return bool(options.get("rotation_range")) or bool(options.get("zoom_range"))


def apply(images: tf.Tensor, options: dict[str, Any], draws: Draws, blank: tuple[float, float, float]) -> tf.Tensor:
    """uint8 [N, S, S, 3] -> float32 [N, S, S, 3], 0..255, augmented as drawn; `blank` is the colour of a cutout."""
    if interpolates(options):
        images = _affine(tf.cast(images, tf.float32), draws)
    elif any(options.get(name) for name in ("horizontal_flip", "width_shift_range", "height_shift_range")):
        images = _shifted(images, draws)
    images = tf.cast(images, tf.float32)
    if options.get("cutout"):
        images = _blanked(images, draws["hole"], round(_pixels(options["cutout"], images.shape[1])), blank)
    return images


def _shifted(images: tf.Tensor, draws: Draws) -> tf.Tensor:
    """Whole-pixel shifts and flips: two gathers, no interpolation."""
    size = images.shape[1]
    shift = tf.cast(draws["shift"], tf.int32)
    across = tf.range(size)
    columns = tf.where(draws["flip"][:, None], across[::-1], across) + shift[:, 1:]
    images = tf.gather(images, tf.clip_by_value(across + shift[:, :1], 0, size - 1), axis=1, batch_dims=1)
    return tf.gather(images, tf.clip_by_value(columns, 0, size - 1), axis=2, batch_dims=1)


def _affine(images: tf.Tensor, draws: Draws) -> tf.Tensor:
    """One bilinear sampling: output pixel p reads R (Z F (p - o) + t) + o, o the centre, as ImageDataGenerator does."""
    centre = images.shape[1] / 2 - 0.5
    cos, sin = tf.cos(draws["angle"]), tf.sin(draws["angle"])
    down, right = tf.unstack(draws["shift"], axis=1)
    tall, wide = tf.unstack(draws["zoom"], axis=1)
    wide *= tf.where(draws["flip"], -1.0, 1.0)
    rows = (cos * tall, -sin * wide, cos * down - sin * right)  # factors of the row and the column, offset
    columns = (sin * tall, cos * wide, sin * down + cos * right)
    none = tf.zeros_like(cos)
    transforms = tf.stack([columns[1], columns[0], columns[2] + centre * (1 - columns[0] - columns[1]),
                           rows[1], rows[0], rows[2] + centre * (1 - rows[0] - rows[1]), none, none], 1)
    return tf.raw_ops.ImageProjectiveTransformV3(
        images=images, transforms=transforms, output_shape=images.shape[1:3], fill_value=0.0,
        interpolation="BILINEAR", fill_mode="NEAREST")


def _blanked(images: tf.Tensor, hole: tf.Tensor, side: int, blank: tuple[float, float, float]) -> tf.Tensor:
    across = tf.range(images.shape[1]) + side // 2
    inside = (across >= hole[:, :, None]) & (across < hole[:, :, None] + side)  # [N, rows and columns, S]
    return tf.where((inside[:, 0, :, None] & inside[:, 1, None, :])[..., None], tf.constant(blank, tf.float32), images)
