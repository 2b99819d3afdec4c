"""A dataset's Name when none was given: what its folder or archive is called."""

import re
from pathlib import Path

ENDINGS = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar", ".zip")


def name_of(path: Path) -> str:
    """A valid Name (1 to 63 of a-z, 0-9, `_`, `-`): `cifar10` for CIFAR-10's own files, else the stem."""
    stem = path.resolve().name.lower()
    if re.match(r"cifar-?10(?!\d)", stem):
        return "cifar10"
    for ending in ENDINGS:
        stem = stem.removesuffix(ending)
    return re.sub(r"[^a-z0-9_-]+", "-", stem).strip("-_")[:63] or "dataset"
