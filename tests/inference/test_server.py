"""The API in its own granian process: what only real connections show."""

import contextlib
import hashlib
import http.client
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from inference.__main__ import DRAIN_S
from shared import artifacts
from shared.ledger import Ledger

from .conftest import RED, Server, answers, png, publish_model, start_server, until

MIB = 1 << 20


@pytest.fixture
def serving_server(server: Server) -> Server:
    if not artifacts.names(server.root):
        version = publish_model(server.root, "colors", "m-1")
        artifacts.promote(server.root, "colors", "production", version, "onnx-fp32", by="test")
    until(lambda: server.call("GET", "/readyz")[0] == 200)
    return server


def worker(server: Server) -> psutil.Process:
    """The process that answers; the one started only watches it."""
    return psutil.Process(server.process.pid).children()[0]


def status_line(connection: socket.socket) -> bytes:
    return connection.recv(4096).split(b"\r\n")[0]


def left(server: Server) -> list[str]:
    """What is in raw/, hidden names too."""
    return sorted(os.listdir(server.root / "raw")) if (server.root / "raw").exists() else []


def test_a_prediction_over_http(serving_server: Server) -> None:
    status, body = serving_server.call("POST", "/v1/models/colors/predict", png(RED), **{"Content-Type": "image/png"})
    assert (status, json.loads(body)["predictions"][0]["top"][0]["label"]) == (200, "red")


def test_two_hundred_half_sent_bodies_leave_the_api_answering(serving_server: Server) -> None:
    head = "PUT /v1/uploads/u-%d HTTP/1.1\nHost: x\nContent-Length: 1000"
    held = [serving_server.send(head % i, b"half") for i in range(200)]
    try:
        until(lambda: worker(serving_server).num_threads() > 200)
        assert serving_server.call("GET", "/livez")[0] == 200
        answer = serving_server.call("POST", "/v1/models/colors/predict", png(RED), **{"Content-Type": "image/png"})
        assert answer[0] == 200
    finally:
        for connection in held:
            connection.close()


def test_more_bodies_than_slots_are_turned_away_and_the_api_answers(server: Server) -> None:
    head = "PUT /v1/uploads/u-%d HTTP/1.1\nHost: x\nContent-Length: 1000"
    held = [server.send(head % i, b"half") for i in range(400)]
    try:
        until(lambda: worker(server).num_threads() > 256)
        until(lambda: any(b"503" in status_line(c) for c in select.select(held, [], [], 0)[0]))
        assert server.call("GET", "/livez")[0] == 200
    finally:
        for connection in held:
            connection.close()
    until(lambda: left(server) == [])
    assert server.call("PUT", "/v1/uploads/u-1", b"zip")[0] == 201


def test_an_upload_takes_constant_memory(server: Server) -> None:
    """A body of 256 MiB; the process grows by less than a fifth of it."""
    server.call("PUT", "/v1/uploads/u-warm", bytes(4 * MIB))
    before, peak, done = worker(server).memory_info().rss, [0], threading.Event()

    def watch() -> None:
        while not done.is_set():
            peak[0] = max(peak[0], worker(server).memory_info().rss)
            time.sleep(0.01)

    watcher = threading.Thread(target=watch)
    watcher.start()
    piece, digest = os.urandom(MIB), hashlib.sha256()

    def pieces() -> Iterator[bytes]:
        for _ in range(256):
            digest.update(piece)
            yield piece

    status, body = server.call("PUT", "/v1/uploads/u-1", pieces(), **{"Content-Length": str(256 * MIB)})
    done.set()
    watcher.join()
    assert (status, json.loads(body)["sha256"]) == (201, digest.hexdigest())
    assert artifacts.sha256(server.root / "raw/u-1/data") == digest.hexdigest()
    assert peak[0] - before < 50 * MIB


def test_a_chunked_upload_with_a_digest_is_stored(server: Server) -> None:
    parts = [b"first", b"second"]
    sha256 = hashlib.sha256(b"".join(parts)).hexdigest()
    status, _ = server.call("PUT", "/v1/uploads/u-1", iter(parts), **{"X-Content-SHA256": sha256})
    assert (status, (server.root / "raw/u-1/data").read_bytes()) == (201, b"firstsecond")


@pytest.mark.parametrize(("head", "body", "status"), [
    ("Content-Length: 100", b"half", b"400"),
    (f"Transfer-Encoding: chunked\nX-Content-SHA256: {'0' * 64}", b"4\r\nhalf\r\n", b"422"),
    (f"Transfer-Encoding: chunked\nX-Content-SHA256: {'0' * 64}", b"zz\r\nhalf\r\n", b"422"),
    ("Content-Length: 600000000", b"", b"413"),
    ("Content-Length: -1", b"half", b"400"),
])
def test_a_lie_about_the_length_is_refused_and_leaves_nothing(server: Server, head: str, body: bytes,
                                                              status: bytes) -> None:
    with server.send(f"PUT /v1/uploads/u-1 HTTP/1.1\nHost: x\n{head}", body) as connection:
        connection.shutdown(socket.SHUT_WR)
        assert status_line(connection).split(b" ")[1] == status
    assert left(server) == []


