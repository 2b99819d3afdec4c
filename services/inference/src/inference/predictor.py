"""One loaded Variant, and who runs it.

While it is idle a request runs at once, in its own thread: no other one need wake up. What piles up meanwhile runs
together, in the thread of the first that waits. Nothing ever waits for company: a delay would cost latency when idle,
and when busy the batch grows by itself. Where a Session can have more than one batch under way, the next one is begun
while the last one runs, by a thread that has other work meanwhile: `go` and `look`.
"""

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from heapq import heappop, heappush
from itertools import takewhile
from queue import SimpleQueue

import numpy as np

from inference.batch import Answer, Batch, Run
from inference.metrics import Meters
from shared.errors import Unavailable
from shared.runtimes import Over, Session

MAX_WAITING = 4096  # images
BUSY = "too many images wait already: send fewer at a time, or later"
LAST = 1 << 63  # the priority of what has none
INLINE_S = 0.001  # a run that is over so soon is run by whoever asks
LARGER = 4  # so many times that may take of which there are more images than in those of late
LOOKED_AT_S = 0.005  # one that is over so soon is looked at again and again; for a longer one a thread waits
SMOOTH = 0.1  # the weight of the latest run in what a run takes and has


class Closed(Exception):
    """This Predictor takes no more images: its Variant was replaced. Ask for the present one."""


