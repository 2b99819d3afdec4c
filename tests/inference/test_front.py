"""The front: what it answers itself, what it passes on, whom it turns away, and for whom it runs nothing."""

import json
import socket
import threading
import time
from base64 import b64encode
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from flask import Flask
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from inference.front import Front
from inference.heads import BEGINNINGS, environ_of, may_be_plain
from inference.scores import LIGHT
from inference.steps import LOAD, WRITE, Aside
from shared.stack import free_port

from .conftest import (
    BLUE,
    GREEN,
    HEAD,
    IMAGE,
    RED,
    SIZE,
    Granian,
    Held,
    answer,
    answers,
    label,
    png,
    publish_model,
    request,
    until,
)


def test_requests_sent_at_once_are_answered_in_order(connect: Callable[[], socket.socket], granian: Granian) -> None:
    connection = connect()
    connection.sendall(request(png(RED)) + request(png(GREEN)) + request(png(BLUE), "\r\nConnection: keep-alive"))
    stream = connection.makefile("rb")
    found = []
    for _ in range(3):
        head = b"".join(iter(stream.readline, b"\r\n"))
        size = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        found.append((head[:15], label(stream.read(size))))
    assert found == [(b"HTTP/1.1 200 OK", color) for color in ("red", "green", "blue")]
    assert granian.seen == []


def test_a_query_in_plain_letters_is_plain(connect: Callable[[], socket.socket], granian: Granian) -> None:
    connection = connect()
    for query in (b"?top_k=1", b"?alias=production&top_k=1"):
        connection.sendall(request().replace(b"/predict", b"/predict" + query))
        status, _, body = answer(connection)
        assert (status, [t["label"] for t in json.loads(body)["predictions"][0]["top"]]) == (200, ["red"])
    assert granian.seen == []


def test_one_who_says_that_it_ends_is_answered_and_let_go(connect: Callable[[], socket.socket],
                                                          granian: Granian) -> None:
    connection = connect()
    connection.sendall(request(more="\r\nConnection: Close") + request())
    status, headers, body = answer(connection)
    assert (status, label(body), headers["Connection"]) == (200, "red", "close")
    assert connection.recv(1) == b""
    assert granian.seen == []


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cuts=st.lists(st.integers(1, len(request()) - 1), max_size=5))
def test_however_a_request_arrives_in_pieces(connect: Callable[[], socket.socket], cuts: list[int]) -> None:
    whole = request()
    with connect() as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for start, stop in zip([0, *sorted(cuts)], [*sorted(cuts), len(whole)], strict=True):
            connection.sendall(whole[start:stop])
        status, headers, body = answer(connection)
        assert (status, label(body), headers["X-Content-Type-Options"]) == (200, "red", "nosniff")


@pytest.mark.parametrize("odd", [
    b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n",
    b"POST /v1/jobs HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"no HTTP at all",
    request().replace(b"/predict", b"/predict?top_k=%31"),
    request().replace(b"/predict", b"/predict?top_k=1&top_k=1"),
    request().replace(b"/predict", b"/predict??top_k=1"),
    request().replace(b"/predict", b"/predict?version=0"),
    request().replace(b"HTTP/1.1", b"HTTP/1.0"),
    request().replace(b"Host: x\r\n", b""),
    request(more="\r\nTransfer-Encoding: chunked"),
    request(more="\r\nContent-Length: 5"),
    request(more="\r\nExpect: more"),
    request(more="\r\nConnection: close, TE"),
    request(more="\r\nUpgrade: h2c"),
    request(more="\r\n folded: yes"),
    request(more="\r\nSpaced : yes"),
    request(more="\r\nBare: line\nOther: feed"),
    request().replace(b"\r\n", b"\n"),
    request(more="\r\nContent-Encoding: gzip"),
    request(more="\r\nSec-Fetch-Site: cross-site"),
    request(more="\r\nLong: " + "x" * 20_000),
    request().replace(b"image/png", b"text/plain"),
    request().replace(b"image/png", b"image/png" + b";" * 300),
])
def test_what_is_not_plain_reaches_granian_to_the_byte(connect: Callable[[], socket.socket], granian: Granian,
                                                       odd: bytes) -> None:
    connection = connect()
    connection.sendall(odd)
    assert answer(connection)[0] == 299
    assert granian.seen == [odd]


