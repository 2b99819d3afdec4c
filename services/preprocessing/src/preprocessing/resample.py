"""Antialiased resize of many images of one size, to the bit what Pillow gives, on NumPy or CuPy.

Pillow (libImaging/Resample.c, as of 13.0) resizes 8-bit images in two passes with weights of 22 fractional bits,
rounding to uint8 in between. Its sums stay under 2^31, so a float64 matrix product holds them exactly in whatever order
a BLAS adds; every device gives Pillow's pixels.
"""

import math
from types import ModuleType
from typing import Any

import numpy as np

BITS = 22  # Pillow's PRECISION_BITS, 32 - 8 - 2
CHUNK_VALUES = 64 << 20  # source values at once; as float64 they take eight times the bytes


def resample(xp: ModuleType, images: Any, size: int, average: bool = False) -> Any:
    """uint8 [N, H, W, 3], of `xp` or of the host -> uint8 [N, size, size, 3] of `xp`, by BILINEAR, or BOX: the mean."""
    n, height, width = images.shape[:3]
    across, down = (xp.asarray(weights(side, size, average)) for side in (width, height))
    out = xp.empty((n, size, size, 3), xp.uint8)
    step = max(CHUNK_VALUES // (height * width * 3), 1)
    for first in range(0, n, step):
        planes = xp.asarray(images[first:first + step]).transpose(0, 3, 1, 2).reshape(-1, height, width)
        if height > size and height - size > (width - size) * 2:  # Pillow's rule: much taller ones go down first
            planes = _across(xp, _down(xp, planes, down), across)
        else:
            planes = _down(xp, _across(xp, planes, across), down)
        out[first:first + step] = planes.reshape(-1, 3, size, size).transpose(0, 2, 3, 1)
    return out


def _across(xp: ModuleType, planes: Any, table: Any) -> Any:
    count, height, width = planes.shape
    return _rounded(xp, planes.reshape(-1, width).astype(xp.float64) @ table.T).reshape(count, height, -1)


def _down(xp: ModuleType, planes: Any, table: Any) -> Any:
    return _rounded(xp, table @ planes.astype(xp.float64))


def _rounded(xp: ModuleType, sums: Any) -> Any:
    """Weighted sums -> uint8; weights of one pixel add up to 2^22 within some units, so 255 may be passed."""
    return xp.clip((sums.astype(xp.int64) + (1 << BITS - 1)) >> BITS, 0, 255).astype(xp.uint8)


def weights(before: int, after: int, average: bool) -> np.ndarray:
    """float64 [after, before], of whole numbers: the share of each source pixel in each result, times 2^22.

    The share under a box (Pillow's BOX, its average) or a triangle (BILINEAR), added up in Pillow's order, since that
    decides the last bit. A side that keeps its length keeps its pixels.
    """
    table = np.zeros((after, before))
    scale = before / after
    stretch = max(scale, 1.0)
    reach = stretch / 2 if average else stretch
    for i in range(after):
        centre = (i + 0.5) * scale
        first, last = max(int(centre - reach + 0.5), 0), min(int(centre + reach + 0.5), before)
        at = [(x - centre + 0.5) * (1.0 / stretch) for x in range(first, last)]
        shares = [float(-0.5 < x <= 0.5) if average else max(1.0 - abs(x), 0.0) for x in at]
        total = 0.0
        for share in shares:
            total += share
        table[i, first:last] = [math.floor(share / total * (1 << BITS) + 0.5) for share in shares]
    return table
