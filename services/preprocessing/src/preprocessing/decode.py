"""Decode every image of a source with several processes into one file of pixels, in the order of the source."""

import json
import multiprocessing
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess

import numpy as np

from preprocessing.decoder import Answers, Plan, work_through
from preprocessing.layouts import Layout
from preprocessing.rows import Rows
from shared import faults
from shared.attempt import Attempt
from shared.errors import Refused
from shared.settings import threads
from shared.tree import Tree

BATCH_BYTES = 4 << 20  # of pixels that a process holds before it writes them
ORDERS = 4096  # at most, so that all fit into a pipe at once: 8 bytes each, and a pipe holds 64 KiB


def decode_all(tree: Tree, layout: Layout, size: int, seed: int, pixels_fd: int, ctx: Attempt) -> Rows:
    """Read, hash and decode the layout's images; pixels go to `pixels_fd`, uint8 [N, size, size, 3] with no header.

    The processes are forks of this one, so it must hold no GPU: they share the list of images and the columns that
    they fill, take the number of a batch from one pipe and tell in another that it is done.

    Raises:
        Refused: (bad_archive) the archive lied about a member.
        OSError: the pixels can't be written.
        RuntimeError: a decoding process died.
    """
    total = len(layout.members)
    processes = threads(ctx.settings)
    # Small enough that the processes end together, large enough that an order costs little beside its images.
    step = min(BATCH_BYTES // (size * size * 3), max(total // (64 * processes), 1), 256)
    step = max(step, -(-total // ORDERS))
    processes = min(processes, -(-total // step))
    answers = Answers(total, processes)
    plan = Plan(tree, layout.members, size, seed, pixels_fd, step)
    rows = Rows([m.path for m in layout.members], np.array(layout.codes, np.int32), np.array(layout.splits, np.int8))
    done, halfway = 0, False
    with _forked(plan, answers) as lines:
        for line in lines:
            ctx.check()
            done += _take(rows, line)
            ctx.report("decode", done, total, skipped=len(rows.skipped))
            if done >= total / 2 and not halfway:
                halfway = True
                faults.point("mid-decode")
            if done == total:
                break
    return answers.fill(rows)


@contextmanager
def _forked(plan: Plan, answers: Answers) -> Iterator[Iterator[bytes]]:
    """Start a process for each place in `answers.at` and yield their answers as they come."""
    orders, order_in = os.pipe()
    told, tell = os.pipe()
    os.write(order_in, np.arange(0, len(plan.members), plan.batch, np.int64).tobytes())
    os.close(order_in)
    fork = multiprocessing.get_context("fork")
    children = [fork.Process(target=work_through, args=(plan, answers, number, orders, tell), daemon=True)
                for number in range(len(answers.at))]
    try:
        with warnings.catch_warnings():
            # Threads of OpenBLAS or Arrow may be there; the forks call neither.
            warnings.simplefilter("ignore", DeprecationWarning)
            for child in children:
                child.start()
        os.close(tell)  # the forks' ends are the last: when they are gone, reading ends
        yield _lines(told, children, plan, answers)
    finally:
        for child in children:
            if child.pid:
                child.kill()
                child.join()
        os.close(orders)
        os.close(told)


def _lines(told: int, children: list[BaseProcess], plan: Plan, answers: Answers) -> Iterator[bytes]:
    """What the processes tell: a line of JSON each, an empty one after a second. Raises RuntimeError if one died."""
    rest = b""
    while True:
        ready = wait([told, *(c.sentinel for c in children if c.exitcode is None)], timeout=1)
        for child, at in zip(children, answers.at, strict=True):
            if child.exitcode:
                raise RuntimeError(f"a decoding process died at image {at}, {plan.members[at].path}, with "
                                   f"{child.exitcode}: out of memory?")
        if told not in ready:
            yield b""
            continue
        data = os.read(told, 1 << 16)
        if not data:
            raise RuntimeError("the decoding processes ended before the last image")
        *lines, rest = (rest + data).split(b"\n")
        yield from lines


def _take(rows: Rows, line: bytes) -> int:
    """Note what an answer says; returns how many images are done with it."""
    answer = json.loads(line) if line else {}
    if "refused" in answer:
        raise Refused(*answer["refused"])
    if "errno" in answer:
        raise OSError(answer["errno"], answer["message"])
    if "row" in answer:
        rows.skipped[answer["row"]] = answer["why"]
    return int(answer.get("done", 0))
