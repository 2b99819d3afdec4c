"""What is known of every source image, and the rank that decides its split."""

import hashlib
import os
from dataclasses import dataclass, field

import numpy as np


@dataclass
class Rows:
    """One entry an image, in the order of the source; its pixels are at the same row of the pixel file.

    paths: str [N]. labels: int32 [N], class indices. splits: int8 [N], 0 train, 1 validation, 2 test, as the layout
    says. sha256: hex [N], of the image's bytes. keys: uint64 [N], `rank_key`. widths, heights: int32 [N], pixels on a
    screen. skipped: row -> why it can't be used; its other entries mean nothing.
    """

    paths: list[str]
    labels: np.ndarray
    splits: np.ndarray
    sha256: list[str] = field(init=False)
    keys: np.ndarray = field(init=False)
    widths: np.ndarray = field(init=False)
    heights: np.ndarray = field(init=False)
    skipped: dict[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        n = len(self.paths)
        self.sha256 = [""] * n
        self.keys = np.zeros(n, np.uint64)
        self.widths = np.zeros(n, np.int32)
        self.heights = np.zeros(n, np.int32)

    @classmethod
    def joined(cls, parts: "list[Rows]") -> "Rows":
        """One after the other; the parts have skipped nothing."""
        rows = cls([path for part in parts for path in part.paths],
                   np.concatenate([part.labels for part in parts]), np.concatenate([part.splits for part in parts]))
        rows.sha256 = [digest for part in parts for digest in part.sha256]
        for column in ("keys", "widths", "heights"):
            setattr(rows, column, np.concatenate([getattr(part, column) for part in parts]))
        return rows


def rank_key(seed: int, sha256: str) -> int:
    """The first 64 bits of SHA-256(seed and content), the content standing there by its own SHA-256."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{sha256}".encode()).digest()[:8], "big")


def pwrite(fd: int, data: np.ndarray, offset: int) -> None:
    """Write a whole C-contiguous array at a byte offset. No file position is shared: processes may do it together."""
    rest = memoryview(data).cast("B")
    while rest:
        done = os.pwrite(fd, rest, offset)
        rest, offset = rest[done:], offset + done