def test_two_lengths_in_one_request_are_refused_and_leave_nothing(server: Server) -> None:
    head = "PUT /v1/uploads/u-1 HTTP/1.1\nHost: x\nContent-Length: 2\nTransfer-Encoding: chunked"
    with server.send(head, b"4\r\nhalf\r\n0\r\n\r\n") as connection:
        received = b""
        with contextlib.suppress(ConnectionResetError):
            while some := connection.recv(4096):
                received += some
    assert received.count(b"HTTP/1.1 ") <= 1, "the connection went on after a request whose end is unclear"
    assert b" 201 " not in received
    assert left(server) == []


def test_a_client_that_goes_away_leaves_nothing(server: Server) -> None:
    with server.send("PUT /v1/uploads/u-1 HTTP/1.1\nHost: x\nContent-Length: 100000", b"half"):
        until(lambda: left(server))
    until(lambda: left(server) == [])


def test_a_cut_off_prediction_is_refused(serving_server: Server) -> None:
    head = "POST /v1/models/colors/predict HTTP/1.1\nHost: x\nContent-Type: image/png\nContent-Length: 500"
    with serving_server.send(head, png(RED)) as connection:
        connection.shutdown(socket.SHUT_WR)
        assert b"400" in status_line(connection)


def test_events_stream_until_the_job_ends(server: Server, redis: object) -> None:
    ledger = Ledger(server.root, redis)  # type: ignore[arg-type]
    status, body = server.call("POST", "/v1/jobs", json.dumps({"kind": "preprocess", "source": "cifar10"}),
                               **{"Content-Type": "application/json"})
    assert status == 202
    job_id = json.loads(body)["id"]
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    connection.request("GET", f"/v1/jobs/{job_id}/events")
    response = connection.getresponse()
    assert response.headers["Content-Type"].startswith("text/event-stream")
    lines = iter(response.readline, b"")
    assert b'"what": "queued"' in next(line for line in lines if line.startswith(b"data:"))
    ledger.event(job_id, "progress", step=1, of=2)
    assert b'"step": 1' in next(line for line in lines if line.startswith(b"data:"))
    ledger.end(job_id, "succeeded", result={"images": 3})
    rest = b"".join(lines)
    connection.close()
    assert b"event: end\n" in rest
    assert b'"result": {"images": 3}' in rest.split(b"event: end\n")[1]


def test_sigterm_answers_what_is_in_flight_and_leaves_no_process(own_server: Server) -> None:
    children = psutil.Process(own_server.process.pid).children(recursive=True)
    with own_server.send("PUT /v1/uploads/u-1 HTTP/1.1\nHost: x\nContent-Length: 8", b"half") as connection:
        until(lambda: left(own_server))
        own_server.process.send_signal(signal.SIGTERM)
        until(lambda: not answers(own_server.port))
        connection.sendall(b"half")
        assert b"201" in status_line(connection)
    assert own_server.process.wait(10) == 0
    assert not [child for child in children if child.is_running()]
    assert left(own_server) == ["u-1"]


def test_sigterm_ends_an_open_stream_of_events(own_server: Server) -> None:
    _, body = own_server.call("POST", "/v1/jobs", json.dumps({"kind": "preprocess", "source": "cifar10"}),
                              **{"Content-Type": "application/json"})
    with own_server.send(f"GET /v1/jobs/{json.loads(body)['id']}/events HTTP/1.1\nHost: x") as connection:
        assert b"200" in status_line(connection)
        own_server.process.terminate()
        assert own_server.process.wait(DRAIN_S - 1) == 0  # later its worker would be killed, not ended


def test_sigterm_while_the_api_still_starts_ends_it_at_once(root: Path, valkey: Any) -> None:
    server = start_server(root, valkey.url, ready=False)
    child = until(lambda: psutil.Process(server.process.pid).children())[0]
    server.process.terminate()
    assert server.process.wait(DRAIN_S - 1) == 0  # later its worker would be killed, not ended
    assert not child.is_running()


def test_the_worker_ends_when_its_parent_is_killed(own_server: Server) -> None:
    child = worker(own_server)
    own_server.process.kill()
    child.wait(10)
    assert not answers(own_server.port)


def test_the_api_loads_no_tensorflow() -> None:
    heavy = "{'tensorflow', 'keras', 'cupy', 'cudf'}"
    code = f"import sys, inference.app; print({heavy} & {{m.split('.')[0] for m in sys.modules}})"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
