"""How many processes, threads, and images together let a Variant serve most on this host.

A closed loop as of 64 clients, without HTTP: in each process a thread decodes its clients' JPEGs, the Session runs what
waits, at most `batch` images together and never waiting for more, as the API does. So the runtime's threads and the
decoders share the host's cores here as they do there.
"""

import io
import multiprocessing
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from queue import Empty, SimpleQueue
from statistics import median
from typing import Any

import numpy as np
from PIL import Image

from shared.fitted import MOST_PROCESSES
from shared.images import decode
from shared.runtimes import Session

CLIENTS = 64
BATCHES = (8, 16, 32, 64)
ROUNDS, SLICE_S = 3, 0.08  # each choice gets as many slices, the order reversed every second time
LEAST_RUNS = 3  # of a slice
PICTURES = 64
PATIENCE_S = 60.0  # for a process to start, or to measure a slice
NEAR = 0.05  # rates within 5 % of the best count as equal: then fewer processes, fewer threads, and `choose`'s batch
Rate = tuple[float, list[float]]  # images/s; seconds of each image


@dataclass(frozen=True)
class Trial:
    """What one choice gave: images/s of all processes, and the time from asking to the scores, decoding and waiting in
    it. threads: of each process."""

    processes: int
    threads: int
    batch: int
    images_per_s: float
    p99_ms: float


class SweepFailed(RuntimeError):
    """One of several processes failed, or ended."""


def thread_counts(cores: int) -> list[int]:
    """1, 2, 4, ... and all cores."""
    return sorted({*(1 << i for i in range(cores.bit_length()) if 1 << i < cores), cores})


def process_counts(cores: int) -> list[int]:
    """1, 2, 4, ... up to all cores, and to MOST_PROCESSES."""
    return [n for n in thread_counts(cores) if n <= MOST_PROCESSES]


