"""What listens: it answers plain predictions itself, in one thread; every other connection goes on to granian.

A WSGI server gives each request a thread. Under load these wait for the interpreter and for each other several times a
request; that takes longer than a small model, and nobody knows who came first. Here one thread reads what has arrived,
decodes it, lets it run together and answers: first come, first served, and what would come too late is turned away for
little.

What is plain is decided by a request's head, strictly, and by FastPath. Of a connection that asks for anything else
every byte from there on is granian's, which knows all of HTTP: nothing is read in two ways.
"""

import asyncio
import logging
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import uvloop

from inference import closing
from inference.batch import Answer
from inference.body import STALL_S
from inference.connection import Connection
from inference.fast import FastPath, Route
from inference.heads import ends, environ_of
from inference.lane import Lane, Refusing
from inference.pipe import Pipe
from inference.predictor import BUSY, SMOOTH, Predictor
from inference.steps import Aside, Ask, Steps
from shared.errors import Unavailable

log = logging.getLogger("lanner.front")
SCRATCH = 32 << 10  # bytes; of a tensor as many are copied once more, before it is known to be one
CACHED = 2048  # bytes of a head that is kept: a client sends the same again and again
LOOK_S = 1.0  # how often stalled requests are looked for
SWEEP_S = 0.05  # by how much it may be noticed late that a deadline passed
BACKLOG = 1024
AT_ONCE = 64  # new connections
REST_S = 0.1  # in which file descriptors may come free
PARTING_S = 5.0  # the process ends: who has not read on by then is cut off
BEHIND = "LANNER_BEHIND"  # from the process that starts granian to the one that serves: the socket between them
LONG = 16  # threads for each kind of what takes long


def behind() -> Path:
    """Where granian listens."""
    return Path(os.environ[BEHIND])


def _bound(host: str, port: int, shared: bool) -> socket.socket:
    """A socket that does not listen yet. Raises OSError: the address can't be had."""
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        bound.setblocking(False)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if bound.family == socket.AF_INET6:
            bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        bound.bind((host, port))
    except BaseException:
        bound.close()
        raise
    return bound


class Waits(Protocol):
    """Who asked: it is told the Answer, or that it came too late."""

    def answered(self, answer: Answer) -> None: ...


