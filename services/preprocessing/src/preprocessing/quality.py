"""What a person should look at in a Dataset: near-duplicates, and images unusually dark, bright or blurred.

Reported in stats.json; it never moves an image. Pixels are looked at with integers, and with floats only where they
hold integers exactly, so NumPy and CuPy give the same hashes and the same report.

A near-duplicate is a copy encoded anew, scaled, a little brighter or turned by about a degree. Mirror images and
quarter turns are other images to the hash.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import numpy as np

from preprocessing.table import NAMED, Arranged
from shared.datasets import SPLITS

GRID = 9  # a hash compares neighbours in a grid of 9 x 9 means
WORDS = 4  # uint32 words of a hash: 128 bits
NEAR = 3  # bits that may differ: then one of the four words is equal, so equal words find such a pair
FEW_BITS = 8  # an image with fewer set bits is nearly of one colour, and like every other such one
RUN = 16  # images of an equal word that each is compared with: what bounds time and memory where thousands are alike
OUTLIER = 3.5  # modified z-score (Iglewicz and Hoaglin, How to Detect and Handle Outliers, 1993)


@dataclass
class Look:
    """What is kept of each image, on the host.

    hashes: uint32 [N, 4]; brightness: float64 [N], mean luma 0..255; sharpness: float64 [N], variance of the Laplacian
    of the luma (Pech-Pacheco et al., Diatom autofocusing in brightfield microscopy, 2000).
    """

    hashes: np.ndarray
    brightness: np.ndarray
    sharpness: np.ndarray

    @classmethod
    def joined(cls, parts: "list[Look]") -> "Look":
        return cls(*(np.concatenate([getattr(part, column) for part in parts])
                     for column in ("hashes", "brightness", "sharpness")))


def look(xp: ModuleType, pixels: Any) -> Look:
    """uint8 [N, S, S, 3] of `xp`, S from 9 to 256 -> what is kept of each."""
    n, size = pixels.shape[:2]
    luma = _luma(xp, pixels)
    edges = _laplacian(luma).reshape(n, -1)
    total = luma.reshape(n, -1).sum(axis=1, dtype=xp.int64)
    first = edges.sum(axis=1, dtype=xp.int64)
    second = xp.multiply(edges, edges, dtype=xp.int32).sum(axis=1, dtype=xp.int64)
    hashes, total, first, second = (to_host(a) for a in (_hash(xp, luma), total, first, second))
    inner = (size - 2) ** 2
    return Look(hashes, total / size**2, (inner * second - first * first) / inner**2)


def _luma(xp: ModuleType, pixels: Any) -> Any:
    """uint16 [N, S, S], 0..255: ITU-R BT.601 in 8 bits."""
    luma = xp.multiply(pixels[..., 0], 77, dtype=xp.uint16)
    luma += xp.multiply(pixels[..., 1], 150, dtype=xp.uint16)
    luma += xp.multiply(pixels[..., 2], 29, dtype=xp.uint16)
    luma >>= 8
    return luma


def _laplacian(luma: Any) -> Any:
    """int16 [N, S - 2, S - 2], within -1020..1020."""
    signed = luma.view("int16")
    edges = 4 * signed[:, 1:-1, 1:-1]
    edges -= signed[:, :-2, 1:-1]
    edges -= signed[:, 2:, 1:-1]
    edges -= signed[:, 1:-1, :-2]
    edges -= signed[:, 1:-1, 2:]
    return edges


def _hash(xp: ModuleType, luma: Any) -> Any:
    """uint16 [N, S, S] -> uint32 [N, 4]: which of two neighbouring means is larger, to the right and downwards.

    The difference hash (Krawetz, Kind of Like That, 2013) in both directions. A block's sum is under 2^18, so float32
    products with a 0/1 matrix are exact.
    """
    n, size = luma.shape[:2]
    ends = np.arange(GRID + 1) * size // GRID
    widths, at = np.diff(ends), np.arange(size)[:, None]
    blocks = xp.asarray(((at >= ends[:-1]) & (at < ends[1:])).astype(np.float32))  # [S, 9]
    sums = (blocks.T @ luma.astype(xp.float32) @ blocks).astype(xp.int32)  # [N, 9, 9]; image by image: no BLAS threads
    this, following = (xp.asarray(w.astype(np.int32)) for w in (widths[:-1], widths[1:]))
    right = sums[:, :-1, 1:] * this > sums[:, :-1, :-1] * following
    down = sums[:, 1:, :-1] * this[:, None] > sums[:, :-1, :-1] * following[:, None]
    bits = xp.concatenate([right.reshape(n, -1), down.reshape(n, -1)], axis=1)
    return xp.packbits(bits.reshape(-1)).view("uint32").reshape(n, WORDS)


def near_pairs(xp: ModuleType, hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of images whose hashes differ by at most NEAR bits: int64 [P, 2] with i < j, in order, and int64 [P] bits.

    Sorted by a word, and among equal ones by the others, images alike lie close together; each is compared with the
    RUN next ones of the same word.
    """
    every = xp.asarray(hashes)
    eligible = xp.nonzero(_bits(xp, every) >= FEW_BITS)[0]
    every, n = every[eligible], len(eligible)
    if xp is np:  # it lets go of Python's lock while it sorts
        with ThreadPoolExecutor(WORDS) as pool:
            found = list(pool.map(partial(_near_by_word, xp, every), range(WORDS)))
    else:
        found = [_near_by_word(xp, every, word) for word in range(WORDS)]
    codes = xp.unique(xp.concatenate(found))
    a, b = codes // max(n, 1), codes % max(n, 1)
    bits = _bits(xp, every[a] ^ every[b])
    return to_host(xp.stack([eligible[a], eligible[b]], axis=1)), to_host(bits)