class NotInTime(Exception):
    """The deadline passed first."""


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
        self._under_way: deque[Batch] = deque()  # begun by `go`, whose thread alone changes it, as the one below
        self._looked_at = 0.0  # when it looked last
        self._began = 0.0  # when the latest batch did
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

    def go(self, ahead: bool = False) -> bool:
        """Run what was submitted: here, if that is soon over, else in a thread of the Predictor.

        ahead: who calls has other work meanwhile. Returns whether something is under way, for which it calls `look`.
        """
        with self._lock:
            self._drop()
            pieces = self._is_large()
            follows = 0 < len(self._under_way) < self._session.ahead and not pieces
            begins = bool(self._waiting) and (follows or not self._busy)
            over = self._closed and not self._busy and not self._waiting  # all that waited since `close` is given up
            next_s = self._run_s * max(1.0, min(self._count, self.most) / self._run_images)
            soon = self._is_soon and not pieces and next_s < LARGER * self._inline_s
            here = follows or soon or (self._is_quick_ahead and not pieces)
            if begins:
                self._busy = True
                if not here:
                    self._wake()
            elif over and not self._alone:
                self._wake(leads=False)
        if begins and here:
            if follows or (self._session.ahead > 1 and (ahead or not soon)):
                self._begin_more()
                if not self._under_way:  # all that waited has been given up meanwhile
                    self._hand_over()
            else:
                self._lead(self._collect())
        elif over and self._alone:
            self._end()
        return self.is_under_way

    def look(self) -> bool:
        """Tell who asked for what is over of what `go` has begun, and begin more. Returns as that."""
        if not self._under_way:
            return False
        try:
            over = list(takewhile(Batch.is_over, self._under_way))
            if over:
                # They ended between two looks; several had the time in proportion to their images.
                ended = max(over[0].began, self.ran_at)
                each = (max(self._looked_at, ended) + time.monotonic()) / 2 - ended
                for batch in over:
                    ended += each * batch.count / sum(b.count for b in over)
                    self._finish(self._under_way.popleft(), ended)
                if self.is_quick:
                    self._begin_more()
            self._looked_at = time.monotonic()
        finally:
            if not self._under_way:
                self._hand_over()
        return self.is_under_way

    @property
    def is_under_way(self) -> bool:
        """Whether something is that `go` has begun."""
        return bool(self._under_way)

    def is_full(self, queue_s: float, more: int = 0) -> bool:
        """Whether an image behind `more` others would wait for longer than that, as far as can be told."""
        return self._ahead_s(more) > queue_s

    def check(self, deadline: float, queue_s: float) -> None:
        """Raises what `answer` would for one image, before it is decoded."""
        with self._lock:
            self._check(time.monotonic(), 1, deadline, queue_s)

    @property
    def is_quick(self) -> bool:
        """Whether runs are over so soon that whoever asks runs them, or has them run while it does other work."""
        return self._is_soon or self._is_quick_ahead

    @property
    def _is_soon(self) -> bool:
        """Whether whoever asks waits until they are over, whatever else it could do meanwhile."""
        return self._alone and self._run_s < self._inline_s

    @property
    def _is_quick_ahead(self) -> bool:
        """Whether runs are looked at again and again by whoever began them."""
        return self._alone and self._session.ahead > 1 and self._run_s < LOOKED_AT_S

    @property
    def at_once(self) -> int:
        """Images of one run."""
        return self._session.batches[-1]

    @property
    def images(self) -> int:
        """That wait or run."""
        return self._count

    def room(self, size: int) -> memoryview:
        """As the Session's, for images that come."""
        return self._session.room(size)

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
        """Until the run of what comes behind `more` images begins: as long as a run takes lately, in proportion to its
        images; what runs already takes a whole one at least, of which some has passed.
        """
        runs = (self._count + more) / self._run_images
        if not self._busy or not self._count:
            return self._run_s * runs
        passed = time.monotonic() - max(self._began, self.ran_at)
        return self._run_s * max(1.0, runs) - min(passed, self._run_s)

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
            self._hand_over()

    def _hand_over(self) -> None:
        """To the first that waits."""
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

    def _begin_more(self) -> None:
        """Have what waits under way, if there may be more and it is there. What runs in pieces does so alone, later."""
        with self._lock:
            self._drop()
            pieces = self._is_large()
        if not pieces and len(self._under_way) < self._session.ahead and (batch := self._collect()):
            self._under_way.append(self._begin(batch))

    def _is_large(self) -> bool:
        """Whether what is next has more images than run at once. The lock is held."""
        return bool(self._waiting) and len(self._waiting[0][2].images) > self.at_once

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
        if batch:
            self._finish(self._begin(batch))

    def _begin(self, answers: Sequence[Answer]) -> Batch:
        self._began = time.monotonic()
        batch = Batch(answers, sum(len(a.images) for a in answers), self._began, Run([]))
        try:
            parts = [a.images for a in answers]
            batch.begun = (self._session.begin(parts) if batch.count <= self.at_once else
                           Over(self._in_pieces(parts[0] if len(parts) == 1 else np.concatenate(parts), batch.run)))
        except Exception as e:  # the boundary: whatever the runtime raises goes to those who wait for it
            batch.error = e
        return batch

    def _in_pieces(self, images: np.ndarray, run: Run) -> np.ndarray:
        scores = []
        for start in range(0, len(images), self.at_once):
            began = time.monotonic_ns()
            scores.append(self._session.run(images[start:start + self.at_once]))
            run.pieces.append((len(scores[-1]), time.monotonic_ns() - began))
        return np.concatenate(scores)

    def _finish(self, batch: Batch, ended: float | None = None) -> None:
        """Wait until it is over, and tell who asked. ended: when it was, if that is known."""
        scores, run = None, batch.run
        try:
            scores = batch.begun.scores() if batch.begun else None
        except Exception as e:  # as in `_begin`
            batch.error = e
        ended = time.monotonic() if ended is None else ended
        started = max(batch.began, self.ran_at)  # until then it waited for what ran before it
        took = max(0.0, ended - started)
        self.ran_at = ended
        if scores is not None and not run.pieces:
            run.pieces.append((batch.count, int(1e9 * took)))
        with self._lock:
            self._count -= batch.count
            self._run_s += (took - self._run_s) * SMOOTH
            self._run_images += (batch.count - self._run_images) * SMOOTH
        waited = [started - since for a in batch.answers for since in (a.since, *a.also)]
        self._meters.ran(batch.count, took, waited, batch.error is None)
        start = 0
        for a in batch.answers:
            a.run, a.waited_ns, a.error = run, int(1e9 * (started - a.since)), batch.error
            if scores is not None:
                a.scores = scores if len(batch.answers) == 1 else scores[start:start + len(a.images)]
                start += len(a.images)
            a.done = True
            if a.turn is not None:
                a.turn.release()
            elif a.told is not None:
                a.told(a)

    def _end(self) -> None:
        with self._lock:
            first, self._over = not self._over, True
            if first and self._owner is not None:
                self._owner.put(False)
        if first:
            self._session.close()
            self.ended.set()
