"""One loaded Variant and the one thread that runs it.

While the device is idle a request runs at once; what piles up while it is busy runs together. Nothing ever waits for
company: a delay would cost latency when idle, and when busy the batch grows by itself.
"""

import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue

import numpy as np

from inference.metrics import Meters
from shared.errors import Unavailable
from shared.runtimes import Session

MAX_BATCH = 64
MAX_WAITING = 4096  # images; more would wait longer than their clients do


class Closed(Exception):
    """This Predictor takes no more images: its Variant was replaced. Ask for the present one."""


@dataclass
class Run:
    """One batch: (images, ns) of each piece that the Session ran. `counted` by whoever adds it up first."""

    pieces: list[tuple[int, int]]
    counted: bool = False


class Answer(Future[np.ndarray]):
    """Scores to come, float32 [N, classes]; once there, how long they waited and what they ran in."""

    waited_ns = 0
    run: Run | None = None


@dataclass(frozen=True)
class _Waiting:
    images: np.ndarray
    answer: Answer = field(default_factory=Answer)
    since: float = field(default_factory=time.monotonic)


class Predictor:
    """Safe to share among threads; the Session is touched by its own thread alone."""

    def __init__(self, session: Session, meters: Meters, name: str):
        self._session, self._meters = session, meters
        self._queue: SimpleQueue[_Waiting | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._closed, self._count = False, 0
        self._thread = threading.Thread(target=self._own, name=f"predictor {name}", daemon=True)
        self._thread.start()

    def submit(self, images: np.ndarray) -> Answer:
        """uint8 [N, size, size, 3] -> an Answer, a Future of float32 [N, classes]. A cancelled Future is not run.

        Raises:
            Closed: `close` was called.
            Unavailable: more images wait than can be answered in time.
        """
        waiting = _Waiting(images)
        with self._lock:
            if self._closed:
                raise Closed
            if self._count + len(images) > MAX_WAITING:
                raise Unavailable(f"{self._count} images wait already: send fewer at a time, or later", "busy")
            self._count += len(images)
            self._queue.put(waiting)
        return waiting.answer

    def close(self, wait: bool = False) -> None:
        """Answer what was submitted, then close the Session; `wait` until that is done."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._queue.put(None)
        if wait:
            self._thread.join()

    def _own(self) -> None:
        first: _Waiting | None = self._queue.get()
        while first is not None:
            batch, first, idle = self._collect(first)
            self._run([w for w in batch if w.answer.set_running_or_notify_cancel()])
            with self._lock:
                self._count -= sum(len(w.images) for w in batch)
            if idle:
                first = self._queue.get()
        self._session.close()

    def _collect(self, first: _Waiting) -> tuple[list[_Waiting], _Waiting | None, bool]:
        """What waits now, up to MAX_BATCH images; then what comes next, unless (True) nothing waits."""
        batch, count = [first], len(first.images)
        while True:
            try:
                after = self._queue.get_nowait()
            except Empty:
                return batch, None, True
            if after is None or count + len(after.images) > MAX_BATCH:
                return batch, after, False
            batch.append(after)
            count += len(after.images)

    def _run(self, batch: Sequence[_Waiting]) -> None:
        if not batch:
            return
        began = time.monotonic()
        for w in batch:
            self._meters.queue.observe(began - w.since)
        images = batch[0].images if len(batch) == 1 else np.concatenate([w.images for w in batch])
        run = Run([])
        try:
            parts = [self._timed(run, images[i:i + MAX_BATCH]) for i in range(0, len(images), MAX_BATCH)]
            scores = np.concatenate(parts)
        except Exception as e:  # the boundary: whatever the runtime raises goes to those who wait for it
            for w in batch:
                w.answer.set_exception(e)
            return
        self._meters.compute.observe(time.monotonic() - began)
        self._meters.batch.observe(len(images))
        start = 0
        for w in batch:
            w.answer.run, w.answer.waited_ns = run, int(1e9 * (began - w.since))
            w.answer.set_result(scores[start:start + len(w.images)])
            start += len(w.images)

    def _timed(self, run: Run, images: np.ndarray) -> np.ndarray:
        began = time.monotonic_ns()
        scores = self._session.run(images)
        run.pieces.append((len(images), time.monotonic_ns() - began))
        return scores
