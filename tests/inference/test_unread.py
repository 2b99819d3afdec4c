"""Clients that do not read their answers: they are cut off, and a process that ends does not wait for them."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from flask import Flask

from inference import front as fronts
from inference.connection import AHEAD
from inference.front import SCRATCH, Front

from .conftest import Granian, answers, free_port, request, until

LARGE = b"HTTP/1.1 200 OK\r\nContent-Length: 20000000\r\n\r\n" + bytes(20_000_000)


def deaf(port: int) -> socket.socket:
    """A connection whose own end keeps little of what it does not read."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.settimeout(20)
    connection.connect(("127.0.0.1", port))
    return connection


def flood(connection: socket.socket) -> None:
    """Ask without reading, until no more is taken."""
    connection.settimeout(0.5)
    with suppress(TimeoutError):
        while True:
            connection.sendall(request() * 100)
    connection.settimeout(20)


def ask_granian(connection: socket.socket) -> None:
    connection.sendall(b"GET /large HTTP/1.1\r\nHost: x\r\n\r\n")


@pytest.fixture
def hasty(app: Flask, serving: Any, granian: Granian, tmp_path: Path) -> Iterator[Front]:
    """A front that waits a second for who does not read; no less when it ends."""
    granian.reply = LARGE
    front, port = Front(app.wsgi_app, tmp_path / "api.sock", stall_s=1.0), free_port()  # type: ignore[arg-type]
    front.port = port  # type: ignore[attr-defined]
    front.start("127.0.0.1", port, shared=False)
    until(lambda: answers(port))
    yield front
    front.close()


def is_cut_off(connection: socket.socket) -> bool:
    """Reads what is left; whether it ends before its time and not by this side's patience."""
    with suppress(ConnectionResetError):
        while connection.recv(1 << 16):
            pass
    return True


@pytest.mark.parametrize("ask", [flood, ask_granian])
def test_one_who_does_not_read_is_cut_off(hasty: Front, ask: Callable[[socket.socket], None]) -> None:
    with deaf(hasty.port) as connection:  # type: ignore[attr-defined]
        ask(connection)
        (kept,) = until(lambda: hasty.open)
        assert getattr(kept, "_got", 0) <= AHEAD + SCRATCH  # of what it asked ahead; the rest waits in its own socket
        until(lambda: not hasty.open)
        assert is_cut_off(connection)


def test_one_who_reads_slowly_gets_all(hasty: Front, granian: Granian) -> None:
    granian.reply = LARGE[:3_000_000].replace(b"20000000", b"02999954")
    with deaf(hasty.port) as connection:  # type: ignore[attr-defined]
        ask_granian(connection)
        began, got = time.monotonic(), 0
        while piece := connection.recv(16_000):
            got += len(piece)
            if time.monotonic() - began < 3:
                time.sleep(0.05)
        assert got == 3_000_000


@pytest.mark.parametrize("ask", [flood, ask_granian])
def test_the_end_does_not_wait_for_one_who_does_not_read(app: Flask, serving: Any, granian: Granian, tmp_path: Path,
                                                         monkeypatch: pytest.MonkeyPatch,
                                                         ask: Callable[[socket.socket], None]) -> None:
    monkeypatch.setattr(fronts, "PARTING_S", 0.5)
    granian.reply = LARGE
    front, port = Front(app.wsgi_app, tmp_path / "api.sock"), free_port()  # type: ignore[arg-type]
    front.start("127.0.0.1", port, shared=False)
    until(lambda: answers(port))
    with deaf(port) as connection:
        ask(connection)
        until(lambda: front.open)
        ended = threading.Thread(target=front.close)
        ended.start()
        ended.join(20)
        assert not ended.is_alive()
