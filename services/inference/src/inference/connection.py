"""One client's connection to the front, until it asks for what granian answers: then it becomes a pipe."""

import asyncio
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

from inference import errors, heads, reply
from inference.batch import Answer
from inference.body import PIECE, cut_off, stalled
from inference.fast import Route
from inference.lane import Refusing
from inference.pipe import LINGER_S, Pipe, first
from inference.predictor import NotInTime
from inference.reply import Headers
from inference.steps import Aside, Ask, Steps
from inference.unread import Unread

if TYPE_CHECKING:
    from inference.front import Front

NEVER = float("inf")
ONE_BUFFER = 8 << 20  # bytes of a body that goes straight to where it is read; a larger one may never come whole
AHEAD = 64 << 10  # bytes that a client may send before its last request is answered


class Outcome:
    """Where the steps of a request stand: at an Ask, before what takes long (None, Aside), over or failed."""

    __slots__ = ("ask", "error", "over", "result")

    def __init__(self, steps: Steps[Any], answer: Answer | None = None, error: Exception | None = None):
        """Go on as far as it goes without waiting."""
        self.ask: Ask | Aside | None = None
        self.error: Exception | None = None
        self.over, self.result = False, None
        try:
            self.ask = steps.send(answer) if error is None else steps.throw(error)
        except StopIteration as e:
            self.over, self.result = True, e.value
        except Exception as e:  # whatever happens is an answer
            self.over, self.error = True, e


