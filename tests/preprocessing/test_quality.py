"""Near-duplicates and outliers, against plain references and on pictures made for the purpose."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from preprocessing.quality import NEAR, RUN, look, near_pairs, outliers
from shared.datasets import Dataset

some = settings(max_examples=20, deadline=None, database=None)


def smooth(seed: int, size: int = 64) -> np.ndarray:
    small = np.random.default_rng(seed).integers(0, 230, (6, 6, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((size, size), Image.Resampling.BICUBIC))


def luma_of(image: np.ndarray) -> list[list[int]]:
    return [[(77 * int(r) + 150 * int(g) + 29 * int(b)) >> 8 for r, g, b in row] for row in image]


def plain_hash(image: np.ndarray) -> list[bool]:
    luma, size = luma_of(image), len(image)
    ends = [i * size // 9 for i in range(10)]

    def mean(r: int, c: int) -> tuple[int, int]:
        block = [luma[y][x] for y in range(ends[r], ends[r + 1]) for x in range(ends[c], ends[c + 1])]
        return sum(block), len(block)

    def larger(one: tuple[int, int], two: tuple[int, int]) -> bool:
        return one[0] * two[1] > two[0] * one[1]

    return ([larger(mean(r, c + 1), mean(r, c)) for r in range(8) for c in range(8)]
            + [larger(mean(r + 1, c), mean(r, c)) for r in range(8) for c in range(8)])


def bits_of(hashes: np.ndarray) -> np.ndarray:
    return np.unpackbits(np.ascontiguousarray(hashes).view(np.uint8), axis=1).astype(bool)


def plain_pairs(hashes: np.ndarray) -> dict[tuple[int, int], int]:
    bits = bits_of(hashes)
    rows = [i for i in range(len(bits)) if bits[i].sum() >= 8]
    found = {(i, j): int((bits[i] ^ bits[j]).sum()) for i in rows for j in rows if i < j}
    return {pair: count for pair, count in found.items() if count <= NEAR}


def pairs_of(hashes: np.ndarray) -> dict[tuple[int, int], int]:
    pairs, bits = near_pairs(np, hashes)
    assert [tuple(p) for p in pairs] == sorted(tuple(p) for p in pairs)
    return {(int(i), int(j)): int(b) for (i, j), b in zip(pairs, bits, strict=True)}


@pytest.mark.parametrize("size", [9, 32, 40, 61])
def test_a_look_is_what_plain_loops_see(size: int) -> None:
    images = np.random.default_rng(size).integers(0, 256, (4, size, size, 3), dtype=np.uint8)
    images[1] = smooth(1, size)
    images[2] = np.where(images[2] > 127, 255, 0)
    seen = look(np, images)
    for i, image in enumerate(images):
        luma = np.array(luma_of(image), np.float64)
        edges = (4 * luma[1:-1, 1:-1] - luma[:-2, 1:-1] - luma[2:, 1:-1] - luma[1:-1, :-2] - luma[1:-1, 2:])
        assert bits_of(seen.hashes[i:i + 1])[0].tolist() == plain_hash(image)
        assert seen.brightness[i] == pytest.approx(luma.mean(), rel=1e-12)
        assert seen.sharpness[i] == pytest.approx(edges.var(), rel=1e-9)


def test_sums_hold_at_the_largest_size() -> None:
    board = (np.indices((256, 256)).sum(0) % 2 * 255).astype(np.uint8)
    seen = look(np, np.repeat(board[None, :, :, None], 3, axis=3))
    assert seen.brightness[0] == 127.5
    assert seen.sharpness[0] == pytest.approx(1020.0**2)


@some
@given(st.integers(0, 2**31 - 1), st.integers(0, 40))
def test_every_pair_within_three_bits_is_found(seed: int, copies: int) -> None:
    rng = np.random.default_rng(seed)
    hashes = rng.integers(0, 2**32, (60, 4), dtype=np.uint32)
    for i in range(copies):
        hashes[20 + i] = hashes[rng.integers(0, 10)]
        for bit in rng.integers(0, 128, rng.integers(0, 5)):
            hashes[20 + i, bit // 32] ^= np.uint32(1 << int(bit % 32))
    assert pairs_of(hashes) == plain_pairs(hashes)


@pytest.mark.parametrize("count", [0, 1, 2])
def test_few_images_have_few_pairs(count: int) -> None:
    assert len(pairs_of(np.full((count, 4), 0xFFFF, np.uint32))) == count // 2


def test_thousands_alike_give_a_bounded_number_of_pairs() -> None:
    alike = np.tile(np.random.default_rng(0).integers(0, 2**32, 4, dtype=np.uint32), (3000, 1))
    pairs, bits = near_pairs(np, alike)
    assert len(pairs) == sum(min(RUN, 2999 - i) for i in range(3000))
    assert not bits.any()


def test_images_of_one_colour_are_no_pairs() -> None:
    flat = np.repeat(np.arange(0, 200, 2, dtype=np.uint8), 32 * 32 * 3).reshape(-1, 32, 32, 3)
    assert pairs_of(look(np, flat).hashes) == {}


def encoded(image: np.ndarray) -> np.ndarray:
    out = io.BytesIO()
    Image.fromarray(image).save(out, "JPEG", quality=60)
    return np.asarray(Image.open(out))


@pytest.mark.parametrize("change", [
    encoded,
    lambda image: (image.astype(np.int16) + 20).astype(np.uint8),
    lambda image: np.asarray(Image.fromarray(image).resize((48, 48)).resize((64, 64))),
    lambda image: np.asarray(Image.fromarray(image).rotate(0.5, Image.Resampling.BILINEAR)),
], ids=["encoded", "brightened", "scaled", "turned half a degree"])
def test_a_changed_copy_is_found(change: Callable[[np.ndarray], np.ndarray]) -> None:
    originals = [smooth(seed) for seed in range(40)]
    found = pairs_of(look(np, np.stack([*originals, *map(change, originals)])).hashes)
    assert set(found) <= {(i, i + 40) for i in range(40)}
    assert len(found) >= 34


def test_the_modified_z_score_is_of_the_median() -> None:
    assert outliers(np.array([1.0, 2, 3, 4, 100]))[4] == pytest.approx(0.6745 * 97)
    assert not outliers(np.array([5.0, 5, 5, 9])).any()


def test_a_dataset_s_stats_name_copies_across_splits_and_unusual_images(
        prepare_source: Callable[..., tuple[Dataset, dict[str, Any]]], imports: Path) -> None:
    for split, first in (("train", 0), ("test", 40)):
        for i in range(first, first + 40):
            path = imports / "pets" / split / ("cat", "dog")[i % 2] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(smooth(i)).save(path)
    Image.fromarray(encoded(smooth(2))).save(imports / "pets" / "test" / "cat" / "copy.png")
    Image.fromarray(smooth(3) // 16).save(imports / "pets" / "train" / "dog" / "dark.png")
    Image.fromarray(smooth(4) // 2 + 128).save(imports / "pets" / "train" / "cat" / "bright.png")
    Image.new("RGB", (64, 64), (120, 110, 100)).save(imports / "pets" / "train" / "cat" / "flat.png")
    quality = prepare_source("import:pets", size=64)[1]["quality"]
    leaks = [example for example in quality["near_duplicates"]["examples"]
             if {image["split"] for image in example["images"]} == {"test", "train"}]
    assert quality["near_duplicates"]["across_splits"] == len(leaks) == 1
    assert {image["path"] for image in leaks[0]["images"]} == {"train/cat/2.png", "test/cat/copy.png"}
    assert [e["path"] for e in quality["dark"]["examples"]] == ["train/dog/dark.png"]
    assert [e["path"] for e in quality["bright"]["examples"]] == ["train/cat/bright.png"]
    assert quality["blurred"]["examples"][0] == {
        "path": "train/cat/flat.png", "split": "train", "label": "cat", "value": 0.0}