def sweep(opened: Callable[[int], Session], counts: Sequence[tuple[int, int]], images: np.ndarray,
          between: Callable[[], None] = lambda: None, same: bool = False) -> list[Trial]:
    """Every (processes, threads of each) with every batch that its clients can fill, in turns.

    opened(threads): a Session; for several processes it must be one that pickle takes. images: uint8 [N, S, S, 3].
    same: threads make no difference, so that of the processes of the largest count fewer do for the others.
    """
    pictures, size = [_jpeg(image) for image in images[:PICTURES]], images.shape[1]
    choices = [(n, threads, batch) for n, threads in counts for batch in BATCHES if batch <= CLIENTS // n]
    rates: dict[tuple[int, int, int], list[float]] = {choice: [] for choice in choices}
    latencies: dict[tuple[int, int, int], list[float]] = {choice: [] for choice in choices}
    with ExitStack() as stack:
        ends = _started(stack, *max(counts), opened, pictures, size) if same else []
        loops = {(n, threads): _together(ends[:n]) if same else
                 _alone(stack, opened, threads, pictures, size) if n == 1 else
                 _together(_started(stack, n, threads, opened, pictures, size)) for n, threads in counts}
        for number in range(ROUNDS):
            for n, threads, batch in choices[:: 1 if number % 2 == 0 else -1]:
                rate, took = loops[n, threads](batch)
                rates[n, threads, batch].append(rate)
                latencies[n, threads, batch] += took
                between()
    return [Trial(*choice, median(rates[choice]), 1000 * float(np.percentile(latencies[choice], 99)))
            for choice in choices]


def _alone(stack: ExitStack, opened: Callable[[int], Session], threads: int, pictures: Sequence[bytes],
           size: int) -> Callable[[int], Rate]:
    session = stack.enter_context(closing(opened(threads)))
    return lambda batch: closed_loop(session, pictures, size, batch)


def _started(stack: ExitStack, processes: int, threads: int, opened: Callable[[int], Session],
             pictures: Sequence[bytes], size: int) -> "list[Connection[Any, Any]]":
    """Ends of so many processes that are ready. They are spawned: a fork of a process that ran TensorFlow may hang."""
    spawn = multiprocessing.get_context("spawn")
    ends: list[Connection[Any, Any]] = []
    for _ in range(processes):
        ours, theirs = spawn.Pipe()
        child = spawn.Process(target=_child, args=(theirs, opened, threads, pictures, size))
        child.start()
        theirs.close()
        stack.callback(_end, child, ours)
        ends.append(ours)
    for end in ends:
        _receive(end)
    return ends


def _together(ends: "Sequence[Connection[Any, Any]]") -> Callable[[int], Rate]:
    """The loop in these processes at once, each with its share of the clients."""
    def run(batch: int) -> Rate:
        for end in ends:
            _send(end, (batch, CLIENTS // len(ends)))
        found: list[Rate] = [_receive(end) for end in ends]
        return sum(rate for rate, _ in found), [seconds for _, took in found for seconds in took]

    return run


def _child(end: "Connection[Any, Any]", opened: Callable[[int], Session], threads: int, pictures: Sequence[bytes],
           size: int) -> None:
    """Measure each batch and number of clients that is sent, until the other end is closed, as it is when that process
    ends.
    """
    try:
        with closing(opened(threads)) as session:
            end.send(None)
            with suppress(EOFError):
                while True:
                    batch, clients = end.recv()
                    end.send(closed_loop(session, pictures, size, batch, clients=clients))
    except Exception as e:  # the boundary: who waits for it is told, if somebody still does
        with suppress(OSError):
            end.send(RuntimeError(f"{type(e).__name__}: {e}"))


def _send(end: "Connection[Any, Any]", what: Any) -> None:
    try:
        end.send(what)
    except OSError:
        raise SweepFailed("a process of the sweep failed: it ended") from None


def _receive(end: "Connection[Any, Any]") -> Any:
    """Raises SweepFailed: the child failed, ended, or says nothing."""
    try:
        told = end.recv() if end.poll(PATIENCE_S) else RuntimeError(f"no figures came for {PATIENCE_S:g} s")
    except (EOFError, OSError):
        told = RuntimeError("it ended")
    if isinstance(told, Exception):
        raise SweepFailed(f"a process of the sweep failed: {told}")
    return told


def _end(child: Any, end: "Connection[Any, Any]") -> None:
    end.close()
    child.join(1)
    child.kill()
    child.join()


def closed_loop(session: Session, pictures: Sequence[bytes], size: int, batch: int,
                seconds: float = SLICE_S, clients: int = CLIENTS) -> Rate:
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
    for _ in range(clients):
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


def choose(trials: Sequence[Trial], target_ms: float, larger: bool = False) -> Trial:
    """The most images/s within the target, 0 for none; where no choice is, the one of the lowest p99.

    larger: of equal ones the one with the larger batches, since a GPU takes hardly longer for them.
    """
    within = [trial for trial in trials if not target_ms or trial.p99_ms <= target_ms]
    if not within:
        return min(trials, key=lambda trial: trial.p99_ms)
    best = max(trial.images_per_s for trial in within)
    return min((trial for trial in within if trial.images_per_s >= (1 - NEAR) * best),
               key=lambda trial: (trial.processes, trial.threads, -trial.batch if larger else trial.batch))


def fit(opened: Callable[[int], Session], device: str, cores: int, images: np.ndarray, target_ms: int,
        between: Callable[[], None] = lambda: None, processes: Sequence[int] = (1,)) -> dict[str, Any]:
    """What was chosen for a Variant, with each number of processes too, and all that was tried.

    One process is tried with any number of threads, several with their share of the cores. On a GPU threads change
    nothing, and processes take longer to start there than all else of a job: `fit_processes` tries them.
    """
    alone = [(1, threads) for threads in (thread_counts(cores) if device == "cpu" else [cores])]
    several = [(n, cores // n) for n in processes if n > 1 and device == "cpu"]
    trials = sweep(opened, [*alone, *several], images, between)
    best = choose(trials, target_ms, larger=device != "cpu")
    return {**_rounded(best), "device": device, "meets_target": not target_ms or best.p99_ms <= target_ms,
            "by_processes": [_rounded(choose([t for t in trials if t.processes == n], target_ms, device != "cpu"))
                             for n in sorted({t.processes for t in trials})],
            "tried": [_rounded(trial) for trial in trials]}


def fit_processes(opened: Callable[[int], Session], found: dict[str, Any], cores: int, images: np.ndarray,
                  target_ms: int, processes: Sequence[int], between: Callable[[], None] = lambda: None,
                  ) -> dict[str, Any]:
    """What `fit` found of one process on a GPU, and what these numbers of processes do there.

    Raises SweepFailed: a process failed, as where the GPU's memory does not do for all.
    """
    trials = sweep(opened, [(n, max(1, cores // n)) for n in processes], images, between, same=True)
    best = choose(trials, target_ms, larger=True)
    several = [t for t in trials if t.processes > 1]
    chosen = {**_rounded(best), "meets_target": not target_ms or best.p99_ms <= target_ms}
    return {**found, **(chosen if best in several else {}),
            "by_processes": [*found["by_processes"],
                             *(_rounded(choose([t for t in several if t.processes == n], target_ms, larger=True))
                               for n in sorted({t.processes for t in several}))],
            "tried": [*found["tried"], *map(_rounded, several)]}


def _rounded(trial: Trial) -> dict[str, Any]:
    return {**asdict(trial), "images_per_s": round(trial.images_per_s, 1), "p99_ms": round(trial.p99_ms, 3)}


def _jpeg(image: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(image).save(out, "JPEG", quality=90)
    return out.getvalue()
