"""One client's connection to the front, and the pipe that it becomes when it asks for what granian answers."""

import asyncio
import re
import time
from collections.abc import Callable
from email.utils import formatdate
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from inference import errors, heads
from inference.body import PIECE, cut_off, stalled
from inference.fast import STATUS, Headers, Route
from inference.predictor import BUSY, Answer, NotInTime
from inference.steps import Ask, Steps
from shared.errors import Unavailable

if TYPE_CHECKING:
    from inference.front import Front

NEVER = float("inf")
LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*([0-9]{1,12})[ \t]*\r\n", re.IGNORECASE)
AHEAD = 64 << 10  # bytes that a client may send before its last request is answered


class Outcome:
    """Where the steps of a request stand: at an Ask, before what takes long (None), over or failed."""

    __slots__ = ("ask", "error", "over", "result")

    def __init__(self, steps: Steps[Any], answer: Answer | None = None, error: Exception | None = None):
        """Go on as far as it goes without waiting."""
        self.ask: Ask | None = None
        self.error: Exception | None = None
        self.over, self.result = False, None
        try:
            self.ask = steps.send(answer) if error is None else steps.throw(error)
        except StopIteration as e:
            self.over, self.result = True, e.value
        except Exception as e:  # whatever happens is an answer
            self.over, self.error = True, e


class Connection(asyncio.Protocol):
    """Requests one after the other, until one is not plain."""

    def __init__(self, front: "Front"):
        self._front, self._intake = front, front.fast.api.intake
        self._parts: list[bytes] = []
        self._got, self._need = 0, 0  # bytes that came, and that the next request has as far as is known
        self._body_at = 0
        self._heard = NEVER  # when the latest part of a request came that is not whole
        self._route: Route | None = None
        self._steps: Steps[Any] | None = None
        self._answer: Answer | None = None
        self._asks = False  # a whole request is not answered yet
        self.leaving: Callable[[], None] | None = None  # to be called when the client leaves before that
        self._holds_slot = self._full = self._last = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._front.open.add(self)

    def data_received(self, data: bytes) -> None:
        self._parts.append(data)
        self._got += len(data)
        if self._asks or self._full:
            if self._got > AHEAD:
                self._transport.pause_reading()
        elif self._got >= self._need:
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
        self._leave()
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

    def give_up_before(self, before: float) -> None:
        """If the rest of a request has not come, and nothing of it since then, end the connection."""
        if self._heard >= before or self._transport.is_closing():
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
        if len(data) < self._need:
            self._wait_for_body()
            return
        self._leave()
        self._heard = NEVER
        route, body = self._route, data[self._body_at:self._need]
        self._parts, self._got = ([data[self._need:]], len(data) - self._need) if len(data) > self._need else ([], 0)
        self._need = 0
        lane = self._front.lane(route, body)
        if lane is None:
            if route.is_full():
                self._write(*_busy(route.path))
            else:
                self._asks = True
                self.begin(route.steps(body))
        elif lane.refuses():
            self.reply(*_busy(route.path))
        else:
            self._asks = True
            lane.take(self, route, body)

    def begin(self, steps: Steps[Any]) -> None:
        """Answer the request by these."""
        if self._transport.is_closing():
            steps.close()
            return
        self._steps, self.leaving = steps, None
        self._take(Outcome(steps))

    def _wait_for_body(self) -> None:
        self._heard = time.monotonic()
        if not self._holds_slot:
            try:
                self._intake.enter()
            except Exception as e:
                self._last = True
                self.fail(e)
                return
            self._holds_slot = True

    def _leave(self) -> None:
        if self._holds_slot:
            self._holds_slot = False
            self._intake.leave()

    def _take(self, outcome: Outcome) -> None:
        steps = self._steps
        assert steps is not None
        while not outcome.over:
            if outcome.ask is None:
                self._front.pool.submit(self._elsewhere, steps)
                return
            try:
                self._answer = self._front.submit(self, outcome.ask)
                return
            except Exception as e:
                outcome = Outcome(steps, error=e)
        if outcome.error is not None:
            self.fail(outcome.error)
        elif outcome.result is not None:
            self._write(200, *outcome.result)

    def _elsewhere(self, steps: Steps[Any]) -> None:
        """In a thread of the pool."""
        outcome = Outcome(steps)
        self._front.loop.call_soon_threadsafe(self._back, steps, outcome)

    def _back(self, steps: Steps[Any], outcome: Outcome) -> None:
        if self._transport.is_closing():
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
        """Send the answer, which is counted already, unless the client is gone; then go on with its next request."""
        if self._transport.is_closing():
            return
        self._transport.write(_answer(status, body, headers, self._front.fast.headers, self._last))
        self._route, self._steps, self._asks, self.leaving = None, None, False, None
        if self._last:
            self._transport.close()
        elif self._got or not self._transport.is_reading():
            self._front.loop.call_soon(self._go_on)

    def _go_on(self) -> None:
        """With what came meanwhile."""
        if not (self._full or self._asks or self._transport.is_closing()):
            if self._got:
                self._next()
            if not self._transport.is_reading():
                self._transport.resume_reading()

    def _hand_over(self, data: bytes) -> None:
        """Every byte from here on is granian's."""
        self._front.open.discard(self)
        self._transport.pause_reading()
        pipe = Pipe(self._front, self._transport, *_first(data))
        self._transport.set_protocol(pipe)
        self._front.connecting(pipe.connect(data))


