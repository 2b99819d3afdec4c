"""Decode every image of a source with several processes into one file of pixels, in the order of the source."""

import json
import queue
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, suppress

import numpy as np

from preprocessing.layouts import Layout
from preprocessing.rows import Rows
from preprocessing.tree import Tree
from shared import faults
from shared.attempt import Attempt
from shared.errors import Refused
from shared.settings import threads

BATCH_BYTES = 4 << 20  # of pixels that a process holds before it writes them
AHEAD = 2
PIPE_BYTES = 256 << 10  # holds AHEAD answers with every image skipped, so a process never waits to answer
Answers = queue.SimpleQueue[tuple[int, bytes]]


def decode_all(tree: Tree, layout: Layout, size: int, seed: int, pixels_fd: int, ctx: Attempt) -> Rows:
    """Read, hash and decode the layout's images; pixels go to `pixels_fd`, uint8 [N, size, size, 3] with no header.

    Raises:
        Refused: (bad_archive) the archive lied about a member.
        OSError: the pixels can't be written.
        RuntimeError: a decoding process died.
    """
    rows = Rows([m.path for m in layout.members], np.array(layout.codes, np.int32), np.array(layout.splits, np.int8))
    total = len(rows.paths)
    processes = threads(ctx.settings)
    # Small enough that the processes end together, large enough that an order costs little beside its images.
    step = min(BATCH_BYTES // (size * size * 3), max(total // (16 * processes), 8), 256)
    firsts = iter(range(0, total, step))  # shared by the threads: a range gives each number to one of them
    plan = {"kind": tree.kind, "folder": tree.folder, "source_fd": tree.fd, "pixels_fd": pixels_fd,
            "size": size, "seed": seed, "batch": step}
    answers: Answers = queue.SimpleQueue()
    with ExitStack() as stack:
        for _ in range(min(processes, -(-total // step))):
            child = subprocess.Popen(
                [sys.executable, "-m", "preprocessing.decoder"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                pipesize=PIPE_BYTES, pass_fds=[fd for fd in (tree.fd, pixels_fd) if fd >= 0])
            thread = threading.Thread(target=_drive, args=(child, plan, layout, firsts, step, answers), daemon=True)
            thread.start()
            stack.callback(_end, child, thread)
        done, halfway = 0, False
        while done < total:
            ctx.check()
            try:
                first, line = answers.get(timeout=1)
            except queue.Empty:
                continue
            done += _take(rows, first, line)
            ctx.report("decode", done, total, skipped=len(rows.skipped))
            if done >= total / 2 and not halfway:
                halfway = True
                faults.point("mid-decode")
    return rows


def _drive(child: "subprocess.Popen[bytes]", plan: dict[str, object], layout: Layout, firsts: Iterator[int], step: int,
           answers: Answers) -> None:
    """Give one process its orders and pass its answers on; an empty answer says that it died.

    It has AHEAD orders at once, so that it need not wait for this thread.
    """
    assert child.stdin is not None
    assert child.stdout is not None
    given: deque[int] = deque()
    try:
        child.stdin.write(json.dumps(plan).encode() + b"\n")
        while True:
            while len(given) < AHEAD and (first := next(firsts, None)) is not None:
                given.append(first)
                child.stdin.write(json.dumps([first, layout.members[first:first + step]]).encode() + b"\n")
                child.stdin.flush()
            if not given:
                return
            line = child.stdout.readline()
            answers.put((given.popleft(), line))
            if not line:
                return
    except BrokenPipeError:
        answers.put((given[0] if given else 0, b""))


def _end(child: "subprocess.Popen[bytes]", thread: threading.Thread) -> None:
    child.kill()
    child.wait()
    thread.join()
    for pipe in (child.stdin, child.stdout):
        with suppress(BrokenPipeError):
            pipe.close()  # type: ignore[union-attr]


def _take(rows: Rows, first: int, line: bytes) -> int:
    """Write an answer into the columns; returns how many images it was about."""
    if not line:
        raise RuntimeError(f"a decoding process died at or after image {first}, {rows.paths[first]}: out of memory?")
    answer = json.loads(line)
    if "refused" in answer:
        raise Refused(*answer["refused"])
    if "errno" in answer:
        raise OSError(answer["errno"], answer["message"])
    for row, (sha256, key, width, height, why) in enumerate(answer["rows"], first):
        rows.sha256[row], rows.keys[row], rows.widths[row], rows.heights[row] = sha256, key, width, height
        if why:
            rows.skipped[row] = why
    return len(answer["rows"])
