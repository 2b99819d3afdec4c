"""How many threads, and how many images together, let a Variant serve most on this host.

A closed loop as of 64 clients, in one process and without HTTP: a thread decodes each client's JPEG, the Session runs
what waits, at most `batch` images together and never waiting for more, as the API does. So the runtime's threads and
the decoder share the host's cores here as they do there.
"""

import io
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import asdict, dataclass
from queue import Empty, SimpleQueue
from statistics import median
from typing import Any

import numpy as np
from PIL import Image

from shared.images import decode
from shared.runtimes import Session

CLIENTS = 64
BATCHES = (8, 16, 32, 64)
ROUNDS, SLICE_S = 3, 0.08  # each choice gets as many slices, the order reversed every second time
LEAST_RUNS = 3  # of a slice
PICTURES = 64
NEAR = 0.05  # rates within 5 % of the best count as equal: then fewer threads, then smaller batches


@dataclass(frozen=True)
class Trial:
    """What one choice gave: images/s, and the time from asking to the scores, decoding and waiting in it."""

    threads: int
    batch: int
    images_per_s: float
    p99_ms: float


def thread_counts(cores: int) -> list[int]:
    """1, 2, 4, ... and all cores."""
    return sorted({*(1 << i for i in range(cores.bit_length()) if 1 << i < cores), cores})


def sweep(opened: Callable[[int], Session], counts: Sequence[int], images: np.ndarray,
          between: Callable[[], None] = lambda: None) -> list[Trial]:
    """Every number of threads with every batch, in turns. opened(threads): a Session; images: uint8 [N, S, S, 3]."""
    pictures = [_jpeg(image) for image in images[:PICTURES]]
    choices = [(threads, batch) for threads in counts for batch in BATCHES]
    rates: dict[tuple[int, int], list[float]] = {choice: [] for choice in choices}
    latencies: dict[tuple[int, int], list[float]] = {choice: [] for choice in choices}
    with ExitStack() as stack:
        sessions = {threads: stack.enter_context(closing(opened(threads))) for threads in counts}
        for number in range(ROUNDS):
            for threads, batch in choices[:: 1 if number % 2 == 0 else -1]:
                rate, took = closed_loop(sessions[threads], pictures, images.shape[1], batch)
                rates[threads, batch].append(rate)
                latencies[threads, batch] += took
                between()
    return [Trial(*choice, median(rates[choice]), 1000 * float(np.percentile(latencies[choice], 99)))
            for choice in choices]


def closed_loop(session: Session, pictures: Sequence[bytes], size: int, batch: int,
                seconds: float = SLICE_S) -> tuple[float, list[float]]:
    """images/s, and the seconds of each image from its asking to its scores."""
    session.run(np.zeros((batch, size, size, 3), np.uint8))  # the first run of a shape is the slow one
    asked: SimpleQueue[float | None] = SimpleQueue()
    decoded: SimpleQueue[tuple[float, np.ndarray]] = SimpleQueue()

    def decoding() -> None:
        number = 0
        while (since := asked.get()) is not None:
            decoded.put((since, decode(pictures[number % len(pictures)], size)))
            number += 1

    decoder = threading.Thread(target=decoding, name="sweep", daemon=True)
    began = time.perf_counter()
    for _ in range(CLIENTS):
        asked.put(began)
    decoder.start()
    took: list[float] = []
    runs, now = 0, began
    try:
        while runs < LEAST_RUNS or now < began + seconds:
            waiting = [decoded.get(), *_waiting(decoded, batch - 1)]
            session.run(np.stack([image for _, image in waiting]))
            runs, now = runs + 1, time.perf_counter()
            for since, _ in waiting:
                took.append(now - since)
                asked.put(now)
    finally:
        asked.put(None)
        decoder.join()
    return len(took) / (now - began), took


def _waiting(decoded: "SimpleQueue[tuple[float, np.ndarray]]", most: int) -> Iterator[tuple[float, np.ndarray]]:
    with suppress(Empty):
        for _ in range(most):
            yield decoded.get_nowait()


def choose(trials: Sequence[Trial], target_ms: float) -> Trial:
    """The most images/s within the target, 0 for none; where no choice is, the one of the lowest p99."""
    within = [trial for trial in trials if not target_ms or trial.p99_ms <= target_ms]
    if not within:
        return min(trials, key=lambda trial: trial.p99_ms)
    best = max(trial.images_per_s for trial in within)
    return min((trial for trial in within if trial.images_per_s >= (1 - NEAR) * best),
               key=lambda trial: (trial.threads, trial.batch))


def fit(opened: Callable[[int], Session], device: str, cores: int, images: np.ndarray, target_ms: int,
        between: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """What was chosen for a Variant, and all that was tried. On a GPU the runtime's threads change nothing."""
    trials = sweep(opened, thread_counts(cores) if device == "cpu" else [cores], images, between)
    best = choose(trials, target_ms)
    return {**_rounded(best), "device": device, "meets_target": not target_ms or best.p99_ms <= target_ms,
            "tried": [_rounded(trial) for trial in trials]}


def _rounded(trial: Trial) -> dict[str, Any]:
    return {**asdict(trial), "images_per_s": round(trial.images_per_s, 1), "p99_ms": round(trial.p99_ms, 3)}


def _jpeg(image: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(image).save(out, "JPEG", quality=90)
    return out.getvalue()
