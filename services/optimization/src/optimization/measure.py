"""Accuracy and speed of loaded Sessions, all under the same load."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from shared.runtimes import Session

BATCHES = (1, 8, 64)
ROUNDS = 5
SLICE_S = 0.2  # of each round, for one session at one batch size
LEAST_CALLS = 3
LEAST_SINGLES = 40  # calls a round at batch 1: 200 in all, so that p99 is two of them


@dataclass(frozen=True)
class Speed:
    """Milliseconds at batch 1, and images/s by batch size: the median of the rounds."""

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
    inputs = {n: np.ascontiguousarray(np.resize(images, (n, *images.shape[1:]))) for n in batches}
    rates: dict[tuple[str, int], list[float]] = {(name, n): [] for name in sessions for n in batches}
    singles: dict[str, list[float]] = {name: [] for name in sessions}
    step, of = 0, rounds * len(rates)
    for number in range(rounds):
        turn = list(sessions)[:: 1 if number % 2 == 0 else -1]
        for n in batches:
            for name in turn:
                times = _calls(sessions[name], inputs[n], slice_s, LEAST_SINGLES if n == 1 else LEAST_CALLS)
                rates[name, n].append(n * len(times) / sum(times))
                if n == 1:
                    singles[name] += times
                step += 1
                between(step, of)
    return {name: Speed(*(1000 * float(np.percentile(singles[name], p)) for p in (50, 99)), len(singles[name]),
                        {n: float(np.median(rates[name, n])) for n in batches}) for name in sessions}


def _calls(session: Session, batch: np.ndarray, slice_s: float, least: int) -> list[float]:
    """Seconds of each call: for `slice_s`, and `least` calls if that takes longer."""
    session.run(batch)
    times: list[float] = []
    end = time.perf_counter() + slice_s
    while len(times) < least or time.perf_counter() < end:
        began = time.perf_counter()
        session.run(batch)
        times.append(time.perf_counter() - began)
    return times
