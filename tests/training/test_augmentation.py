"""The graph's augmentation against a plain NumPy loop over pixels, and what its draws may be."""

import numpy as np
import pytest
import tensorflow as tf

from shared.augmentation import check_augmentation
from shared.errors import Refused
from training import augmentation

SIZE = 16
BLANK = (1.0, 2.0, 3.0)
IMAGES = np.random.default_rng(0).integers(0, 256, (6, SIZE, SIZE, 3), dtype=np.uint8)


def reference(image: np.ndarray, options: dict, flip: bool, shift: np.ndarray, angle: float, zoom: np.ndarray,
              hole: np.ndarray) -> np.ndarray:
    """ImageDataGenerator's geometry, a pixel at a time: zoom, shift, rotate about the centre, flip; nearest edges."""
    size = len(image)
    centre = size / 2 - 0.5
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    moved = np.zeros((size, size, 3))
    for row in range(size):
        for column in range(size):
            y, x = rotation @ (zoom * (np.array([row, column]) - centre) + shift) + centre
            top, left = int(np.floor(y)), int(np.floor(x))
            for i, weight_y in ((top, top + 1 - y), (top + 1, y - top)):
                for j, weight_x in ((left, left + 1 - x), (left + 1, x - left)):
                    pixel = image[min(max(i, 0), size - 1), min(max(j, 0), size - 1)]
                    moved[row, column] += weight_y * weight_x * pixel
    if flip:
        moved = moved[:, ::-1]
    if "cutout" in options:
        side = options["cutout"]
        top, left = hole - side // 2
        moved[max(top, 0):max(top + side, 0), max(left, 0):max(left + side, 0)] = BLANK
    return moved


@pytest.mark.parametrize("options", [
    {},
    {"horizontal_flip": True},
    {"width_shift_range": 3, "height_shift_range": 0.25, "horizontal_flip": True},
    {"cutout": 5},
    {"rotation_range": 40},
    {"zoom_range": 0.3},
    {"zoom_range": [0.5, 0.8], "horizontal_flip": True},
    {"rotation_range": 25, "width_shift_range": 0.2, "height_shift_range": 2, "zoom_range": 0.2,
     "horizontal_flip": True, "cutout": 6},
], ids=lambda options: "+".join(options) or "none")
def test_a_batch_comes_out_as_the_reference_makes_it(options: dict) -> None:
    draws = augmentation.draw(options, SIZE, len(IMAGES), tf.constant([1, 2]))
    got = augmentation.apply(tf.constant(IMAGES), options, draws, BLANK).numpy()
    plain = {name: value.numpy() for name, value in draws.items()}
    expected = [reference(image, options, **{n: v[i] for n, v in plain.items()}) for i, image in enumerate(IMAGES)]
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected, atol=0.05)


@pytest.mark.parametrize("options", [
    {"rotation_range": 15, "width_shift_range": 0.1, "height_shift_range": 0.1, "horizontal_flip": True},
    {"rotation_range": 180, "zoom_range": 0.9, "width_shift_range": 0.5},
], ids=["seed-cnn", "far over the edges"])
@pytest.mark.parametrize("size", [31, 32])
def test_what_xla_compiles_samples_as_tensorflow_s_kernel_does(options: dict, size: int) -> None:
    images = tf.constant(np.random.default_rng(1).integers(0, 256, (64, size, size, 3), dtype=np.uint8))
    draws = augmentation.draw(options, size, len(images), tf.constant([3, 4]))

    @tf.function(jit_compile=True)
    def compiled() -> tf.Tensor:
        return augmentation.apply(images, options, draws, BLANK, xla=True)

    kernel = augmentation.apply(images, options, draws, BLANK).numpy()
    assert kernel.std() > 20
    np.testing.assert_allclose(compiled().numpy(), kernel, atol=0.02)


def test_draws_depend_on_the_seed_alone_and_fill_their_ranges() -> None:
    options = {"width_shift_range": 4, "height_shift_range": 2, "horizontal_flip": True}
    first, again, other = (augmentation.draw(options, 32, 1000, tf.constant(s)) for s in ([3, 5], [3, 5], [3, 6]))
    for name in first:
        assert np.array_equal(first[name], again[name])
    assert not np.array_equal(first["shift"], other["shift"])
    assert set(first["shift"][:, 0].numpy()) == {-2, -1, 0, 1, 2}
    assert set(first["shift"][:, 1].numpy()) == {-4, -3, -2, -1, 0, 1, 2, 3, 4}
    assert 400 < first["flip"].numpy().sum() < 600


@pytest.mark.parametrize("options", [
    {"vertical_flip": True}, {"horizontal_flip": 1}, {"width_shift_range": -1}, {"height_shift_range": 33},
    {"rotation_range": 181}, {"rotation_range": "15"}, {"zoom_range": 1}, {"zoom_range": [0, 1]},
    {"zoom_range": [1.2, 0.8]}, {"cutout": True}, {"cutout": float("nan")}, {"width_shift_range": None},
], ids=str)
def test_an_option_that_can_not_work_is_refused(options: dict) -> None:
    with pytest.raises(Refused, match=next(iter(options))):
        check_augmentation(options, 32)
