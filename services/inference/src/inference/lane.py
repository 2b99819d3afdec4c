"""Predictions of one image that one turn of the front's loop has read: decoded, run, encoded and counted together.

Each step is done for all of them before the next one begins: between other work decoding takes twice as long, for
code and data leave the processor's caches, and what is counted is counted once. The answers are those of
`predict.label`. Whatever is unusual in any way, an image that can't be decoded or a Variant that is being replaced,
goes that way instead, and fails there.
"""

import logging
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from inference.batch import Answer
from inference.codec import JPEG, JPEG_PIXELS, top, weight
from inference.fast import IS_JSON, Route
from inference.loaded import Served
from inference.predict import RULE, begin, render
from inference.predictor import SMOOTH, Closed, NotInTime
from inference.scores import DEADLINE_S, LIGHT, late, model_called
from inference.steps import Ask
from shared.errors import Refused, Unavailable
from shared.images import decode_into

if TYPE_CHECKING:
    from inference.connection import Connection
    from inference.front import Front

log = logging.getLogger("lanner.lane")
NEXT_S = 0.001  # a turn that begins so soon after the last one has found its requests waiting


@dataclass(slots=True, eq=False)
class Request:
    """began: when it was whole; input_ns: what decoding took; over: it is answered, or elsewhere; left: by its client.
    """

    connection: "Connection"
    route: Route
    body: bytes
    began: int
    input_ns: int = 0
    over: bool = False
    left: bool = False

    @property
    def top_k(self) -> int:
        assert self.route.asked is not None
        return self.route.asked.top_k

    def go_the_usual_way(self) -> None:
        if not self.over:
            self.over = True
            self.connection.begin(self.route.steps(self.body))


@dataclass(frozen=True, slots=True)
class Refusing:
    """Once a turn is full: requests of `size` bytes with this head are told `answer`, and no more is read of them.

    It takes a fifth of the time; under overload that is what the core that answers has left for others.
    """

    lane: "Lane"
    head: bytes
    size: int
    answer: bytes


class Lane:
    """Of one Name and alias; the front's thread alone."""

    def __init__(self, front: "Front", name: str, alias: str):
        self.front, self.api, self.name, self._alias = front, front.fast.api, name, alias
        self.model = model_called(name, alias)
        self._queue_s = self.api.settings.queue_ms / 1000 or float("inf")
        self._waiting: list[Request] = []  # of this turn, as the three below
        self.refused, self._full, self._begun = 0, False, False
        self._decode_s = 0.0  # lately, of an image
        self._begins: tuple[weakref.ref[Served], bytes] | None = None
        self._ended, self._took_s = 0.0, 0.0  # when the last turn did, and what its end took
        self._unread_s = 0.0  # that this turn's requests waited before they were read

    def takes(self, body: bytes) -> bool:
        """Whether an image can be answered here: it is small, what answers is loaded, nobody but the client is told."""
        light = len(body) <= LIGHT and (body.startswith(JPEG) or weight(body, len(body)) <= LIGHT)
        return (light and self._served() is not None
                and not self.api.shadow.share and self.api.statistics.ended is None)

    def refuses(self) -> bool:
        """Whether one more would wait for longer than QUEUE_MS, as far as can be told; then it is counted as refused.

        Once a turn is full it stays so: most that is asked of an overloaded host ends here, and must cost little.
        """
        if self._queue_s == float("inf"):
            return False
        if not self._full:
            self._begin()
            served, waiting = self._served(), len(self._waiting)
            left_s = self._queue_s - self._unread_s - waiting * self._decode_s
            self._full = served is not None and served.loaded.predictor.is_full(left_s, waiting)
        self.refused += self._full
        return self._full

    def take(self, connection: "Connection", route: Route, body: bytes) -> None:
        """Let it run with the others of this turn."""
        self._begin()
        self._waiting.append(Request(connection, route, body, time.monotonic_ns()))

    def beginning(self, served: Served) -> bytes:
        """Of the answers; the same until another one is served."""
        if self._begins is None or self._begins[0]() is not served:  # what is replaced must not be kept
            self._begins = weakref.ref(served), begin(self.name, served)
        return self._begins[1]

    def _served(self) -> Served | None:
        return self.api.loaded.pointed(self.name, self._alias)

    def _begin(self) -> None:
        if not self._begun:
            self._begun = True
            # What comes while a turn ends is read when it has: half of that time ago, as far as can be told.
            self._unread_s = self._took_s / 2 if time.monotonic() - self._ended < NEXT_S else 0.0
            self.front.loop.call_soon(self._end)

    def _end(self) -> None:
        """Of the turn."""
        began = time.monotonic()
        waiting, refused, served = self._waiting, self.refused, self._served()
        self._waiting, self.refused, self._full, self._begun = [], 0, False, False
        self.front.refusing = None
        if refused:
            self.api.meters.answered("POST", RULE, 503, refused)
            if served is not None:
                self.api.statistics.refused((self.model, served.version), refused)
        if served is None:
            for request in waiting:
                request.go_the_usual_way()
            return
        most = served.loaded.predictor.most
        for start in range(0, len(waiting), most):
            self._run(served, waiting[start:start + most])
        self._ended = time.monotonic()
        self._took_s = self._ended - began

    def _run(self, served: Served, requests: Sequence[Request]) -> None:
        """At most as many as the Predictor runs together; whatever happens, each is answered."""
        group = Group(self, served)
        try:
            deadline = requests[0].began / 1e9 + DEADLINE_S
            served.loaded.predictor.check(deadline, self._queue_s)
            images, group.requests = self._decoded(requests, served.loaded.spec.size)
            if not group.requests:
                return
            since = [(r.began + r.input_ns) / 1e9 for r in group.requests]  # what passed besides decoding is waiting
            answer = self.front.run(group, Ask(served.loaded.predictor, images, deadline, queue_s=self._queue_s), since)
        except (Closed, NotInTime, Unavailable):  # which is said there to each, or it is asked anew
            for request in requests:
                request.go_the_usual_way()
        except Exception as e:
            log.exception("predictions failed")
            group.fail(e, requests)
        else:
            if not answer.done:
                group.wait(answer)

    def _decoded(self, requests: Sequence[Request], size: int) -> tuple[np.ndarray, list[Request]]:
        """uint8 [N, size, size, 3] and the requests that these are of; the others go the usual way."""
        images, whole = np.empty((len(requests), size, size, 3), np.uint8), list[Request]()
        for request in requests:
            began = time.monotonic_ns()
            try:
                decode_into(request.body, images[len(whole)], JPEG_PIXELS * LIGHT)  # of a JPEG they are counted here
            except Refused:
                request.go_the_usual_way()
                continue
            request.input_ns = time.monotonic_ns() - began
            whole.append(request)
        if whole:
            self._decode_s += (sum(r.input_ns for r in whole) / 1e9 / len(whole) - self._decode_s) * SMOOTH
        return images[:len(whole)], whole


