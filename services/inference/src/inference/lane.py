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
from inference.fast import IS_JSON, Asked, Route
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


@dataclass(slots=True, eq=False)
class Request:
    """began: when it was whole; input_ns: what its decoding took."""

    connection: "Connection"
    route: Route
    body: bytes
    top_k: int
    began: int
    input_ns: int = 0

    def go_the_usual_way(self) -> None:
        self.connection.begin(self.route.steps(self.body))


class Lane:
    """Of one Name and alias; the front's thread alone."""

    def __init__(self, front: "Front", name: str, alias: str):
        self.front, self.api, self.name, self._alias = front, front.fast.api, name, alias
        self.model = model_called(name, alias)
        self._queue_s = self.api.settings.queue_ms / 1000 or float("inf")
        self._waiting: list[Request] = []
        self._decode_s = 0.0  # lately, of an image

    def takes(self, body: bytes) -> bool:
        """Whether an image can be answered here: it is small, what answers is loaded, nobody but the client is told."""
        return (self._served() is not None and weight(body[:32], len(body)) <= LIGHT
                and not self.api.shadow.share and self.api.statistics.ended is None)

    def is_full(self) -> bool:
        """Whether one more would wait for longer than QUEUE_MS, as far as can be told; it is counted as refused."""
        served, waiting = self._served(), len(self._waiting)
        if served is None or not served.loaded.predictor.is_full(self._queue_s - waiting * self._decode_s, waiting):
            return False
        self.api.statistics.refused((self.model, served.version))
        return True

    def take(self, connection: "Connection", route: Route, asked: Asked, body: bytes) -> None:
        """Let it run with the others of this turn."""
        if not self._waiting:
            self.front.loop.call_soon(self._answer)
        self._waiting.append(Request(connection, route, body, asked.top_k, time.monotonic_ns()))

    def _served(self) -> Served | None:
        return self.api.loaded.pointed(self.name, self._alias)

    def _answer(self) -> None:
        waiting, self._waiting = self._waiting, []
        served = self._served()
        if served is None:
            for request in waiting:
                request.go_the_usual_way()
            return
        most = served.loaded.predictor.most
        for start in range(0, len(waiting), most):
            self._run(served, waiting[start:start + most])

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
