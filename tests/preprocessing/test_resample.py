"""The resize for many images gives Pillow's pixels."""

import numpy as np
import pytest
from PIL import Image

from preprocessing import resample as module
from preprocessing.resample import resample

SIZES = [(32, 32, 64), (33, 47, 32), (500, 375, 224), (375, 500, 96), (48, 48, 47), (224, 224, 224), (1, 300, 32),
         (257, 31, 33),
         (1000, 40, 224), (40, 300, 32), (20, 40, 32), (36, 40, 32), (36, 41, 32), (300, 32, 32), (32, 32, 32)]


def made(n: int, width: int, height: int) -> np.ndarray:
    images = np.random.default_rng(width * height).integers(0, 256, (n, height, width, 3), dtype=np.uint8)
    images[0] = np.where(images[0] > 127, 255, 0)  # the extremes, where rounding could pass 255
    images[-1] = 255
    return images


@pytest.mark.parametrize(("average", "by"), [(False, Image.Resampling.BILINEAR), (True, Image.Resampling.BOX)])
@pytest.mark.parametrize(("width", "height", "size"), SIZES)
def test_every_pixel_is_pillow_s(width: int, height: int, size: int, average: bool, by: Image.Resampling) -> None:
    images = made(3, width, height)
    expected = np.stack([np.asarray(Image.fromarray(image).resize((size, size), by)) for image in images])
    assert np.array_equal(resample(np, images, size, average), expected)


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    images = made(7, 40, 30)
    whole = resample(np, images, 32)
    monkeypatch.setattr(module, "CHUNK_VALUES", 2 * 40 * 30 * 3)
    assert np.array_equal(resample(np, images, 32), whole)