class Front:
    """An event loop in one thread: everything but `start` and `told` is that thread's alone."""

    def __init__(self, fast: FastPath, behind: Path, stall_s: float = STALL_S):
        """behind: the socket of granian. stall_s: after which a request that is not whole, or an
        answer that is not read, is given up.
        """
        self.fast, self.behind, self.stall_s = fast, behind, stall_s
        self.loop = uvloop.new_event_loop()  # asyncio's takes longer: docs/benchmarks/serving.md
        self._decoding = ThreadPoolExecutor(LONG, thread_name_prefix="front")
        self._others = {what: ThreadPoolExecutor(LONG, thread_name_prefix=f"front-{what.name.lower()}")
                        for what in Aside}
        self._aside, self._aside_s = 0, 0.0  # what decodes or waits to, and how long that takes lately
        self.open: set[Connection | Pipe] = set()
        self.scratch = memoryview(bytearray(SCRATCH))  # what a socket has is read here, and taken away at once
        self._route = lru_cache(1024)(self._routed)
        self._asked: dict[Answer, Waits] = {}
        self._lanes: dict[tuple[str, str], Lane] = {}  # by Name and alias that there have been
        self.refusing: Refusing | None = None  # in this turn of the loop
        self._to_run: list[Predictor] = []
        self._looked_at: list[Predictor] = []  # of which something is under way
        self.arriving = 0  # bodies of which a part has come, and is read straight to where it stays
        self._done: deque[Answer] = deque()
        self._called = self._closing = False
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self, host: str, port: int, shared: bool) -> None:
        """Listen as soon as granian does, and answer until the process is asked to end.

        shared: other processes listen there, too. Raises OSError: the address can't be had.
        """
        self._socket = _bound(host, port, shared)
        self._listening = self.loop.create_task(self._listen())
        self.loop.add_reader(closing.READ, self._close)
        self.loop.call_later(SWEEP_S, self._sweep)
        self._look()
        self._thread = threading.Thread(target=self._serve, name="front")
        self._thread.start()

    def route(self, head: bytes) -> Route | None:
        """What a request with this head is answered by; None where that is granian."""
        return self._route(head) if len(head) <= CACHED else self._routed(head)

    def submit(self, who: Waits, ask: Ask) -> Answer:
        """Let it run: soon over, here with all else that is read in this turn of the loop; else elsewhere, and at once.

        Raises as `Predictor.submit`.
        """
        answer = ask.predictor.submit(ask.images, self.told, ask.deadline, ask.priority, ask.queue_s)
        self._asked[answer] = who
        if not ask.predictor.is_quick:  # a turn under overload may take longer than what waits: nothing idles meanwhile
            self._go(ask.predictor)
        elif ask.predictor not in self._to_run:
            if not self._to_run:
                self.loop.call_soon(self._run)
            self._to_run.append(ask.predictor)
        return answer

    def run(self, who: Waits, ask: Ask, since: Sequence[float]) -> Answer:
        """Let it run now. Who asks has been told when this returns if it was soon over. since: as `Predictor.submit`'s.

        Raises as that; then nobody is told.
        """
        answer = ask.predictor.submit(ask.images, self.told, ask.deadline, ask.priority, ask.queue_s, since)
        self._asked[answer] = who
        self._called = True  # it is, below
        try:
            self._go(ask.predictor)
        except BaseException:
            self.give_up(answer)
            raise
        finally:
            self._deliver()
        return answer

    def lane(self, route: Route, body: bytes) -> Lane | None:
        """Where a whole request is answered together with others; None where it goes the usual way."""
        if route.asked is None:
            return None
        lane = self._lanes.get((route.name, route.asked.alias))
        if lane is None:
            if self.fast.api.loaded.pointed(route.name, route.asked.alias) is None:
                return None
            lane = self._lanes[route.name, route.asked.alias] = Lane(self, route.name, route.asked.alias)
        return lane if lane.takes(body) else None

    def aside(self, work: Callable[[Steps[Any]], None], steps: Steps[Any], what: Aside | None) -> None:
        """Have a thread do it. Who loads, or waits for that, holds up nobody else.

        Raises Unavailable where, by what decoding takes lately, its turn would not come within QUEUE_MS.
        """
        if what is not None:
            self._others[what].submit(work, steps)
            return
        queue_ms, rounds = self.fast.api.settings.queue_ms, self._aside // LONG
        if queue_ms and rounds * self._aside_s > queue_ms / 1000:
            raise Unavailable(BUSY, "busy")
        self._aside += 1
        self._decoding.submit(self._timed, work, steps)

    def _timed(self, work: Callable[[Steps[Any]], None], steps: Steps[Any]) -> None:
        began = time.monotonic()
        try:
            work(steps)
        finally:
            with suppress(RuntimeError):  # the loop is over
                self.loop.call_soon_threadsafe(self._took, time.monotonic() - began)

    def _took(self, seconds: float) -> None:
        self._aside -= 1
        self._aside_s += (seconds - self._aside_s) * SMOOTH

    def connecting(self, work: Coroutine[None, None, None]) -> None:
        """Let it go on; a task that nobody holds may vanish."""
        task = self.loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def give_up(self, answer: Answer) -> None:
        """Nobody waits for it any more: if it has not begun to run it does not."""
        answer.gone = True
        self._asked.pop(answer, None)

    def told(self, answer: Answer) -> None:
        """From any thread: it is done, or its deadline passed."""
        self._done.append(answer)
        if not self._called:
            self._called = True
            with suppress(RuntimeError):  # the loop is over: so are all who asked
                self.loop.call_soon_threadsafe(self._deliver)

    def _serve(self) -> None:
        self.loop.run_forever()
        while any(self._is_under_way(predictor) for predictor in self._looked_at):  # their clients are gone
            pass
        with suppress(asyncio.CancelledError):
            self.loop.run_until_complete(self._listening)
        self._decoding.shutdown()
        for others in self._others.values():
            others.shutdown()
        self.loop.close()

    async def _listen(self) -> None:
        """granian begins after its application is made, with the front in it; till then only half could be answered."""
        while True:
            try:
                _, writer = await asyncio.open_unix_connection(str(self.behind))
            except OSError:
                await asyncio.sleep(0.005)
                continue
            writer.close()
            break
        try:
            self._socket.listen(BACKLOG)
        except OSError:  # somebody took the address since it was bound
            log.exception("can't listen")
            os._exit(1)  # which ends granian and whoever else serves with it
        self._let_in()

    def _let_in(self) -> None:
        if self._socket.fileno() >= 0:
            self.loop.add_reader(self._socket, self._accept)

    def _accept(self) -> None:
        """All who wait, up to AT_ONCE: uvloop's own server takes one a turn of the loop, however long turns are, and
        cuts off whom there is no file descriptor for.
        """
        for _ in range(AT_ONCE):
            try:
                new, _ = self._socket.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError as e:
                log.warning("new connections wait for %g s: %s", REST_S, e)
                self.loop.remove_reader(self._socket)
                self.loop.call_later(REST_S, self._let_in)
                return
            new.setblocking(False)
            new.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.connecting(self._connect(new))

    async def _connect(self, new: socket.socket) -> None:
        try:
            await self.loop.connect_accepted_socket(lambda: Connection(self), new)
        except OSError:  # it is gone already
            new.close()

    def _routed(self, head: bytes) -> Route | None:
        environ = environ_of(head)
        route = self.fast.route(environ) if environ else None
        return replace(route, ends=True) if route and ends(head) else route

    def _run(self) -> None:
        predictors, self._to_run = self._to_run, []
        self._called = True  # it is, below
        for predictor in predictors:
            self._go(predictor)
        self._deliver()

    def _go(self, predictor: Predictor) -> None:
        if predictor.go(ahead=self.arriving > 0) and predictor not in self._looked_at:
            if not self._looked_at:
                self.loop.call_soon(self._look_at)
            self._looked_at.append(predictor)

    def _look_at(self) -> None:
        """Once a turn of the loop, as long as something is under way."""
        self._called = True  # it is, below
        self._looked_at = [predictor for predictor in self._looked_at if self._is_under_way(predictor)]
        if self._looked_at:
            self.loop.call_soon(self._look_at)
        self._deliver()

    def _is_under_way(self, predictor: Predictor) -> bool:
        try:
            return predictor.look()
        except Exception:  # of one Predictor: the others are looked at all the same
            log.exception("what ran could not be passed on")
            return predictor.is_under_way

    def _deliver(self) -> None:
        self._called = False
        while self._done:
            answer = self._done.popleft()
            if (who := self._asked.pop(answer, None)) is not None:
                self._tell(who, answer)

    def _tell(self, who: Waits, answer: Answer) -> None:
        try:
            who.answered(answer)
        except Exception:  # of one request: the others are answered all the same
            log.exception("an answer could not be passed on")

    def _sweep(self) -> None:
        """Give up what is late though what runs before it is not over."""
        self.loop.call_later(SWEEP_S, self._sweep)
        now = time.monotonic()
        for answer, who in [(a, who) for a, who in self._asked.items() if a.deadline < now]:
            self.give_up(answer)
            self._tell(who, answer)

    def _look(self) -> None:
        """Give up requests whose clients have stopped sending, which keep others from sending theirs, or reading."""
        self.loop.call_later(min(LOOK_S, self.stall_s), self._look)
        now, read_s = time.monotonic(), min(self.stall_s, PARTING_S) if self._closing else self.stall_s
        for connection in list(self.open):
            connection.give_up_before(now - self.stall_s, now - read_s)

    def close(self) -> None:
        """From any thread: as a signal does. Returns when it is over."""
        self.loop.call_soon_threadsafe(self._close)
        self._thread.join()

    def _close(self) -> None:
        """Take no connection more, and end when the last request is answered."""
        self._closing = True
        self.loop.remove_reader(closing.READ)
        self._listening.cancel()
        self.loop.remove_reader(self._socket)
        self._socket.close()
        for connection in list(self.open):
            connection.close_when_idle()
        self._end()

    def _end(self) -> None:
        if self.open:
            self.loop.call_later(0.01, self._end)
        else:
            self.loop.stop()
