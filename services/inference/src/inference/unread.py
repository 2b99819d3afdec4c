"""Answers that a client does not read: they keep memory, and a process that ends would wait for them."""

import asyncio
import fcntl
import struct
import termios
import time

UNSENT = termios.TIOCOUTQ  # of a TCP socket, the bytes that its other end has not acknowledged: tcp(7), SIOCOUTQ


class Unread:
    """How long a client has taken nothing of what is there for it."""

    __slots__ = ("_bytes", "_since")

    def __init__(self) -> None:
        self._bytes, self._since = 0, 0.0

    def since(self, transport: asyncio.Transport, before: float) -> bool:
        """Whether more waits for the client than its socket holds, of which it has taken nothing since `before`.

        before: of time.monotonic. As far as can be seen: it is to be asked every second or so, and counts from when it
        first was.
        """
        here = transport.get_write_buffer_size()
        waiting = here + _unsent(transport) if here else 0
        if not self._bytes or waiting < self._bytes:
            self._since = time.monotonic()
        self._bytes = waiting
        return waiting > 0 and self._since < before


def _unsent(transport: asyncio.Transport) -> int:
    """That the kernel has: of megabytes it lets more in only when a third is gone, long after a slow client read on."""
    found: int = struct.unpack("i", fcntl.ioctl(transport.get_extra_info("socket").fileno(), UNSENT, bytes(4)))[0]
    return found
