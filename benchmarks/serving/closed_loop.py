"""A closed loop that keeps every request: `python closed_loop.py PORT PATH BODY CONTENT_TYPE CONNECTIONS SECONDS OUT`.

Each connection sends its next request when it has the answer to the last one. OUT becomes an .npz: `began` and `ended`
by CLOCK_MONOTONIC, which all processes of a host share, `status` (0: the connection broke, or no answer came before
the end) and `version`, the one that answered.
"""

import asyncio
import gc
import re
import sys
import time
from array import array
from pathlib import Path

import numpy as np

VERSION = re.compile(rb'"(?:model_)?version":"?(\d+)')
GRACE_S = 3.0  # after the end, for the last answers


class Log:
    def __init__(self) -> None:
        self.began, self.ended = array("d"), array("d")
        self.status, self.version = array("i"), array("i")

    def add(self, began: float, ended: float, status: int, version: int) -> None:
        self.began.append(began)
        self.ended.append(ended)
        self.status.append(status)
        self.version.append(version)


class Asker(asyncio.Protocol):
    """One connection, opened anew where the server ends it."""

    def __init__(self, loop: asyncio.AbstractEventLoop, port: int, request: bytes, until: float, log: Log):
        self._loop, self._port, self._request, self._until, self._log = loop, port, request, until, log
        self._transport: asyncio.Transport | None = None
        self.over = False
        self._began, self._got = 0.0, b""

    async def connect(self) -> None:
        await self._loop.create_connection(lambda: self, "127.0.0.1", self._port)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._ask()

    def data_received(self, data: bytes) -> None:
        self._got += data
        head, found, body = self._got.partition(b"\r\n\r\n")
        at = head.lower().find(b"content-length:")
        if not found or at < 0 or len(body) < int(head[at + 15:].split(b"\r\n", 1)[0]):
            return
        version = VERSION.search(body)
        self._log.add(self._began, time.monotonic(), int(head[9:12]), int(version[1]) if version else 0)
        self._got = b""
        self._ask()

    def connection_lost(self, error: Exception | None) -> None:
        if not self.over:
            self.give_up()
            self.over = time.monotonic() > self._until
            if not self.over:
                self._loop.create_task(self.connect())

    def give_up(self) -> None:
        self._log.add(self._began, time.monotonic(), 0, 0)
        self._got = b""

    def _ask(self) -> None:
        assert self._transport is not None
        self._began = time.monotonic()
        self.over = self._began > self._until
        if self.over:
            self._transport.close()
        else:
            self._transport.write(self._request)


async def load(port: int, request: bytes, connections: int, seconds: float) -> Log:
    log, until = Log(), time.monotonic() + seconds
    loop = asyncio.get_running_loop()
    askers = [Asker(loop, port, request, until, log) for _ in range(connections)]
    for asker in askers:
        await asker.connect()
    while not all(asker.over for asker in askers) and time.monotonic() < until + GRACE_S:
        await asyncio.sleep(0.05)
    for asker in askers:
        if not asker.over:
            asker.over = True
            asker.give_up()
    return log


def main() -> None:
    port, path, body, kind, connections, seconds, out = sys.argv[1:]
    content = Path(body).read_bytes()
    head = (f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: {kind}\r\n"
            f"Content-Length: {len(content)}\r\n\r\n")
    gc.disable()  # its pauses would be told as the server's
    log = asyncio.run(load(int(port), head.encode() + content, int(connections), float(seconds)))
    np.savez(out, began=np.array(log.began), ended=np.array(log.ended), status=np.array(log.status),
             version=np.array(log.version))


if __name__ == "__main__":
    main()
