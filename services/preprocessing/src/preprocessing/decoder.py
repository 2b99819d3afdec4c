"""One decoding process: reads orders from standard input, answers on standard output, writes pixels into a shared file.

A process of its own, started anew and not forked: it shares no lock and no GPU with the worker, a decoder that
crashes takes only the attempt with it, and it ends by itself when its parent is gone. Small JPEGs need processes:
Python's share of an image of 32 x 32 is as large as libjpeg's, and threads would wait for each other.

Lines of JSON. First the plan: {kind, folder, source_fd, pixels_fd, size, seed, batch}. Then orders: [first row,
[member, ...]], at most `batch` members. Answers: {"rows": [[sha256, key, width, height, why it was skipped], ...]},
or why the whole job can't go on: {"refused": [message, code]} or {"errno": number, "message": text}.
"""

# ruff: noqa: E402
import os

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # NumPy would start threads that nothing here uses: a third of the start-up

import contextlib
import ctypes
import hashlib
import json
import signal
import sys
from typing import Any

import numpy as np

from preprocessing.rows import pwrite, rank_key
from preprocessing.tree import BAD_ARCHIVE, Member, read
from shared.errors import Refused
from shared.images import decode_sized

WHY_CHARACTERS = 200
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h


def decode_one(plan: dict[str, Any], member: Member, pixels: np.ndarray) -> tuple[str, int, int, int, str]:
    """Read, hash and decode one image into `pixels`, uint8 [size, size, 3]. Returns an answer's row."""
    sha256, key = "", 0
    try:
        data = read(plan["kind"], plan["folder"], plan["source_fd"], member)
        sha256 = hashlib.sha256(data).hexdigest()
        key = rank_key(plan["seed"], sha256)
        pixels[:], width, height = decode_sized(data, plan["size"])
    except Refused as e:
        if e.code == BAD_ARCHIVE:
            raise
        return sha256, key, 0, 0, str(e)[:WHY_CHARACTERS]
    except OSError as e:
        return sha256, key, 0, 0, f"the file can't be read ({e.strerror})"
    return sha256, key, width, height, ""


def decode_batch(plan: dict[str, Any], order: list[Any], batch: np.ndarray) -> dict[str, Any]:
    """Carry out one order and return its answer."""
    first, members = order
    try:
        rows = [decode_one(plan, Member(*m), batch[i]) for i, m in enumerate(members)]
        pwrite(plan["pixels_fd"], batch[:len(members)], first * batch[0].nbytes)
    except Refused as e:
        return {"refused": [str(e), e.code]}
    except OSError as e:
        return {"errno": e.errno, "message": e.strerror}
    return {"rows": rows}


def keep_freed_memory() -> None:
    """Let malloc keep what an image leaves for the next one.

    It gives a free end of the heap back to the kernel from a size on that depends on what was freed before: where an
    image is just over it, every one faults its pages in anew. Seen on 500 x 375: 375 faults an image, 2.9 ms, not 2.0.
    """
    with contextlib.suppress(AttributeError, OSError):  # another C library has no such knob
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, 32 << 20)
        libc.mallopt(M_TRIM_THRESHOLD, 256 << 20)


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    keep_freed_memory()
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints must not end up among the answers
    plan = json.loads(sys.stdin.buffer.readline())
    batch = np.zeros((plan["batch"], plan["size"], plan["size"], 3), np.uint8)
    with contextlib.suppress(BrokenPipeError):
        for line in sys.stdin.buffer:
            answers.write(json.dumps(decode_batch(plan, json.loads(line), batch)).encode() + b"\n")
            answers.flush()


if __name__ == "__main__":
    main()
