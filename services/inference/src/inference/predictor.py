"""One loaded Variant, and who runs it.

While it is idle a request runs at once, in its own thread: no other one need wake up. What piles up meanwhile runs
together, in the thread of the first that waits. Nothing ever waits for company: a delay would cost latency when idle,
and when busy the batch grows by itself.
"""

import itertools
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from queue import SimpleQueue
from typing import Any

import numpy as np

from inference.metrics import Meters
from shared.errors import Unavailable
from shared.runtimes import Session

MAX_WAITING = 4096  # images
BUSY = "too many images wait already: send fewer at a time, or later"
LAST = 1 << 63  # the priority of what has none
INLINE_S = 0.001  # a run that is over so soon is run by whoever asks
SMOOTH = 0.1  # the weight of the latest run in what a run takes and has


class Closed(Exception):
    """This Predictor takes no more images: its Variant was replaced. Ask for the present one."""


class NotInTime(Exception):
    """The deadline passed first."""


@dataclass
class Run:
    """One batch: (images, ns) of each piece that the Session ran. `counted` by whoever adds it up first."""

    pieces: list[tuple[int, int]]
    counted: bool = False


@dataclass(slots=True, eq=False)
class Answer:
    """Images that were asked about; once `done`, their scores, float32 [N, classes], how long they waited, and where.

    since: when the request began to wait; also: when others did, whose images these are as well.
    turn: held until it is done, or until its thread shall run what waits (`leads`). None where no thread waits for it.
    told: called instead, when it is done, or is `gone` because its deadline passed.
    """

    images: np.ndarray
    deadline: float = float("inf")
    since: float = field(default_factory=time.monotonic)
    also: Sequence[float] = ()
    scores: np.ndarray | None = None
    error: Exception | None = None
    run: Run | None = None
    waited_ns: int = 0
    done: bool = False
    leads: bool = False
    gone: bool = False
    turn: Any = None
    told: "Callable[[Answer], None] | None" = None


