"""What one decoding process does: take orders, decode into a shared file, fill shared columns, tell when it is done.

A process and not a thread: a decoder that crashes takes only the attempt with it, and small JPEGs need processes,
because Python's share of an image of 32 x 32 is as large as libjpeg's, and threads would wait for each other. A fork,
because it has everything imported: a process started anew takes 0.25 s for that, as long as 10,000 such images.

Orders are int64 row numbers, read from a pipe 8 bytes at a time; answers are lines of JSON in another, each of at most
PIPE_BUF bytes, so that lines of several processes don't mix: {"done": images}, {"row": number, "why": it was skipped},
or why the whole job can't go on: {"refused": [message, code]} or {"errno": number, "message": text}.
"""

import contextlib
import ctypes
import hashlib
import json
import os
import signal
from dataclasses import dataclass
from mmap import mmap
from typing import Any

import numpy as np

from preprocessing.rows import Rows, pwrite, rank_key
from shared.errors import Refused
from shared.images import decode_sized
from shared.processes import die_with_parent
from shared.tree import BAD_ARCHIVE, Member, Tree, read

WHY_CHARACTERS = 200
ORDER_BYTES = 8
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h


@dataclass(frozen=True)
class Plan:
    """What all orders have in common: images at `size`, written to `pixels_fd`, `batch` of the members an order."""

    tree: Tree
    members: list[Member]
    size: int
    seed: int
    pixels_fd: int
    batch: int


class Answers:
    """The columns that the processes fill, an entry an image, in memory that forks have in common.

    sha256: 32 bytes an image; keys: uint64 [N]; widths, heights: int32 [N], pixels on a screen; at: int64
    [processes], the image that each is at.
    """

    def __init__(self, n: int, processes: int):
        self.sha256 = mmap(-1, n * 32)
        self.keys = np.frombuffer(mmap(-1, n * 8), np.uint64)
        self.widths = np.frombuffer(mmap(-1, n * 4), np.int32)
        self.heights = np.frombuffer(mmap(-1, n * 4), np.int32)
        self.at = np.frombuffer(mmap(-1, processes * 8), np.int64)

    def fill(self, rows: Rows) -> Rows:
        """Put what was found into the columns of `rows`."""
        text = self.sha256[:].hex()
        rows.sha256 = [text[i:i + 64] for i in range(0, len(text), 64)]
        rows.keys, rows.widths, rows.heights = self.keys.copy(), self.widths.copy(), self.heights.copy()
        return rows


def work_through(plan: Plan, answers: Answers, number: int, orders: int, tell: int) -> None:
    """Carry out orders until there are none left; what the fork of that number runs."""
    die_with_parent(signal.SIGKILL)
    for signum in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(signum, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    _keep_freed_memory()
    batch = np.zeros((plan.batch, plan.size, plan.size, 3), np.uint8)

    def say(**answer: Any) -> None:
        os.write(tell, json.dumps(answer).encode() + b"\n")

    while order := os.read(orders, ORDER_BYTES):
        first = int.from_bytes(order, "little")
        members = plan.members[first:first + plan.batch]
        try:
            for row, (member, pixels) in enumerate(zip(members, batch, strict=False), first):
                answers.at[number] = row
                if why := _decode_one(plan, member, pixels, answers, row):
                    say(row=row, why=why)
            pwrite(plan.pixels_fd, batch[:len(members)], first * batch[0].nbytes)
        except Refused as e:
            say(refused=[str(e)[:320], e.code])  # as JSON at most 12 bytes a character, and 4096 a line
            return
        except OSError as e:
            say(errno=e.errno, message=e.strerror)
            return
        say(done=len(members))


def _decode_one(plan: Plan, member: Member, pixels: np.ndarray, answers: Answers, row: int) -> str:
    """Read, hash and decode one image into `pixels`, uint8 [size, size, 3]. Returns why it is skipped, or nothing."""
    try:
        data = read(plan.tree.kind, plan.tree.folder, plan.tree.fd, member)
        digest = hashlib.sha256(data)
        answers.sha256[32 * row:32 * row + 32] = digest.digest()
        answers.keys[row] = rank_key(plan.seed, digest.hexdigest())
        pixels[:], answers.widths[row], answers.heights[row] = decode_sized(data, plan.size)
    except Refused as e:
        if e.code == BAD_ARCHIVE:
            raise
        return str(e)[:WHY_CHARACTERS]
    except OSError as e:
        return f"the file can't be read ({e.strerror})"
    return ""


def _keep_freed_memory() -> None:
    """Let malloc keep what an image leaves for the next one.

    It gives a free end of the heap back to the kernel from a size on that depends on what was freed before: where an
    image is just over it, every one faults its pages in anew. Seen on 500 x 375: 375 faults an image, 2.9 ms, not 2.0.
    """
    with contextlib.suppress(AttributeError, OSError):  # another C library has no such knob
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, 32 << 20)
        libc.mallopt(M_TRIM_THRESHOLD, 256 << 20)