class Connection(asyncio.BufferedProtocol):
    """Requests one after the other, until one is not plain."""

    def __init__(self, front: "Front"):
        self._front, self._intake = front, front.fast.api.intake
        self._parts: list[bytes] = []
        self._body: memoryview | None = None  # of a tensor, in one piece as it comes; then nothing of it is in _parts
        self._got, self._need = 0, 0  # bytes that came, and that the next request has as far as is known
        self._body_at = 0
        self._heard = NEVER  # when the latest part of a request came that is not whole
        self._route: Route | None = None
        self._steps: Steps[Any] | None = None
        self._answer: Answer | None = None
        self._asks = False  # a whole request is not answered yet
        self.leaving: Callable[[], None] | None = None  # to be called when the client leaves before that
        self._taken = 0  # of a large body, the bytes that have come: of the memory set aside for such
        self._holds_slot = self._full = self._last = self._refused = False
        self._unread = Unread()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by name
        self._front.open.add(self)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._front.scratch if self._body is None else self._body[self._got - self._body_at:]

    def buffer_updated(self, nbytes: int) -> None:
        refusing = self._front.refusing
        if refusing is not None and refusing.size == nbytes and not (self._got or self._asks or self._full) \
                and self._front.scratch[:len(refusing.head)] == refusing.head:
            refusing.lane.refused += 1
            self._transport.write(refusing.answer)
        elif self._body is None:
            self.data_received(bytes(self._front.scratch[:nbytes]))
        else:
            self._arrived(nbytes)

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        self._parts.append(data)
        self._arrived(len(data))

    def _arrived(self, more: int) -> None:
        self._got += more
        if self._got > self._need + AHEAD:
            self._transport.pause_reading()
        if self._asks or self._full:
            return
        if self._holds_slot and not self._has_room():
            return
        if self._got >= self._need:
            self._next()
        else:
            self._heard = time.monotonic()

    def pause_writing(self) -> None:
        self._full = True

    def resume_writing(self) -> None:
        self._full = False
        if not self._asks:
            self._go_on()

    def eof_received(self) -> bool:
        """A client that has sent its end is taken for gone, unless it still owes a body: then it is told so."""
        route = self._route
        if route is None or self._asks:
            return False
        self._last = True
        self.fail(cut_off(self._got - self._body_at, route.size))
        return True

    def connection_lost(self, error: Exception | None) -> None:
        """The client is gone: what waits for its turn is not run."""
        self._front.open.discard(self)
        self._intake.give(self._leave())
        self._drop_body()
        if self.leaving is not None:
            self.leaving()
        if self._answer is not None:
            self._front.give_up(self._answer)
            if self._steps is not None:
                self._steps.close()
        self._last = True

    def close_when_idle(self) -> None:
        self._last = True
        if self._route is None:
            self._transport.close()

    def give_up_before(self, before: float, unread: float) -> None:
        """If the rest of a request has not come, and nothing of it since then, end the connection; also if nothing of
        an answer was read since `unread`.
        """
        if self._unread.since(self._transport, unread):
            self._transport.abort()
        elif self._heard >= before or self._transport.is_closing():
            return
        if self._route is None:
            self._transport.close()
        else:
            self._last = True
            self.fail(stalled(self._front.stall_s))

    def answered(self, answer: Answer) -> None:
        """By the front."""
        self._answer = None
        assert self._steps is not None
        error = answer.error if answer.done else NotInTime()
        self._take(Outcome(self._steps, answer if error is None else None, error))

    def _next(self) -> None:
        """Begin the next request, if it is whole."""
        if self._route is not None and self._body is not None:
            if self._got >= self._need:
                body = self._drop_body()
                self._got = self._need = 0
                self._begin_large(self._route, lambda route, taken: self._given(route, body, taken))
            return
        if self._route is not None and self._route.size > PIECE:
            if self._got >= self._need:
                self._large(self._route)
            return
        data = self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)
        self._parts = [data]
        if self._route is None:
            end = data.find(b"\r\n\r\n")
            if end < 0 and heads.may_be_plain(data):
                self._heard = time.monotonic()
                return
            self._route = self._front.route(data[:end]) if 0 <= end <= heads.LIMIT else None
            if self._route is None:
                self._hand_over(data)
                return
            self._body_at = end + 4
            self._need = self._body_at + self._route.size
            self._last = self._last or self._route.ends
        if len(data) < self._need:
            self._wait_for_body(data[:self._body_at])
            return
        self._leave()
        self._heard = NEVER
        route, body = self._route, data[self._body_at:self._need]
        self._parts, self._got = ([data[self._need:]], len(data) - self._need) if len(data) > self._need else ([], 0)
        self._need = 0
        lane = self._front.lane(route, body)
        if lane is None:
            if route.is_full():
                self._write(*reply.busy(route.path))
            else:
                self._asks = True
                self.begin(route.steps(body))
        elif lane.refuses():
            if not (self._got or self._last):
                self._front.refusing = Refusing(lane, data[:self._body_at], len(data), reply.whole(
                    *reply.busy(route.path), self._front.fast.headers, last=False))
            self.reply(*reply.busy(route.path))
        else:
            self._asks = True
            lane.take(self, route, body)

    def _large(self, route: Route) -> None:
        """Begin a request whose body has come in many pieces; these become one in a thread beside the loop."""
        parts, more = self._parts, self._got - self._need
        self._parts, self._got, self._need = [], more, 0
        if more:
            self._parts.append(parts[-1][-more:])
            parts[-1] = parts[-1][:-more]
        parts[0] = parts[0][self._body_at:]
        self._begin_large(route, lambda route, taken: self._joined(route, parts, taken))

    def _begin_large(self, route: Route, steps: Callable[[Route, int], Steps[Any]]) -> None:
        self._heard, taken = NEVER, self._leave()
        if route.is_full():
            self._intake.give(taken)
            self._write(*reply.busy(route.path))
        else:
            self._asks = True
            self.begin(steps(route, taken))

    def _given(self, route: Route, body: memoryview, taken: int) -> Steps[Any]:
        """The steps of a body that lies in one piece already; in a large one there may be much to read."""
        self._intake.give(taken)
        if len(body) > PIECE:
            yield None
        steps = route.steps(body)
        del body  # the steps let go of it when they have read it
        return (yield from steps)

    def _joined(self, route: Route, parts: list[bytes], taken: int) -> Steps[Any]:
        """The steps of a body in parts, which count as taken until a thread has them."""
        try:
            yield None
            steps = route.steps(b"".join(parts))
            parts.clear()
        finally:
            self._intake.give(taken)
        return (yield from steps)

    def begin(self, steps: Steps[Any]) -> None:
        """Answer the request by these."""
        if self._transport.is_closing():
            steps.close()
            return
        self._steps, self.leaving = steps, None
        self._take(Outcome(steps))

    def _wait_for_body(self, head: bytes) -> None:
        self._heard = time.monotonic()
        if self._holds_slot:
            return
        try:
            self._intake.enter()
        except Exception as e:
            self._turn_away(e)
            return
        self._holds_slot = True
        if not self._has_room():
            return
        if heads.expects(head):
            self._transport.write(reply.CONTINUE)
        assert self._route is not None
        if self._route.room is not None and AHEAD < self._route.size <= ONE_BUFFER:
            self._body, parts = self._route.room(), self._parts
            self._body[:self._got - self._body_at], self._parts = parts[0][self._body_at:], []
            self._front.arriving += 1

    def _has_room(self) -> bool:
        """Whether what has come of a body may be kept; if not its client has been told so."""
        assert self._route is not None
        if self._route.size > PIECE:
            more = min(self._got, self._need) - self._body_at - self._taken
            try:
                self._intake.take(more)
            except Exception as e:
                self._turn_away(e)
                return False
            self._taken += more
        return True

    def _drop_body(self) -> memoryview | None:
        """That of a tensor, which is not on its way any more."""
        body, self._body = self._body, None
        self._front.arriving -= body is not None
        return body

    def _turn_away(self, error: Exception) -> None:
        """What comes of the body yet is not read."""
        self._last = True
        self.fail(error)

    def _leave(self) -> int:
        """The slot of those whose body is on its way. Returns the memory that is the caller's now to give back."""
        taken, self._taken = self._taken, 0
        if self._holds_slot:
            self._holds_slot = False
            self._intake.leave()
        return taken

    def _take(self, outcome: Outcome) -> None:
        steps = self._steps
        assert steps is not None
        while not outcome.over:
            try:
                if isinstance(outcome.ask, Ask):
                    self._answer = self._front.submit(self, outcome.ask)
                else:
                    self._front.aside(self._elsewhere, steps, outcome.ask)
                return
            except Exception as e:
                outcome = Outcome(steps, error=e)
        if outcome.error is not None:
            self.fail(outcome.error)
        elif outcome.result is not None:
            self._write(200, *outcome.result)

    def _elsewhere(self, steps: Steps[Any]) -> None:
        """In a thread of the pool. Of a client that left meanwhile nothing more is decoded."""
        outcome = None if self._transport.is_closing() else Outcome(steps)
        self._front.loop.call_soon_threadsafe(self._back, steps, outcome)

    def _back(self, steps: Steps[Any], outcome: Outcome | None) -> None:
        if outcome is None or self._transport.is_closing():
            steps.close()
        else:
            self._take(outcome)

    def fail(self, error: Exception) -> None:
        """Answer the request with what went wrong."""
        route = self._route
        assert route is not None
        self._write(*errors.form(route.path, *errors.explain(error, "POST", route.path)))

    def _write(self, status: int, body: bytes, headers: Headers) -> None:
        route = self._route
        assert route is not None
        self._front.fast.api.meters.answered("POST", route.rule, status)
        self.reply(status, body, headers)

    def reply(self, status: int, body: bytes, headers: Headers) -> None:
        """Send the answer, which its caller counts, unless the client is gone; then go on with its next request."""
        self.leaving = None
        if self._transport.is_closing():
            return
        self._transport.write(reply.whole(status, body, headers, self._front.fast.headers, self._last))
        self._route, self._steps, self._asks = None, None, False
        if self._got < self._need:
            self._end_after_answer()
        elif self._last:
            self._transport.close()
        elif self._got or not self._transport.is_reading():
            self._front.loop.call_soon(self._go_on)

    def _end_after_answer(self) -> None:
        """Of a client that may still send the body: closed at once, that would wipe out the answer at its end."""
        self._refused, self._parts = True, []
        self._drop_body()
        self._intake.give(self._leave())
        self._transport.write_eof()
        self._front.loop.call_later(LINGER_S, self._transport.close)

    def _go_on(self) -> None:
        """With what came meanwhile."""
        if not (self._full or self._asks or self._transport.is_closing()):
            if self._got:
                self._next()
            if self._got <= self._need + AHEAD and not self._transport.is_reading():
                self._transport.resume_reading()

    def _hand_over(self, data: bytes) -> None:
        """Every byte from here on is granian's."""
        self._front.open.discard(self)
        self._transport.pause_reading()
        pipe = Pipe(self._front, self._transport, *first(data))
        self._transport.set_protocol(pipe)
        self._front.connecting(pipe.connect(data))