class Predictor:
    """Safe to share among threads; one thread at a time touches the Session, its own one where that wants it so."""

    def __init__(self, session: Session, meters: Meters, name: str, most: int = 0, inline_s: float = INLINE_S):
        """most: images of several requests that run together, 0 for as many as the Session runs at once; one request
        may have more. inline_s: as INLINE_S.
        """
        self.name, self.most = name, most or session.batches[-1]
        self._session, self._meters, self._alone = session, meters, not session.own_thread
        self._lock = threading.Lock()  # guards the eight below
        self._waiting: list[tuple[int, int, Answer]] = []  # a heap: by priority, then as they came
        self._busy = self._closed = self._over = False
        self._count, self._run_s, self._run_images, self._inline_s = 0, 0.0, 1.0, inline_s
        self._owner: SimpleQueue[bool] | None = None  # of its thread: whether it leads now, or may end
        self._numbers = itertools.count()
        self.ended = threading.Event()  # the Session is closed
        self.ran_at = -float("inf")  # when the last run ended, of time.monotonic()

    def answer(self, images: np.ndarray, deadline: float = float("inf"), priority: int = LAST,
               queue_s: float = float("inf")) -> Answer:
        """uint8 [N, size, size, 3] -> the Answer, done. deadline: of time.monotonic(). priority: 1 runs first.

        queue_s: how long it may wait until it runs, as far as can be told before.

        Raises:
            Closed: `close` was called.
            Unavailable: more images wait than can be answered in time.
            NotInTime: the deadline passed. What had not begun to run is not run.
            Whatever the Session raises.
        """
        mine = Answer(images, deadline)
        with self._lock:
            self._admit(mine, queue_s)
            idle, self._busy = not self._busy, True
            alone = idle and self._alone
            if not alone:
                mine.turn = threading.Lock()
                mine.turn.acquire()
                heappush(self._waiting, (priority, next(self._numbers), mine))
                if idle:
                    self._wake()
        if alone:
            self._lead([mine])
        while not mine.done:
            self._wait(mine)
        if mine.error is not None:
            raise mine.error
        if time.monotonic() > deadline:
            raise NotInTime
        return mine

    def submit(self, images: np.ndarray, told: Callable[[Answer], None], deadline: float = float("inf"),
               priority: int = LAST, queue_s: float = float("inf"), since: Sequence[float] = ()) -> Answer:
        """As `answer`, without waiting, and nothing runs before `go`. told: may be called from any thread, must not
        wait. since: when each request that has images among these began to wait; one that does so now, without it.

        Raises Closed, Unavailable or NotInTime, as `answer`.
        """
        mine = Answer(images, deadline, told=told)
        if since:
            mine.since, mine.also = since[0], since[1:]
        with self._lock:
            self._admit(mine, queue_s)
            heappush(self._waiting, (priority, next(self._numbers), mine))
        return mine

    def go(self) -> None:
        """Run what was submitted: here, if that is soon over, else in a thread of the Predictor."""
        with self._lock:
            self._drop()
            begins = not self._busy and bool(self._waiting)
            over = self._closed and not self._busy and not self._waiting  # all that waited since `close` is given up
            here = begins and self.is_quick
            if begins:
                self._busy = True
                if not here:
                    self._wake()
            elif over and not self._alone:
                self._wake(leads=False)
        if here:
            self._lead(self._collect())
        elif over and self._alone:
            self._end()

    def is_full(self, queue_s: float, more: int = 0) -> bool:
        """Whether an image behind `more` others would wait for longer than that, as far as can be told."""
        return self._ahead_s(more) > queue_s

    def check(self, deadline: float, queue_s: float) -> None:
        """Raises what `answer` would for one image, before it is decoded."""
        with self._lock:
            self._check(time.monotonic(), 1, deadline, queue_s)

    @property
    def is_quick(self) -> bool:
        """Whether runs are over so soon that whoever asks runs them, whatever else it could do meanwhile."""
        return self._alone and self._run_s < self._inline_s

    @property
    def at_once(self) -> int:
        """Images of one run."""
        return self._session.batches[-1]

    @property
    def images(self) -> int:
        """That wait or run."""
        return self._count

    def close(self, wait: bool = False) -> None:
        """Answer what was submitted, then close the Session; `wait` until that is done."""
        with self._lock:
            first, self._closed = not self._closed, True
            idle = first and not self._busy and not self._waiting
            if first and not self._alone:
                self._wake(leads=False)
        if idle and self._alone:
            self._end()
        if wait:
            self.ended.wait()

    def _admit(self, mine: Answer, queue_s: float) -> None:
        self._check(time.monotonic(), len(mine.images), mine.deadline, queue_s)
        self._count += len(mine.images)

    def _check(self, now: float, more: int, deadline: float, queue_s: float) -> None:
        """Whether as many images can be taken. The lock is held."""
        if self._closed:
            raise Closed
        if now > deadline:
            raise NotInTime
        if self._count + more > MAX_WAITING or self._ahead_s() > min(deadline - now, queue_s):
            raise Unavailable(BUSY, "busy")

    def _ahead_s(self, more: int = 0) -> float:
        """Until the run of what comes behind `more` images begins: as long as a run takes lately, in proportion for
        more images.
        """
        count = self._count + more
        return self._run_s * max(1.0, count / self._run_images) if count else 0.0

    def _wait(self, mine: Answer) -> None:
        """Until it is done, or until this thread has run what waited, this one too unless more urgent ones came."""
        while not mine.turn.acquire(timeout=min(max(0.0, mine.deadline - time.monotonic()), threading.TIMEOUT_MAX)):
            with self._lock:
                if not (mine.done or mine.leads):
                    mine.gone = True
                    raise NotInTime
        if mine.leads:
            mine.leads = False
            self._lead(self._collect())
            if mine.gone:
                raise NotInTime

    def _lead(self, batch: Sequence[Answer]) -> None:
        """Run this batch, then let the first that waits run the next one."""
        try:
            self._run(batch)
        finally:
            with self._lock:
                self._drop()
                self._busy = bool(self._waiting)
                if self._busy:
                    leader = self._waiting[0][2]
                    if leader.turn is None:
                        self._wake()
                    else:
                        leader.leads = True
                        leader.turn.release()
                over = self._closed and not self._busy
            if over:
                self._end()

    def _wake(self, leads: bool = True) -> None:
        """Let the Predictor's own thread run what waits; it begins when it is needed first. The lock is held."""
        if self._owner is None:
            owner: SimpleQueue[bool] = SimpleQueue()
            try:
                threading.Thread(target=self._own, args=(owner,), name=f"predictor {self.name}", daemon=True).start()
            except RuntimeError:  # no thread can be had now: the next request tries again
                self._busy = False
                raise
            self._owner = owner
        self._owner.put(leads)

    def _own(self, owner: "SimpleQueue[bool]") -> None:
        while not self._over:
            leads = owner.get()
            while leads and (batch := self._collect(owns=True)):
                self._run(batch)
            with self._lock:
                over = self._closed and not self._busy and not self._waiting
            if over:
                self._end()

    def _collect(self, owns: bool = False) -> list[Answer]:
        """What waits now, up to `most` images, the urgent first. None: it is idle."""
        batch, images = [], 0
        with self._lock:
            self._drop()
            while self._waiting and (not batch or images + len(self._waiting[0][2].images) <= self.most):
                batch.append(heappop(self._waiting)[2])
                images += len(batch[-1].images)
                self._drop()
            if owns:
                self._busy = bool(batch)
        return batch

    def _drop(self) -> None:
        """Take off the first ones that nobody waits for any more. The lock is held."""
        while self._waiting:
            first = self._waiting[0][2]
            if not first.gone and (first.leads or first.deadline > time.monotonic()):
                return
            late, first.gone = not first.gone, True
            self._count -= len(heappop(self._waiting)[2].images)
            if late and first.told is not None:
                first.told(first)

    def _run(self, batch: Sequence[Answer]) -> None:
        if not batch:
            return
        began = time.monotonic()
        count = sum(len(a.images) for a in batch)
        run, scores, error = Run([]), None, None
        try:
            images, at_once = self._session.stage([a.images for a in batch]), self.at_once
            if count <= at_once:
                scores = self._timed(run, images)
            else:
                scores = np.concatenate([self._timed(run, images[i:i + at_once]) for i in range(0, count, at_once)])
        except Exception as e:  # the boundary: whatever the runtime raises goes to those who wait for it
            error = e
        self.ran_at = time.monotonic()
        took = self.ran_at - began
        with self._lock:
            self._count -= count
            self._run_s += (took - self._run_s) * SMOOTH
            self._run_images += (count - self._run_images) * SMOOTH
        waited = [began - since for a in batch for since in (a.since, *a.also)]
        self._meters.ran(count, took, waited, error is None)
        start = 0
        for a in batch:
            a.run, a.waited_ns, a.error = run, int(1e9 * (began - a.since)), error
            if scores is not None:
                a.scores = scores if len(batch) == 1 else scores[start:start + len(a.images)]
                start += len(a.images)
            a.done = True
            if a.turn is not None:
                a.turn.release()
            elif a.told is not None:
                a.told(a)

    def _timed(self, run: Run, images: np.ndarray) -> np.ndarray:
        began = time.monotonic_ns()
        scores = self._session.run(images)
        run.pieces.append((len(images), time.monotonic_ns() - began))
        return scores

    def _end(self) -> None:
        with self._lock:
            first, self._over = not self._over, True
            if first and self._owner is not None:
                self._owner.put(False)
        if first:
            self._session.close()
            self.ended.set()
