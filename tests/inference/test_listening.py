"""How the front listens: nobody is let in too early, everybody is let in."""

import os
import resource
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flask import Flask

from inference.front import Front

from .conftest import Granian, answer, answers, free_port, request, until


def test_an_address_that_another_took_before_anybody_was_let_in_ends_the_process(
        app: Flask, serving: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture) -> None:
    front, port, ended = Front(app.wsgi_app, tmp_path / "api.sock"), free_port(), threading.Event()  # type: ignore[arg-type]
    monkeypatch.setattr("inference.front.os._exit", lambda status: ended.set())
    front.start("127.0.0.1", port, shared=False)
    with socket.create_server(("127.0.0.1", port)):
        granian = Granian(tmp_path / "api.sock")
        try:
            assert ended.wait(20)
            assert "can't listen" in caplog.text
        finally:
            front.close()
            granian.close()


def test_all_who_came_during_a_turn_are_let_in_behind_it_and_wait_for_file_descriptors(
        front: Front, connect: Callable[[], socket.socket], caplog: pytest.LogCaptureFixture) -> None:
    go = threading.Event()
    front.loop.call_soon_threadsafe(go.wait, 20)
    connections = [connect() for _ in range(8)]
    for connection in connections:
        connection.sendall(request())
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = {int(number) for number in os.listdir("/proc/self/fd")}
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(set(range(len(taken) + 1)) - taken), hard))
    try:
        go.set()
        until(lambda: "new connections wait for" in caplog.text)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert [answer(connection)[0] for connection in connections] == [200] * 8


def test_nobody_is_let_in_before_granian_is_there(app: Flask, serving: Any, tmp_path: Path) -> None:
    port = free_port()
    early, front = (Front(app.wsgi_app, tmp_path / "api.sock") for _ in range(2))  # type: ignore[arg-type]
    early.start("127.0.0.1", port, shared=True)
    early.close()
    front.start("127.0.0.1", port, shared=True)
    time.sleep(0.1)
    assert not answers(port)
    granian = Granian(tmp_path / "api.sock")
    try:
        until(lambda: answers(port))
        with socket.create_connection(("127.0.0.1", port), 20) as connection:
            connection.sendall(b"GET /v2 HTTP/1.1\r\nHost: x\r\n\r\n")
            assert answer(connection)[0] == 299
    finally:
        front.close()
        granian.close()