class Group:
    """Requests whose images run as one."""

    def __init__(self, lane: Lane, served: Served):
        self._api, self._name, self._served, self._beginning = lane.api, lane.name, served, lane.beginning(served)
        self._front, self._model = lane.front, (lane.model, served.version)
        self.requests: list[Request] = []
        self._waits = False

    def wait(self, answer: Answer) -> None:
        """Nobody computes for them any more once all of their clients have left."""
        self._waits = True
        self._api.statistics.waiting(self._model, len(self.requests))
        for request in self.requests:
            request.connection.leaving = partial(self._leave, request, answer)

    def _leave(self, request: Request, answer: Answer) -> None:
        if request.over:
            return
        request.left = True
        self._api.statistics.waiting(self._model, -1)
        self._api.statistics.failed(self._model, [request.began])
        if all(r.left for r in self.requests):
            self._front.give_up(answer)

    def answered(self, answer: Answer) -> None:
        """By the front."""
        if self._waits:
            self._api.statistics.waiting(self._model, -sum(not r.left for r in self.requests))
        if answer.scores is None:
            self.fail(answer.error or late(DEADLINE_S), self.requests)
            return
        began = time.monotonic_ns()
        try:
            bodies = self._bodies(answer.scores)
        except Exception as e:  # whatever happens is an answer
            log.exception("answers could not be written")
            self.fail(e, self.requests)
            return
        told = [(r, body) for r, body in zip(self.requests, bodies, strict=True) if not r.left]
        ended = time.monotonic_ns()
        for request, body in told:
            request.over = True
            request.connection.reply(200, body, IS_JSON)
        # Clients read and ask again meanwhile; who asks for what was counted is heard by this thread, later.
        self._count(answer, began, ended, [r for r, _ in told])

    def fail(self, error: Exception, requests: Sequence[Request]) -> None:
        """Tell it to all that are not answered and have not gone the usual way."""
        failed = [r for r in requests if not (r.over or r.left)]
        self._api.statistics.failed(self._model, [r.began for r in failed])
        for request in failed:
            request.over = True
            request.connection.fail(error)

    def _bodies(self, scores: np.ndarray) -> list[bytes]:
        entries, most = self._served.loaded.entries, {r.top_k for r in self.requests}
        found = top(scores, entries, *most) if len(most) == 1 else [
            top(row[None], entries, r.top_k)[0] for row, r in zip(scores, self.requests, strict=True)]
        return [render(self._beginning, [one]) for one in found]

    def _count(self, answer: Answer, encoding: int, ended: int, requests: Sequence[Request]) -> None:
        """encoding, ended: when writing the answers began and was over."""
        meters, count, input_ns = self._api.meters, len(requests), [r.input_ns for r in requests]
        self._api.statistics.together(self._model, [r.began for r in requests], input_ns, answer, encoding, ended)
        meters.decode.observe(*(ns / 1e9 for ns in input_ns))
        meters.encode.observe(*[(ended - encoding) / 1e9 / count] * count)
        meters.predicted(self._name, count)
        meters.answered("POST", RULE, 200, count)