def test_after_an_odd_request_the_connection_is_granian_s(connect: Callable[[], socket.socket],
                                                          granian: Granian) -> None:
    connection = connect()
    connection.sendall(request())
    assert answer(connection)[0] == 200
    rest = b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n" + request()
    connection.sendall(rest)
    assert answer(connection)[0] == 299
    assert granian.seen == [rest]


@given(st.binary(max_size=300))
def test_no_head_is_taken_for_another(noise: bytes) -> None:
    """A head with anything in it is refused, or read as what it says."""
    environ = environ_of(HEAD.encode() + b"\r\nX-Noise: " + noise)
    if environ is not None:
        assert environ["CONTENT_LENGTH"] == str(len(IMAGE))
        assert set(environ) >= {"HTTP_HOST", "HTTP_X_NOISE"}
        assert b"\n" not in noise.replace(b"\r\n", b"")


@given(st.integers(0, 200))
def test_a_beginning_is_waited_for(size: int) -> None:
    head = request()[:size]
    assert may_be_plain(head)
    assert not may_be_plain(b"X" + head)
    assert all(may_be_plain(beginning) for beginning in BEGINNINGS)


def test_what_waits_for_a_client_that_is_gone_is_not_run(connect: Callable[[], socket.socket], held: Held) -> None:
    first, gone, last = connect(), connect(), connect()
    first.sendall(request())
    assert held.running.wait(10)
    held.slow(0.0)
    gone.sendall(request())
    until(lambda: held.predictor.images == 2)
    last.sendall(request())
    until(lambda: held.predictor.images == 3)
    waiting = [one for _, _, one in held.predictor._waiting]
    gone.close()
    until(lambda: waiting[0].gone)
    held.go.set()
    assert [answer(c)[0] for c in (first, last)] == [200, 200]
    assert held.batches == [1, 1]
    until(lambda: held.predictor.images == 0)


@pytest.mark.parametrize(("query", "kind", "body"), [
    ("?version=1&variant=onnx-fp32", "image/png", IMAGE),
    ("", "application/json", json.dumps({"images": [b64encode(IMAGE).decode()] * 3}).encode()),
    ("?variant=onnx-fp32", "multipart/form-data; boundary=b",
     b'--b\r\nContent-Disposition: form-data; name="i"; filename="i"\r\n\r\n' + IMAGE + b"\r\n--b--\r\n"),
], ids=["variant", "json", "form"])
def test_of_several_images_or_of_a_variant_nothing_is_run_once_the_client_is_gone(
        connect: Callable[[], socket.socket], granian: Granian, held: Held, query: str, kind: str,
        body: bytes) -> None:
    asked = (f"POST /v1/models/colors/predict{query} HTTP/1.1\r\nHost: x\r\nContent-Type: {kind}\r\n"
             f"Content-Length: {len(body)}\r\n\r\n").encode() + body
    first, gone, last = connect(), connect(), connect()
    first.sendall(request())
    assert held.running.wait(10)
    held.slow(0.0)
    gone.sendall(asked)
    until(lambda: held.predictor.images > 1)
    waiting = [one for _, _, one in held.predictor._waiting]
    gone.close()
    until(lambda: waiting[0].gone)
    last.sendall(asked)
    until(lambda: any(not one.gone for _, _, one in held.predictor._waiting))
    images = len(waiting[0].images)
    held.go.set()
    assert [answer(c)[0] for c in (first, last)] == [200, 200]
    assert held.batches == [1, images]
    assert granian.seen == []


def form(images: int) -> bytes:
    return b"".join(b'--b\r\nContent-Disposition: form-data; name="i"; filename="i"\r\n\r\n' + IMAGE + b"\r\n"
                    for _ in range(images)) + b"--b--\r\n"


def as_json(images: int) -> bytes:
    return json.dumps({"images": [b64encode(IMAGE).decode()] * images}).encode()


