"""Which image goes where: conflicting labels, the splits, exact copies. Tables through `frames`, pandas or cuDF.

Splits need no generator: within a class the images stand in the order of `rank_key` and are cut by rank, so every
device cuts alike and another seed gives another cut. Fractions count of the images that the layout leaves to be cut:
all of them where it names no splits, its training images where it brings its own test split.
"""

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

from preprocessing.rows import Rows
from shared.datasets import SPLITS
from shared.errors import Refused

TRAIN, VALIDATION, TEST = range(3)  # the larger keeps an exact copy: a test image is never trained on
NAMED = 100  # examples of each finding in stats.json; counts are exact


@dataclass
class Arranged:
    """table: a row an image that is kept: source, label, split, path, sha256, width, height; ordered by split and key.

    sources, labels: by split, int64 and int32 [N]: the images' rows in the pixel file, their classes, in order.
    """

    table: Any
    sources: dict[str, np.ndarray]
    labels: dict[str, np.ndarray]
    duplicates: dict[str, Any]
    conflicts: dict[str, Any]


def arrange(frames: ModuleType, rows: Rows, labels: tuple[str, ...], validation: float, test: float) -> Arranged:
    """Drop what contradicts itself, cut the splits that the layout lacks, keep exact copies in one split alone.

    Raises:
        Refused: (bad_dataset) every image is broken, or a class is too small to be in every split.
    """
    usable = np.array([i for i in range(len(rows.paths)) if i not in rows.skipped], np.int64)
    if not len(usable):
        row, why = next(iter(rows.skipped.items()))
        raise Refused(f"none of the {len(rows.paths)} images can be used, such as {rows.paths[row]}: {why}",
                      "bad_dataset")
    table = frames.DataFrame({
        "source": usable, "label": rows.labels[usable], "split": rows.splits[usable], "key": rows.keys[usable],
        "path": [rows.paths[i] for i in usable], "sha256": [rows.sha256[i] for i in usable],
        "width": rows.widths[usable], "height": rows.heights[usable]})
    table, conflicts = _drop_conflicts(table, rows, labels)
    copies = table["source"][table.duplicated("sha256", keep="first")].to_numpy()
    before = len(table)
    table = _cut(frames, _keep_one_split(table), rows, labels, validation, test)
    table = _keep_one_split(table).sort_values(["split", "key", "sha256", "path"]).reset_index(drop=True)
    duplicates = {"images": len(copies), "removed": before - len(table),
                  "examples": [rows.paths[i] for i in sorted(copies)[:NAMED]]}
    split, source, label = (table[c].to_numpy() for c in ("split", "source", "label"))
    return Arranged(table, {name: source[split == i] for i, name in enumerate(SPLITS)},
                    {name: label[split == i].astype(np.int32) for i, name in enumerate(SPLITS)}, duplicates, conflicts)


def _drop_conflicts(table: Any, rows: Rows, labels: tuple[str, ...]) -> tuple[Any, dict[str, Any]]:
    """Without the images that stand under two labels: which one is right can't be known."""
    pairs = table[["sha256", "label"]].drop_duplicates()
    contradictory = pairs["sha256"][pairs.duplicated("sha256", keep=False)]
    wrong = table["sha256"].isin(contradictory)
    sources = sorted(table["source"][wrong].to_numpy(), key=lambda i: (rows.sha256[i], rows.paths[i]))
    return table[~wrong], {"images": len(sources), "examples": [
        {"path": rows.paths[i], "label": labels[rows.labels[i]], "sha256": rows.sha256[i]} for i in sources[:NAMED]]}


def _keep_one_split(table: Any) -> Any:
    """Each content stays in one split: test before validation before train. Copies inside that split stay."""
    best = table.groupby("sha256")["split"].max().reset_index().rename(columns={"split": "best"})
    table = table.merge(best, on="sha256", how="left")
    return table[table["split"] == table["best"]].drop(columns="best")


def _cut(frames: ModuleType, table: Any, rows: Rows, labels: tuple[str, ...], validation: float, test: float) -> Any:
    """Cut validation and test from the training images, where the layout has none."""
    given = np.unique(rows.splits)
    fractions = {TEST: 0.0 if TEST in given else test, VALIDATION: 0.0 if VALIDATION in given else validation}
    if sum(fractions.values()) >= 1:
        raise Refused(f"validation {validation:g} and test {test:g} leave nothing to train on", "bad_dataset")
    pool = table[table["split"] == TRAIN]
    counts = np.bincount(pool["label"].to_numpy(), minlength=len(labels))
    _check_counts(counts, 1 + sum(f > 0 for f in fractions.values()), rows, labels)
    tests = _quota(counts, fractions[TEST], counts - 1 - (fractions[VALIDATION] > 0))
    validations = _quota(counts, fractions[VALIDATION], counts - 1 - tests)
    quotas = frames.DataFrame({"label": np.arange(len(labels), dtype=np.int32), "tests": tests,
                               "others": tests + validations})
    pool = pool.merge(quotas, on="label", how="left").sort_values(["label", "key", "sha256", "path"])
    rank = pool.groupby("label").cumcount()
    in_test, held_out = (rank < pool["tests"]).astype("int8"), (rank < pool["others"]).astype("int8")
    pool["split"] = (in_test + held_out).astype("int8")  # both: test, 2; the second alone: validation, 1
    return frames.concat([pool.drop(columns=["tests", "others"]), table[table["split"] != TRAIN]])


def _quota(counts: np.ndarray, fraction: float, most: np.ndarray) -> np.ndarray:
    """int64 [K]: how many of a class a split gets: its fraction, at least 1, at most `most`; 0 if it is not cut."""
    if not fraction:
        return np.zeros_like(counts)
    return np.clip(np.floor(counts * fraction + 0.5).astype(np.int64), 1, most)


def _check_counts(counts: np.ndarray, needed: int, rows: Rows, labels: tuple[str, ...]) -> None:
    few = np.flatnonzero(counts < needed)
    if len(few):
        found = ", ".join(f"{labels[i]!r} has {counts[i]}" for i in few[:10])
        raise Refused(f"too few usable training images: {found}{' ...' if len(few) > 10 else ''} "
                      f"({len(rows.skipped)} of {len(rows.paths)} files were skipped); expected at least {needed} in "
                      "each class, so that each split gets one", "bad_dataset")
