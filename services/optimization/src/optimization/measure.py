"""Accuracy and speed of loaded Sessions, all under the same load."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from shared.runtimes import Session

BATCHES = (1, 8, 64)
ROUNDS = 7
SLICE_S = 0.08  # of each round, for one session at one batch size
LEAST_CALLS, MOST_CALLS = 3, 100  # of a slice
LEAST_SINGLES = 30  # calls of a slice at batch 1: 210 in all, so that two of them are above p99


@dataclass(frozen=True)
class Speed:
    """Milliseconds at batch 1, and images/s by batch size, from the median call: what else ran hits the others."""

    p50_ms: float
    p99_ms: float
    calls: int
    images_per_s: dict[int, float]


def measure(sessions: Mapping[str, Session], images: np.ndarray, batches: Sequence[int] = BATCHES, rounds: int = ROUNDS,
            slice_s: float = SLICE_S, between: Callable[[int, int], None] = lambda step, of: None) -> dict[str, Speed]:
    """Time sessions in turns, so that what else the machine does hits all alike.

    images: uint8 [M, size, size, 3], repeated where a batch is larger; `between(step, of)` is called after each slice.
    The first call of a slice warms up and is not counted.
    """
    inputs = {n: np.ascontiguousarray(np.resize(images[:n], (n, *images.shape[1:]))) for n in batches}
    times: dict[tuple[str, int], list[float]] = {(name, n): [] for name in sessions for n in batches}
    step, of = 0, rounds * len(times)
    for number in range(rounds):
        turn = list(sessions)[:: 1 if number % 2 == 0 else -1]
        for n in batches:
            for name in turn:
                times[name, n] += _calls(sessions[name], inputs[n], slice_s, LEAST_SINGLES if n == 1 else LEAST_CALLS)
                step += 1
                between(step, of)
    return {name: Speed(1000 * float(np.median(times[name, 1])), 1000 * float(np.percentile(times[name, 1], 99)),
                        len(times[name, 1]), {n: n / float(np.median(times[name, n])) for n in batches})
            for name in sessions}


def _calls(session: Session, batch: np.ndarray, slice_s: float, least: int) -> list[float]:
    """Seconds of each call: for `slice_s` or MOST_CALLS, and at least `least` calls."""
    session.run(batch)
    times: list[float] = []
    end = time.perf_counter() + slice_s
    while len(times) < least or (len(times) < MOST_CALLS and time.perf_counter() < end):
        began = time.perf_counter()
        session.run(batch)
        times.append(time.perf_counter() - began)
    return times
