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
ORDER = ["key", "source"]  # copies have one key; then the order of the source
NAMED = 100  # examples of each finding in stats.json; counts are exact


@dataclass
class Arranged:
    """sources, labels: by split, int64 and int32 [N]: the images' rows in the pixel file, their classes, in order."""

    sources: dict[str, np.ndarray]
    labels: dict[str, np.ndarray]
    duplicates: dict[str, Any]
    conflicts: dict[str, Any]


def arrange(frames: ModuleType, rows: Rows, labels: tuple[str, ...], validation: float, test: float) -> Arranged:
    """Drop what contradicts itself, cut the splits that the layout lacks, keep exact copies in one split alone.

    Raises:
        Refused: (bad_dataset) every image is broken, or a class is too small to be in every split.
    """
    usable = np.ones(len(rows.paths), bool)
    usable[list(rows.skipped)] = False
    if not usable.any():
        row, why = next(iter(rows.skipped.items()))
        raise Refused(f"none of the {len(rows.paths)} images can be used, such as {rows.paths[row]}: {why}",
                      "bad_dataset")
    # Numbers only, the strings stay on the host: `key` stands for the content.
    table = frames.DataFrame({"source": np.arange(len(rows.paths)), "label": rows.labels, "split": rows.splits,
                              "key": rows.keys})[frames.Series(usable)]
    _check_keys(table, rows)
    table, conflicts = _drop_conflicts(table, rows, labels)
    copies = table["source"][table["key"].duplicated(keep="first")].to_numpy()
    before = len(table)
    table = _cut(frames, _keep_one_split(table), rows, labels, validation, test)
    table = table.sort_values(["split", *ORDER])
    duplicates = {"images": len(copies), "removed": before - len(table),
                  "examples": [rows.paths[i] for i in sorted(copies)[:NAMED]]}
    split, source, label = (table[c].to_numpy() for c in ("split", "source", "label"))
    return Arranged({name: source[split == i] for i, name in enumerate(SPLITS)},
                    {name: label[split == i].astype(np.int32) for i, name in enumerate(SPLITS)}, duplicates, conflicts)


def _check_keys(table: Any, rows: Rows) -> None:
    """Refuse two contents of one key: among a million images, a chance of one in 37 million."""
    shared = table["source"][table["key"].duplicated(keep=False)].to_numpy()
    content: dict[int, str] = {}
    for i in shared.tolist():
        if content.setdefault(int(rows.keys[i]), rows.sha256[i]) != rows.sha256[i]:
            raise Refused(f"{rows.paths[i]} and another image have the same rank by chance: choose another seed",
                          "bad_dataset")


def _drop_conflicts(table: Any, rows: Rows, labels: tuple[str, ...]) -> tuple[Any, dict[str, Any]]:
    """Without the images that stand under two labels: which one is right can't be known."""
    labels_of = table.groupby("key", sort=False)["label"]
    wrong = labels_of.transform("min") != labels_of.transform("max")
    sources = sorted(table["source"][wrong].to_numpy(), key=lambda i: (rows.sha256[i], rows.paths[i]))
    return table[~wrong], {"images": len(sources), "examples": [
        {"path": rows.paths[i], "label": labels[rows.labels[i]], "sha256": rows.sha256[i]} for i in sources[:NAMED]]}


def _keep_one_split(table: Any) -> Any:
    """Each content stays in one split: test before validation before train. Copies inside that split stay."""
    return table[table["split"] == table.groupby("key", sort=False)["split"].transform("max")]


def _cut(frames: ModuleType, table: Any, rows: Rows, labels: tuple[str, ...], validation: float, test: float) -> Any:
    """Cut validation and test from the training images, where the layout has none."""
    given = np.unique(rows.splits)
    fractions = {TEST: 0.0 if TEST in given else test, VALIDATION: 0.0 if VALIDATION in given else validation}
    if sum(fractions.values()) >= 1:
        raise Refused(f"validation {validation:g} and test {test:g} leave nothing to train on", "bad_dataset")
    pool = table[table["split"] == TRAIN].sort_values(["label", *ORDER]).reset_index(drop=True)
    later = pool["key"].duplicated(keep="first")
    rows_of, counts = (np.bincount(p["label"].to_numpy(), minlength=len(labels)) for p in (pool, pool[~later]))
    _check_counts(counts, 1 + sum(f > 0 for f in fractions.values()), rows, labels)
    tests = _quota(counts, fractions[TEST], counts - 1 - (fractions[VALIDATION] > 0))
    validations = _quota(counts, fractions[VALIDATION], counts - 1 - tests)
    # Contents are counted, not images: copies have one rank, so that no cut goes through them.
    rank, before = (~later).astype("int64").cumsum() - 1, counts.cumsum() - counts
    in_test, held_out = (rank < frames.Series(np.repeat(before + most, rows_of))
                         for most in (tests, tests + validations))
    pool["split"] = in_test.astype("int8") + held_out.astype("int8")  # both: test, 2; the second alone: validation, 1
    return frames.concat([pool, table[table["split"] != TRAIN]])


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
