"""From the pixel file, in the order of the source, to a Dataset's files, in the order of its splits."""

import json
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from preprocessing.rows import Rows
from preprocessing.table import NAMED, Arranged
from shared.attempt import Attempt
from shared.datasets import SPLITS, Spec

BATCH_BYTES = 4 << 20


def write_pixels(folder: Path, arranged: Arranged, pixels_fd: int, size: int, xp: ModuleType,
                 ctx: Attempt) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Write each split's pixels and labels; returns the training split's mean and std per channel, of pixels 0..1.

    Sums are of integers, so exact: every device gives the same digits. A channel that never changes has a std of 1/255,
    the smallest step, so that dividing by it is safe.
    """
    row_bytes = size * size * 3
    step = min(max(BATCH_BYTES // row_bytes, 8), 256)
    batch = np.empty((step, size, size, 3), np.uint8)
    sums, squares = np.zeros(3, np.int64), np.zeros(3, np.int64)
    total, done = sum(len(s) for s in arranged.sources.values()), 0
    for split in SPLITS:
        sources = arranged.sources[split]
        np.save(folder / f"{split}.labels.npy", arranged.labels[split])
        with open(folder / f"{split}.npy", "wb") as f:
            np.lib.format.write_array_header_1_0(f, {
                "descr": "|u1", "fortran_order": False, "shape": (len(sources), size, size, 3)})
            for first in range(0, len(sources), step):
                ctx.check()
                chosen = sources[first:first + step]
                for row, source in zip(batch, chosen.tolist(), strict=False):
                    os.preadv(pixels_fd, [row.data], source * row_bytes)
                f.write(batch[:len(chosen)].data)
                if split == "train":
                    s, q = channel_sums(xp, batch[:len(chosen)])
                    sums, squares = sums + s, squares + q
                done += len(chosen)
                ctx.report("write", done, total)
    n = len(arranged.sources["train"]) * size * size
    mean = sums / n / 255
    std = np.sqrt(np.maximum(squares / n / 255**2 - mean**2, 0))
    return tuple(mean.tolist()), tuple(np.maximum(std, 1 / 255).tolist())


def channel_sums(xp: ModuleType, batch: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """uint8 [N, S, S, 3], N <= 256 -> the sums of its pixels and of their squares, int64 [3] each, on the host."""
    flat = xp.asarray(batch).reshape(len(batch), -1)
    squared = xp.multiply(flat, flat, dtype=xp.uint16)
    both = [a.sum(axis=0, dtype=xp.uint32).reshape(-1, 3).sum(axis=0, dtype=xp.int64) for a in (flat, squared)]
    return tuple(np.array(a.tolist(), np.int64) for a in both)  # type: ignore[return-value]


def write_index(folder: Path, arranged: Arranged, labels: tuple[str, ...], frames: ModuleType) -> None:
    """index.parquet: split, row, label (its name), path, sha256, width, height; an image a row, as in the splits."""
    table = arranged.table
    table["row"] = table.groupby("split").cumcount()
    table["label"] = frames.Series(list(labels)).take(table["label"]).reset_index(drop=True)
    table["split"] = frames.Series(list(SPLITS)).take(table["split"]).reset_index(drop=True)
    columns = ["split", "row", "label", "path", "sha256", "width", "height"]
    table[columns].to_parquet(folder / "index.parquet", index=False)


def write_stats(folder: Path, arranged: Arranged, rows: Rows, spec: Spec) -> dict[str, Any]:
    """stats.json: what the Dataset holds, and what was found and left out. Lists are capped, counts exact."""
    kept = np.concatenate(list(arranged.sources.values()))
    sides, counts = np.unique(np.stack([rows.widths[kept], rows.heights[kept]]), axis=1, return_counts=True)
    largest = np.argsort(-counts, kind="stable")[:NAMED]
    stats = {
        "images": {split: len(arranged.sources[split]) for split in SPLITS},
        "classes": {split: _by_name(arranged.labels[split], spec.labels) for split in SPLITS},
        "mean": list(spec.mean), "std": list(spec.std),
        "sizes": [{"width": int(sides[0, i]), "height": int(sides[1, i]), "images": int(counts[i])} for i in largest],
        "duplicates": arranged.duplicates,
        "conflicts": arranged.conflicts,
        "skipped": {"images": len(rows.skipped), "examples": [
            {"path": rows.paths[i], "reason": why} for i, why in sorted(rows.skipped.items())[:NAMED]]},
    }
    (folder / "stats.json").write_text(json.dumps(stats, indent=1))
    return stats


def _by_name(codes: np.ndarray, labels: tuple[str, ...]) -> dict[str, int]:
    return dict(zip(labels, np.bincount(codes, minlength=len(labels)).tolist(), strict=True))