class Pipe(asyncio.Protocol):
    """One end of a connection that is passed on; what it receives the other end writes."""

    def __init__(self, front: "Front", client: asyncio.Transport | None = None, path: str = "", owed: int = 0):
        """client: its connection; without it this is the end towards granian. path, owed: of its first request, the
        bytes of its body that have not come.
        """
        self._front, self._is_client = front, client is not None
        self._other: Pipe | None = None
        self._path, self._owed, self._heard, self._silent = path, owed, time.monotonic(), True
        if client is not None:
            self.transport = client
            client.set_write_buffer_limits(PIECE)
            front.open.add(self)

    async def connect(self, data: bytes) -> None:
        """Reach granian and send it what has come. The client is cut off where that can't be."""
        try:
            _, server = await self._front.loop.create_unix_connection(lambda: Pipe(self._front),
                                                                      str(self._front.behind))
        except OSError:
            self.transport.abort()
            return
        if self.transport.is_closing():
            server.transport.abort()
            return
        self._other, server._other = server, self
        server.transport.write(data)
        self.transport.resume_reading()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        transport.set_write_buffer_limits(PIECE)

    def data_received(self, data: bytes) -> None:
        self._silent = False
        if self._owed > 0:
            self._owed, self._heard = self._owed - len(data), time.monotonic()
        if self._other is not None:
            self._other.transport.write(data)

    def eof_received(self) -> bool:
        """granian is told that the client has sent all, and still answers; where granian ends, all is over."""
        if self._other is None or not self._is_client:
            return False
        self._other.transport.write_eof()
        return True

    def pause_writing(self) -> None:
        if self._other is not None:
            self._other.transport.pause_reading()

    def resume_writing(self) -> None:
        if self._other is not None and not self._other.transport.is_closing():
            self._other.transport.resume_reading()

    def connection_lost(self, error: Exception | None) -> None:
        self._front.open.discard(self)
        if self._other is not None:
            self._other.transport.close()

    def close_when_idle(self) -> None:
        """granian does."""

    def give_up_before(self, before: float) -> None:
        """As Connection's, for the first body; what follows on this connection nobody here reads."""
        if self._owed <= 0 or self._other is None or self.transport.is_closing():
            return
        if not self.transport.is_reading():  # granian is late, not the client
            self._heard = time.monotonic()
        elif self._heard < before:
            if self._other._silent:
                error = stalled(self._front.stall_s)
                status, body, headers = errors.form(self._path, *errors.explain(error, "POST", self._path))
                self.transport.write(_answer(status, body, headers, self._front.fast.headers, last=True))
            self.transport.close()


@lru_cache(256)
def _busy(path: str) -> tuple[int, bytes, Headers]:
    return errors.form(path, *errors.explain(Unavailable(BUSY, "busy"), "POST", path))


def _answer(status: int, body: bytes, headers: Headers, more: tuple[tuple[str, str], ...], last: bool) -> bytes:
    head = _head(status, tuple(headers), more, last)
    return b"%bContent-Length: %d\r\nDate: %b\r\n\r\n%b" % (head, len(body), date(), body)


def _first(data: bytes) -> tuple[str, int]:
    """The first request's path, and the bytes of its body that have not come; 0 where its head does not tell here."""
    end = data.find(b"\r\n\r\n")
    found = LENGTH.search(data, 0, end + 2) if end >= 0 else None
    path = data[:data.find(b"\r\n")].split(b" ")[1:2]
    return path[0].decode("latin-1") if path else "", int(found[1]) - (len(data) - end - 4) if found else 0


@lru_cache(256)
def _head(status: int, headers: tuple[tuple[str, str], ...], more: tuple[tuple[str, str], ...], last: bool) -> bytes:
    lines = [f"HTTP/1.1 {STATUS[status]}", *(f"{name}: {value}" for name, value in (*headers, *more)),
             *(["Connection: close"] if last else [])]
    return "\r\n".join(lines).encode() + b"\r\n"


def date() -> bytes:
    return _date(int(time.time()))


@lru_cache(1)
def _date(second: int) -> bytes:
    return formatdate(second, usegmt=True).encode()
