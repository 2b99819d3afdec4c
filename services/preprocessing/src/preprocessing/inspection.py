"""One pass over the pixels as written: the training split's mean and std, and what `quality` keeps of each."""

import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from preprocessing.quality import Look, look
from shared.attempt import Attempt
from shared.datasets import SPLITS
from shared.settings import threads

HOST_BYTES = 2 << 20  # pixels at once on a CPU: enough that a call costs little beside its work
DEVICE_BYTES = 64 << 20  # and on a GPU, which needs as much to be busy
MOST = 65_536  # images at once: sums of squares over them fit in 32 bits

Numbers = tuple[float, ...]


def inspect(folder: Path, size: int, xp: ModuleType, ctx: Attempt) -> tuple[Numbers, Numbers, Look]:
    """Mean and std per channel of the training split, of pixels 0..1, and a Look at every image, in splits' order.

    Sums are of integers, so exact: every device gives the same digits. A channel that never changes has a std of 1/255,
    the smallest step, so that dividing by it is safe.
    """
    step = batch_of(xp, size)
    sums, squares, pixels = np.zeros(3, np.int64), np.zeros(3, np.int64), 0
    parts, done, total = [], 0, sum((folder / f"{split}.npy").stat().st_size for split in SPLITS)
    for split in SPLITS:
        with open(folder / f"{split}.npy", "rb") as f, ThreadPoolExecutor(threads(ctx.settings)) as pool:
            np.lib.format.read_magic(f)
            (n, *_), _, _ = np.lib.format.read_array_header_1_0(f)
            look_at = partial(_look_at, f.fileno(), f.tell(), step, size, xp, split == "train")
            # NumPy lets go of Python's lock while it computes; a GPU is fed by one thread.
            looked = pool.map(look_at, range(0, n, step)) if xp is np else map(look_at, range(0, n, step))
            try:
                for seen, s, q in looked:
                    ctx.check()
                    parts.append(seen)
                    sums, squares = sums + s, squares + q
                    done += len(seen.hashes) * size * size * 3
                    ctx.report("inspect", done, total)
            finally:
                pool.shutdown(cancel_futures=True)
        pixels += n * size * size if split == "train" else 0
    mean = sums / pixels / 255
    std = np.sqrt(np.maximum(squares / pixels / 255**2 - mean**2, 0))
    return tuple(mean.tolist()), tuple(np.maximum(std, 1 / 255).tolist()), Look.joined(parts)


def _look_at(fd: int, start: int, step: int, size: int, xp: ModuleType, summed: bool,
             first: int) -> tuple[Look, np.ndarray | int, np.ndarray | int]:
    """A Look at `step` images from row `first` on of a file whose rows begin at byte `start`, and their sums."""
    batch = np.empty((step, size, size, 3), np.uint8)
    # Read, not mapped: mapped pages would count as this process's memory.
    count = os.preadv(fd, [batch.data], start + first * batch[0].nbytes) // batch[0].nbytes
    chosen = xp.asarray(batch[:count])
    return (look(xp, chosen), *(channel_sums(xp, chosen) if summed else (0, 0)))


def batch_of(xp: ModuleType, size: int) -> int:
    """How many images of a size are looked at together."""
    return min(max((HOST_BYTES if xp is np else DEVICE_BYTES) // (size * size * 3), 1), MOST)


def channel_sums(xp: ModuleType, batch: Any) -> tuple[np.ndarray, np.ndarray]:
    """uint8 [N, S, S, 3], N <= MOST -> the sums of its pixels and of their squares, int64 [3] each, on the host."""
    flat = batch.reshape(len(batch), -1)
    squared = xp.multiply(flat, flat, dtype=xp.uint16)
    both = [a.sum(axis=0, dtype=xp.uint32).reshape(-1, 3).sum(axis=0, dtype=xp.int64) for a in (flat, squared)]
    return tuple(np.array(a.tolist(), np.int64) for a in both)  # type: ignore[return-value]
