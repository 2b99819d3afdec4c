"""A connection that asks for what granian answers, as it is passed on: to the byte, in both directions."""

import asyncio
import os
import re
import time
from contextlib import suppress
from typing import TYPE_CHECKING, cast

from inference import errors, reply
from inference.body import PIECE, stalled
from inference.unread import Unread

if TYPE_CHECKING:
    from inference.front import Front

LINGER_S = 1.0
LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*([0-9]{1,12})[ \t]*\r\n", re.IGNORECASE)


class Pipe(asyncio.Protocol):
    """One end of a connection that is passed on; what it receives the other end writes."""

    def __init__(self, front: "Front", client: asyncio.Transport | None = None, path: str = "", owed: int = 0):
        """client: its connection; without it this is the end towards granian. path, owed: of its first request, the
        bytes of its body that have not come.
        """
        self._front, self._is_client = front, client is not None
        self._other: Pipe | None = None
        self._path, self._owed, self._heard, self._silent = path, owed, time.monotonic(), True
        self._unread = Unread()
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
        self.transport = cast(asyncio.Transport, transport)
        self.transport.set_write_buffer_limits(PIECE)

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
        other, self._other = self._other, None
        if other is None:
            return
        if error is None or self._is_client or other.transport.is_closing():
            other.transport.close()
        else:
            other.transport.write(self._left_over())
            other.end_after_answer()

    def _left_over(self) -> bytes:
        """What granian had sent when writing to it failed: it answers and closes while a client still sends."""
        found = []
        with suppress(OSError):
            while piece := os.read(self.transport.get_extra_info("socket").fileno(), PIECE):
                found.append(piece)
        return b"".join(found)

    def end_after_answer(self) -> None:
        """Of a client that may still send: closed at once, its own bytes would wipe out the answer at its end."""
        self._other, self._owed = None, 0
        self.transport.resume_reading()
        self.transport.write_eof()
        self._front.loop.call_later(LINGER_S, self.transport.close)

    def close_when_idle(self) -> None:
        """granian does."""

    def give_up_before(self, before: float, unread: float) -> None:
        """As Connection's, for the first body; what follows on this connection nobody here reads."""
        if self._unread.since(self.transport, unread):
            self.transport.abort()
            return
        if self._owed <= 0 or self._other is None or self.transport.is_closing():
            return
        if not self.transport.is_reading():  # granian is late, not the client
            self._heard = time.monotonic()
        elif self._heard < before:
            if self._other._silent:
                error = stalled(self._front.stall_s)
                status, body, headers = errors.form(self._path, *errors.explain(error, "POST", self._path))
                self.transport.write(reply.whole(status, body, headers, self._front.fast.headers, last=True))
            self.transport.close()


def first(data: bytes) -> tuple[str, int]:
    """The first request's path, and the bytes of its body that have not come; 0 where its head does not tell here."""
    end = data.find(b"\r\n\r\n")
    found = LENGTH.search(data, 0, end + 2) if end >= 0 else None
    path = data[:data.find(b"\r\n")].split(b" ")[1:2]
    return path[0].decode("latin-1") if path else "", int(found[1]) - (len(data) - end - 4) if found else 0