def _near_by_word(xp: ModuleType, every: Any, word: int) -> Any:
    """int64 [P]: near pairs i < j, as i * N + j, among images with an equal word."""
    n = len(every)
    found = [xp.zeros(0, xp.int64)]
    order = _order(xp, every, word)
    key, at = every[:, word][order], xp.arange(n)
    for step in range(1, RUN + 1):
        at = at[at < n - step]
        at = at[key[at] == key[at + step]]
        if not len(at):
            break
        a, b = order[at], order[at + step]
        bits = _bits(xp, every[a] ^ every[b])
        near = (bits >= min(word, 1)) & (bits <= NEAR)  # equal hashes are neighbours in every order: once will do
        a, b = a[near], b[near]
        found.append(xp.minimum(a, b) * n + xp.maximum(a, b))
    return xp.concatenate(found)


def _order(xp: ModuleType, hashes: Any, word: int) -> Any:
    """int64 [N]: the order by a word, then by the three after it, then by row."""
    first, second, third, fourth = (hashes[:, (word + i) % WORDS].astype(xp.uint64) for i in range(WORDS))
    order = xp.argsort((third << 32) | fourth, kind="stable")
    return order[xp.argsort(((first << 32) | second)[order], kind="stable")]


def _bits(xp: ModuleType, hashes: Any) -> Any:
    """Set bits of each hash: uint32 [N, 4] -> int64 [N]."""
    return xp.bitwise_count(hashes).sum(axis=1, dtype=xp.int64)


def outliers(values: np.ndarray) -> np.ndarray:
    """Modified z-score of each value, float64 [N]; zeros where over half of the values are equal."""
    middle = np.median(values)
    spread = np.median(np.abs(values - middle))
    return 0.6745 * (values - middle) / spread if spread else np.zeros_like(values)


def report(xp: ModuleType, seen: Look, arranged: Arranged, paths: list[str], labels: tuple[str, ...]) -> dict[str, Any]:
    """The section `quality` of stats.json. `seen`: of each image, in the splits' order; `paths`: by source row."""
    sources, classes = (np.concatenate(list(by_split.values())) for by_split in (arranged.sources, arranged.labels))
    splits = np.repeat(np.arange(len(SPLITS)), [len(arranged.sources[split]) for split in SPLITS])
    pairs, bits = near_pairs(xp, seen.hashes)
    apart = splits[pairs[:, 0]] != splits[pairs[:, 1]]
    nearest = np.lexsort((pairs[:, 1], pairs[:, 0], bits, ~apart))[:NAMED]  # leaks first
    bright, sharp = outliers(seen.brightness), outliers(np.log1p(seen.sharpness))
    unusual = {"dark": (bright < -OUTLIER, seen.brightness), "bright": (bright > OUTLIER, -seen.brightness),
               "blurred": (sharp < -OUTLIER, seen.sharpness)}

    def image(i: int) -> dict[str, str]:
        return {"path": paths[sources[i]], "split": SPLITS[splits[i]], "label": labels[classes[i]]}

    return {
        "near_duplicates": {
            "pairs": len(pairs), "across_splits": int(apart.sum()), "bits": NEAR, "of_bits": 32 * WORDS,
            "examples": [{"bits": int(bits[p]), "images": [image(i) for i in pairs[p]]} for p in nearest]},
        **{name: {"images": int(which.sum()), "examples": [
            {**image(i), "value": round(abs(float(by[i])), 3)} for i in _first(which, by)]}
           for name, (which, by) in unusual.items()}}


def _first(which: np.ndarray, by: np.ndarray) -> np.ndarray:
    """The NAMED images of `which` that are first by a value."""
    chosen = np.flatnonzero(which)
    return chosen[np.argsort(by[chosen], kind="stable")[:NAMED]]


def to_host(array: Any) -> np.ndarray:
    """A NumPy array of a NumPy or CuPy one."""
    return array.get() if hasattr(array, "get") else np.asarray(array)
