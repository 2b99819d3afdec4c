"""Predictions of one image that one turn of the front's loop has read: decoded, run, encoded and counted together.

Each step is done for all of them before the next one begins: between other work decoding takes twice as long, for
code and data leave the processor's caches, and what is counted is counted once. The answers are those of
`predict.label`. Whatever is unusual in any way, an image that can't be decoded or a Variant that is being replaced,
goes that way instead, and fails there.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from inference.codec import top, weight
from inference.fast import IS_JSON, Route
from inference.loaded import Served
from inference.predict import RULE, render
from inference.predictor import SMOOTH, Answer
from inference.scores import DEADLINE_S, LIGHT, late, model_called
from inference.steps import Ask
from shared.errors import LannerError
from shared.images import decode_into

if TYPE_CHECKING:
    from inference.connection import Connection
    from inference.front import Front

NEXT_S = 0.001  # a turn that begins so soon after the last one has found its requests waiting


@dataclass(slots=True, eq=False)
class Request:
    """began: when it was whole; input_ns: what its decoding took."""

    connection: "Connection"
    route: Route
    body: bytes
    began: int
    input_ns: int = 0

    @property
    def top_k(self) -> int:
        return self.route.asked.top_k

    def go_the_usual_way(self) -> None:
        self.connection.begin(self.route.steps(self.body))


class Lane:
    """Of one Name and alias; the front's thread alone."""

    def __init__(self, front: "Front", name: str, alias: str):
        self.front, self.api, self.name, self._alias = front, front.fast.api, name, alias
        self.model = model_called(name, alias)
        self._queue_s = self.api.settings.queue_ms / 1000 or float("inf")
        self._waiting: list[Request] = []  # of this turn, as the three below
        self._refused, self._full, self._begun = 0, False, False
        self._decode_s = 0.0  # lately, of an image
        self._ended, self._took_s, self._unread_s = 0.0, 0.0, 0.0

    def takes(self, body: bytes) -> bool:
        """Whether an image can be answered here: it is small, what answers is loaded, nobody but the client is told."""
        return (self._served() is not None and weight(body[:32], len(body)) <= LIGHT
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
        self._refused += self._full
        return self._full

    def take(self, connection: "Connection", route: Route, body: bytes) -> None:
        """Let it run with the others of this turn."""
        self._begin()
        self._waiting.append(Request(connection, route, body, time.monotonic_ns()))

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
        waiting, refused, served = self._waiting, self._refused, self._served()
        self._waiting, self._refused, self._full, self._begun = [], 0, False, False
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
        """At most as many as the Predictor runs together."""
        size, whole = served.loaded.spec.size, list[Request]()
        images = np.empty((len(requests), size, size, 3), np.uint8)
        for request in requests:
            began = time.monotonic_ns()
            try:
                decode_into(request.body, images[len(whole)])
            except LannerError:
                request.go_the_usual_way()
                continue
            request.input_ns = time.monotonic_ns() - began
            whole.append(request)
        if not whole:
            return
        self._decode_s += (sum(r.input_ns for r in whole) / 1e9 / len(whole) - self._decode_s) * SMOOTH
        since = [(r.began + r.input_ns) / 1e9 for r in whole]  # what passed besides decoding is waiting
        ask = Ask(served.loaded.predictor, images[:len(whole)], time.monotonic() + DEADLINE_S, queue_s=self._queue_s)
        group = Group(self, served, whole)
        try:
            answer = self.front.run(group, ask, since)
        except Exception:  # Closed, Unavailable, NotInTime: said there to each
            for request in whole:
                request.go_the_usual_way()
            return
        if not answer.done:
            group.wait(answer)


class Group:
    """Requests whose images run as one."""

    def __init__(self, lane: Lane, served: Served, requests: Sequence[Request]):
        self._lane, self._served, self._requests, self._left = lane, served, requests, 0

    def wait(self, answer: Answer) -> None:
        """Nobody computes for them any more once all of their clients have left."""
        for request in self._requests:
            request.connection.leaving = lambda: self._leave(answer)

    def _leave(self, answer: Answer) -> None:
        self._left += 1
        if self._left == len(self._requests):
            self._lane.front.give_up(answer)

    def answered(self, answer: Answer) -> None:
        """By the front."""
        if answer.scores is not None:
            self._reply(answer, answer.scores)
            return
        for request in self._requests:
            if answer.done:  # the runtime failed, which is said there to each
                request.go_the_usual_way()
            else:
                self._lane.api.statistics.refused((self._lane.model, self._served.version))
                request.connection.fail(late(DEADLINE_S))

    def _reply(self, answer: Answer, scores: np.ndarray) -> None:
        began, lane, served, requests = time.monotonic_ns(), self._lane, self._served, self._requests
        meters, count = lane.api.meters, len(requests)
        found = top(scores, served.loaded.spec.labels, max(r.top_k for r in requests))
        bodies = [render(lane.name, served, [{"top": one["top"][:r.top_k]}])
                  for one, r in zip(found, requests, strict=True)]
        input_ns = [r.input_ns for r in requests]
        lane.api.statistics.together((lane.model, served.version), [r.began for r in requests], input_ns, answer, began)
        meters.decode.observe(*(ns / 1e9 for ns in input_ns))
        meters.encode.observe(*[(time.monotonic_ns() - began) / 1e9 / count] * count)
        meters.predicted(lane.name, count)
        meters.answered("POST", RULE, 200, count)
        for request, body in zip(requests, bodies, strict=True):
            request.connection.reply(200, body, IS_JSON)
