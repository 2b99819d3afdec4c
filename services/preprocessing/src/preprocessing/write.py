"""From the pixel file, in the order of the source, to a Dataset's files, in the order of its splits."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from preprocessing.rows import Rows
from preprocessing.table import NAMED, Arranged
from shared.attempt import Attempt
from shared.datasets import SPLITS, Spec

BATCH_BYTES = 4 << 20


def write_pixels(folder: Path, arranged: Arranged, pixels_fd: int, size: int, ctx: Attempt) -> None:
    """Write each split's pixels and labels."""
    row_bytes = size * size * 3
    step = min(max(BATCH_BYTES // row_bytes, 8), 256)
    batch = np.empty((step, size, size, 3), np.uint8)
    rows = [[row.data] for row in batch]
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
                for row, source in zip(rows, chosen.tolist(), strict=False):
                    os.preadv(pixels_fd, row, source * row_bytes)
                f.write(batch[:len(chosen)].data)
                done += len(chosen)
                ctx.report("write", done, total)


def write_index(folder: Path, arranged: Arranged, rows: Rows, labels: tuple[str, ...]) -> None:
    """index.parquet: split, row, label (its name), path, sha256, width, height; an image a row, as in the splits.

    By Arrow on every device: cuDF writes a Parquet file of other bytes, and strings gain nothing by a trip to a GPU.
    """
    counts = [len(arranged.sources[split]) for split in SPLITS]
    sources = np.concatenate(list(arranged.sources.values()))
    named = {"split": (SPLITS, np.repeat(np.arange(len(SPLITS)), counts)),
             "label": (labels, np.concatenate(list(arranged.labels.values()))),
             "path": (rows.paths, sources), "sha256": (rows.sha256, sources)}
    columns = {name: pa.array(strings, pa.string()).take(pa.array(codes)) for name, (strings, codes) in named.items()}
    columns["row"] = np.concatenate([np.arange(count) for count in counts])
    columns["width"], columns["height"] = rows.widths[sources], rows.heights[sources]
    order = ["split", "row", "label", "path", "sha256", "width", "height"]
    pq.write_table(pa.table({name: columns[name] for name in order}), folder / "index.parquet")


def write_stats(folder: Path, arranged: Arranged, rows: Rows, spec: Spec,
                quality: dict[str, Any]) -> dict[str, Any]:
    """stats.json: what the Dataset holds, and what was found and left out. Lists are capped, counts exact."""
    kept = np.concatenate(list(arranged.sources.values()))
    # Both sides as one number: NumPy sorts these ten times as fast as pairs.
    sides, counts = np.unique(rows.widths[kept].astype(np.int64) << 32 | rows.heights[kept], return_counts=True)
    largest = np.argsort(-counts, kind="stable")[:NAMED]
    stats = {
        "images": {split: len(arranged.sources[split]) for split in SPLITS},
        "classes": {split: _by_name(arranged.labels[split], spec.labels) for split in SPLITS},
        "mean": list(spec.mean), "std": list(spec.std),
        "sizes": [{"width": int(sides[i] >> 32), "height": int(sides[i] & 0xFFFFFFFF), "images": int(counts[i])}
                  for i in largest],
        "duplicates": arranged.duplicates,
        "conflicts": arranged.conflicts,
        "skipped": {"images": len(rows.skipped), "examples": [
            {"path": rows.paths[i], "reason": why} for i, why in sorted(rows.skipped.items())[:NAMED]]},
        "quality": quality,
    }
    (folder / "stats.json").write_text(json.dumps(stats, indent=1))
    return stats


def _by_name(codes: np.ndarray, labels: tuple[str, ...]) -> dict[str, int]:
    return dict(zip(labels, np.bincount(codes, minlength=len(labels)).tolist(), strict=True))
