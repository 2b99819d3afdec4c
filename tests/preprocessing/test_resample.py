"""The resize for many images gives the pixels of the one for a single image."""

import numpy as np
import pytest

from preprocessing import resample as module
from preprocessing.resample import resample
from shared.images import resize

SIZES = [(32, 32, 64), (33, 47, 32), (500, 375, 224), (375, 500, 96), (48, 48, 47), (224, 224, 224), (1, 300, 32),
         (257, 31, 33), (1000, 40, 224), (40, 300, 32), (20, 40, 32), (36, 40, 32), (36, 41, 32), (300, 32, 32),
         (32, 300, 32), (32, 32, 32), (1, 1, 32), (5000, 3, 32)]


def made(n: int, width: int, height: int) -> np.ndarray:
    images = np.random.default_rng(width * height).integers(0, 256, (n, height, width, 3), dtype=np.uint8)
    images[0] = np.where(images[0] > 127, 255, 0)  # the extremes, where rounding could pass 255
    images[-1] = 255
    return images


@pytest.mark.parametrize(("width", "height", "size"), SIZES)
def test_every_pixel_is_that_of_a_single_image(width: int, height: int, size: int) -> None:
    images = made(3, width, height)
    expected = np.stack([resize(image, size) for image in images])
    assert np.array_equal(resample(np, images, size), expected)


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    images = made(7, 40, 30)
    whole = resample(np, images, 32)
    monkeypatch.setattr(module, "CHUNK_VALUES", 2 * 40 * 30 * 3)
    assert np.array_equal(resample(np, images, 32), whole)
