"""A dataset's Name when none was given: what its folder or archive is called."""

import re
from pathlib import Path

ENDINGS = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar", ".zip")


def name_of(path: Path) -> str:
    """A valid Name (1 to 63 of a-z, 0-9, `_`, `-`): `cifar10` for CIFAR-10's own files, else the stem."""
    stem = path.resolve().name.lower()
    for ending in ENDINGS:
        stem = stem.removesuffix(ending)
    if re.fullmatch(r"cifar-?10(-(python|binary|batches-(py|bin)))?", stem):
        return "cifar10"
    return re.sub(r"[^a-z0-9_-]+", "-", stem).strip("-_")[:63] or "dataset"
