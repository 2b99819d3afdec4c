"""Antialiased resize of many images of one size, to the bit what `shared.images.resize` gives, on NumPy or CuPy.

cykooz_resizer (Rust's fast_image_resize, as of 6.1) resizes 8-bit images in two passes, down and then across, with
weights of 16 bits, rounding to uint8 in between. Its sums stay under 2^30, so a float64 matrix product holds them
exactly in whatever order a BLAS adds; every device gives its pixels.
"""

import math
from types import ModuleType
from typing import Any

import numpy as np

MOST_BITS = 21  # of a weight's fraction, where the largest weight leaves room for as many
MOST = 1 << 15  # what a weight stays below
CHUNK_VALUES = 64 << 20  # source values at once; as float64 they take eight times the bytes


def resample(xp: ModuleType, images: Any, size: int) -> Any:
    """uint8 [N, H, W, 3], of `xp` or of the host -> uint8 [N, size, size, 3] of `xp`, bilinear."""
    n, height, width = images.shape[:3]
    down, across = ((xp.asarray(table), bits) for table, bits in (weights(height, size), weights(width, size)))
    out = xp.empty((n, size, size, 3), xp.uint8)
    step = max(CHUNK_VALUES // (height * width * 3), 1)
    for first in range(0, n, step):
        planes = xp.asarray(images[first:first + step]).transpose(0, 3, 1, 2).reshape(-1, height, width)
        planes = _across(xp, _down(xp, planes, *down), *across)
        out[first:first + step] = planes.reshape(-1, 3, size, size).transpose(0, 2, 3, 1)
    return out


def _down(xp: ModuleType, planes: Any, table: Any, bits: int) -> Any:
    return _rounded(xp, table @ planes.astype(xp.float64), bits)


def _across(xp: ModuleType, planes: Any, table: Any, bits: int) -> Any:
    count, height, width = planes.shape
    return _rounded(xp, planes.reshape(-1, width).astype(xp.float64) @ table.T, bits).reshape(count, height, -1)


def _rounded(xp: ModuleType, sums: Any, bits: int) -> Any:
    """Weighted sums -> uint8; the weights of a pixel add up to 2^bits within some units, so 255 may be passed."""
    return xp.minimum((sums.astype(xp.int32) + (1 << bits >> 1)) >> bits, 255).astype(xp.uint8)


def weights(before: int, after: int) -> tuple[np.ndarray, int]:
    """float64 [after, before], of whole numbers: the share of each source pixel in each result, times 2^bits; bits.

    The shares under a triangle as wide as two results, or as two source pixels where those are wider, added up in
    fast_image_resize's order, since that decides the last bit. A side that keeps its length keeps its pixels.
    """
    if before == after:
        return np.eye(after), 0
    table = np.zeros((after, before))
    scale = before / after
    reach = max(scale, 1.0)
    for i in range(after):
        centre = (i + 0.5) * scale
        first, last = max(math.floor(centre - reach), 0), min(math.ceil(centre + reach), before)
        shares = [max(1.0 - abs((x - (centre - 0.5)) * (1.0 / reach)), 0.0) for x in range(first, last)]
        total = 0.0
        for share in shares:
            total += share
        table[i, first:last] = [share / total for share in shares]
    bits = next((b for b in range(MOST_BITS) if math.floor(table.max() * 2 ** (b + 1) + 0.5) >= MOST), MOST_BITS)
    return np.floor(table * 2**bits + 0.5), bits