@pytest.mark.parametrize(("query", "kind", "body", "expected"), [
    ("", "multipart/form-data; boundary=b", form(2), [None]),
    ("", "application/json", as_json(1), []),
    ("", "application/json", as_json(40), [None]),  # few bytes that take long to be decoded
    ("?version=1", "image/png", IMAGE, [None]),  # its folder is read
    ("?version=2", "image/png", IMAGE, [None, LOAD]),
    ("?variant=none", "image/png", IMAGE, [None]),
], ids=["form", "json", "many", "version", "load", "unknown"])
def test_what_takes_long_is_done_beside_the_loop(connect: Callable[[], socket.socket], front: Front, root: Path,
                                                 monkeypatch: pytest.MonkeyPatch, query: str, kind: str, body: bytes,
                                                 expected: list[Aside | None]) -> None:
    publish_model(root, "colors", "m-2")
    aside = list[Aside | None]()
    monkeypatch.setattr(front, "aside", lambda work, steps, what: aside.append(what) or Front.aside(
        front, work, steps, what))
    assert len(body) < LIGHT
    connection = connect()
    connection.sendall(f"POST /v1/models/colors/predict{query} HTTP/1.1\r\nHost: x\r\nContent-Type: {kind}\r\n"
                       f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
    assert answer(connection)[0] == (404 if "none" in query else 200)
    assert aside == expected


def test_many_probabilities_are_written_as_text_beside_the_loop(
        connect: Callable[[], socket.socket], front: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    aside, connection = list[Aside | None](), connect()
    monkeypatch.setattr(front, "aside", lambda work, steps, what: aside.append(what) or Front.aside(
        front, work, steps, what))
    text = json.dumps({"inputs": [{"name": "images", "datatype": "UINT8", "shape": [1, SIZE, SIZE, 3],
                                   "data": [0] * (SIZE * SIZE * 3)}]})
    binary = json.dumps({**json.loads(text), "parameters": {"binary_data_output": True}})
    asked = [b"POST /v2/models/colors/infer HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
             for body in (text.encode(), binary.encode())]
    several = json.dumps({"images": [b64encode(IMAGE).decode()] * 2}).encode()
    asked.append(b"POST /v1/models/colors/predict HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                 b"Content-Length: %d\r\n\r\n%b" % (len(several), several))
    for most, expected in ((1 << 12, []), (2, [WRITE, WRITE])):
        monkeypatch.setattr("inference.scores.MANY", most)
        for body in asked:
            connection.sendall(body)
            assert answer(connection)[0] == 200
        assert aside == expected


def test_a_deadline_is_kept_while_something_else_runs(connect: Callable[[], socket.socket], held: Held) -> None:
    tensor = {"name": "images", "datatype": "UINT8", "shape": [1, SIZE, SIZE, 3],
              "parameters": {"binary_data_size": SIZE * SIZE * 3}}
    head = json.dumps({"inputs": [tensor], "parameters": {"timeout": 30_000}}).encode()
    late = (b"POST /v2/models/colors/infer HTTP/1.1\r\nHost: x\r\nInference-Header-Content-Length: %d\r\n"
            b"Content-Length: %d\r\n\r\n%b" % (len(head), len(head) + SIZE * SIZE * 3, head + bytes(SIZE * SIZE * 3)))
    first, second = connect(), connect()
    first.sendall(request())
    assert held.running.wait(10)
    held.slow(0.0)
    second.sendall(late)
    status, headers, body = answer(second)
    assert (status, list(json.loads(body))) == (503, ["error"])
    assert "no answer within 0.03 s" in json.loads(body)["error"]
    assert int(headers["Retry-After"]) > 0
    held.go.set()
    assert answer(first)[0] == 200
    assert held.batches == [1]


@pytest.mark.parametrize("query", [b"", b"?alias=production&top_k=1"])
def test_what_would_wait_longer_than_its_turn_may_take_is_turned_away(
        connect: Callable[[], socket.socket], app: Flask, held: Held, query: bytes) -> None:
    object.__setattr__(app.extensions["lanner"].settings, "queue_ms", 500)
    first, second = connect(), connect()
    first.sendall(request())
    assert held.running.wait(10)
    second.sendall(request().replace(b"/predict", b"/predict" + query))
    status, headers, body = answer(second)
    assert (status, json.loads(body)["error"]["code"], headers["Retry-After"]) == (503, "busy", "2")
    held.go.set()
    assert answer(first)[0] == 200


def test_an_error_of_the_front_is_that_of_flask(connect: Callable[[], socket.socket], serving: Any) -> None:
    connection = connect()
    connection.sendall(request(b"no image"))
    status, _, body = answer(connection)
    told = serving.post("/v1/models/colors/predict", data=b"no image", headers={"Content-Type": "image/png"})
    assert (status, body) == (told.status_code, told.data)


def test_closing_answers_what_waits(app: Flask, serving: Any, granian: Granian, tmp_path: Path) -> None:
    front, port = Front(app.wsgi_app, tmp_path / "api.sock"), free_port()  # type: ignore[arg-type]
    front.start("127.0.0.1", port, shared=False)
    until(lambda: answers(port))
    held = Held(app)
    with socket.create_connection(("127.0.0.1", port), 20) as busy, \
            socket.create_connection(("127.0.0.1", port), 20) as idle:
        busy.sendall(request())
        assert held.running.wait(10)
        closing = threading.Thread(target=front.close)
        closing.start()
        assert idle.recv(1) == b""
        held.go.set()
        status, headers, body = answer(busy)
        assert (status, label(body), headers["Connection"]) == (200, "red", "close")
        closing.join(10)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), 2)


@pytest.fixture
def hasty(app: Flask, serving: Any, granian: Granian, tmp_path: Path) -> Iterator[int]:
    """The port of a front that gives up requests after a second."""
    front, port = Front(app.wsgi_app, tmp_path / "api.sock", stall_s=1.0), free_port()  # type: ignore[arg-type]
    front.start("127.0.0.1", port, shared=False)
    until(lambda: answers(port))
    yield port
    front.close()


def test_a_body_that_stalls_is_given_up_and_leaves_its_slot(hasty: int, app: Flask) -> None:
    free = app.extensions["lanner"].intake._slots
    with socket.create_connection(("127.0.0.1", hasty), 20) as connection:
        connection.sendall(request()[:-20])
        until(lambda: app.extensions["lanner"].intake._slots == free - 1)
        status, headers, body = answer(connection)
        assert (status, json.loads(body)["error"]["code"], headers["Connection"]) == (408, "timeout", "close")
        assert connection.recv(1) == b""
    assert app.extensions["lanner"].intake._slots == free


def test_a_body_that_goes_on_slowly_is_waited_for(hasty: int) -> None:
    with socket.create_connection(("127.0.0.1", hasty), 20) as connection:
        whole = request()
        connection.sendall(whole[:-4])
        for i in range(4):
            time.sleep(0.35)
            connection.sendall(whole[len(whole) - 4 + i:len(whole) - 3 + i])
        assert answer(connection)[0] == 200


def test_a_head_that_stalls_is_cut_off(hasty: int) -> None:
    with socket.create_connection(("127.0.0.1", hasty), 20) as connection:
        connection.sendall(HEAD.encode())
        assert connection.recv(1) == b""


def test_one_who_waits_between_two_requests_is_not_given_up(hasty: int) -> None:
    with socket.create_connection(("127.0.0.1", hasty), 20) as connection:
        for _ in range(2):
            connection.sendall(request())
            assert answer(connection)[0] == 200
            time.sleep(2.2)


@pytest.mark.parametrize(("asked", "code_of"), [
    (b"PUT /v1/uploads/u-1", lambda told: told["error"]["code"]),
    (b"POST /v2/models/colors/infer", lambda told: isinstance(told["error"], str) and "timeout")])
def test_a_body_for_granian_that_stalls_is_given_up_too(hasty: int, granian: Granian, asked: bytes,
                                                        code_of: Callable[[Any], Any]) -> None:
    granian.patience_s = 10
    head = asked + b" HTTP/1.1\r\nHost: x\r\nContent-Encoding: gzip\r\nContent-Length: 100\r\n\r\n"
    with socket.create_connection(("127.0.0.1", hasty), 20) as connection:
        connection.sendall(head + b"half")
        status, headers, body = answer(connection)
        assert (status, code_of(json.loads(body)), headers["Connection"]) == (408, "timeout", "close")
        assert connection.recv(1) == b""
    assert until(lambda: granian.seen) == [head + b"half"]
