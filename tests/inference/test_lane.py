"""Predictions that one turn of the front's loop reads: answered as Flask answers each, whatever else is among them."""

import gc
import json
import socket
import threading
import weakref
from collections.abc import Callable

import numpy as np
import pytest
from flask import Flask
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from inference.connection import Connection
from inference.front import Front
from inference.statistics import Figures
from shared import artifacts

from .conftest import BLUE, GREEN, RED, Held, answer, label, png, publish_model, request, until

IMAGES = {color: png(color, form="JPEG") for color in (RED, GREEN, BLUE)}
BROKEN = IMAGES[RED][:-40] + bytes(40)  # its scan ends in nothing
NO_IMAGE = b"\xff\xd8\xff no image"


def jpeg(body: bytes, query: str = "") -> bytes:
    return request(body).replace(b"image/png", b"image/jpeg").replace(b"/predict", f"/predict{query}".encode())


class Turns:
    """Keeps the loop from reading until `end`, so that all that is sent meanwhile is read in one turn."""

    def __init__(self, front: Front):
        self._go, begun = threading.Event(), threading.Event()

        def hold() -> None:
            begun.set()
            assert self._go.wait(20)

        front.loop.call_soon_threadsafe(hold)
        assert begun.wait(20)

    def end(self) -> None:
        self._go.set()


def accepted(front: Front, connect: Callable[[], socket.socket], count: int) -> list[socket.socket]:
    """New connections that the loop reads from."""
    connections = [connect() for _ in range(count)]
    ports = {connection.getsockname()[1] for connection in connections}
    until(lambda: ports <= {c._transport.get_extra_info("peername")[1] for c in list(front.open)
                            if isinstance(c, Connection)})
    return connections


def together(front: Front, connect: Callable[[], socket.socket], requests: list[bytes]) -> list[tuple[int, bytes]]:
    """Status and body of requests that come at one time, each on a connection of its own."""
    connections = accepted(front, connect, len(requests))
    turn = Turns(front)
    for connection, content in zip(connections, requests, strict=True):
        connection.sendall(content)
    turn.end()
    found = [answer(connection) for connection in connections]
    return [(status, body) for status, _, body in found]


@pytest.fixture
def runs(app: Flask) -> list[int]:
    """How many images each run has."""
    predictor, found = app.extensions["lanner"].loaded.resolve("colors", "production").loaded.predictor, list[int]()
    run = predictor._session.run

    def noted(batch: np.ndarray) -> np.ndarray:
        found.append(len(batch))
        scores: np.ndarray = run(batch)
        return scores

    predictor._session.run = noted
    return found


def test_a_variant_that_is_unloaded_is_kept_by_nobody(front: Front, connect: Callable[[], socket.socket],
                                                      app: Flask) -> None:
    loaded = app.extensions["lanner"].loaded
    predictor = weakref.ref(loaded.pointed("colors", "production").loaded.predictor)
    assert [status for status, _ in together(front, connect, [jpeg(IMAGES[RED])])] == [200]
    loaded.unload("colors")
    until(lambda: gc.collect() is not None and predictor() is None)


def counted(front: Front, app: Flask) -> Figures:
    """Once the loop is through with what it has answered."""
    through = threading.Event()
    front.loop.call_soon_threadsafe(through.set)
    assert through.wait(10)
    return app.extensions["lanner"].statistics.snapshot()["colors", 1]


def test_what_one_turn_reads_runs_as_one_and_is_counted_one_by_one(
        front: Front, connect: Callable[[], socket.socket], app: Flask, runs: list[int]) -> None:
    colors = [RED, GREEN, BLUE] * 4
    found = together(front, connect, [jpeg(IMAGES[color]) for color in colors])
    assert [(status, label(body)) for status, body in found] == [(200, c) for c in ("red", "green", "blue")] * 4
    assert runs == [12]
    context, figures = app.extensions["lanner"], counted(front, app)
    assert (figures.success.count, figures.fail.count, figures.images, figures.executions) == (12, 0, 12, 1)
    assert figures.success.ns >= figures.input.ns + figures.queue.ns + figures.infer.ns + figures.output.ns
    assert figures.queue.ns >= 11 * figures.input.ns  # each waits for the decoding of the eleven others
    assert (figures.queue.count, figures.input.count, figures.infer.count, figures.output.count) == (12, 12, 12, 12)
    assert figures.infer.ns == 12 * figures.batches[12].infer.ns
    assert (figures.pending, figures.batches[12].infer.count) == (0, 1)
    samples = {(s.name, *sorted(s.labels.values())): s.value for f in context.meters.families() for s in f.samples}
    for stage in ("decode", "queue", "encode"):
        assert samples["lanner_predict_seconds_count", stage] == 12
    assert samples["lanner_predict_seconds_count", "compute"] == 1
    assert samples["lanner_images_total", "colors"] == 12
    assert samples["lanner_requests_total", "/v1/models/<name>/predict", "200", "POST"] == 12


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from([*(jpeg(image) for image in IMAGES.values()), jpeg(IMAGES[RED], "?top_k=1"),
                                 jpeg(IMAGES[BLUE], "?alias=production&top_k=2"), jpeg(BROKEN), jpeg(NO_IMAGE),
                                 jpeg(IMAGES[RED], "?alias=nobody"), request(png(GREEN)), request(png(GREEN, 400)),
                                 jpeg(png(RED, 48, "JPEG"))]), min_size=1, max_size=12))
def test_whatever_comes_at_one_time_is_answered_as_each_alone_is(front: Front, connect: Callable[[], socket.socket],
                                                                 app: Flask, requests: list[bytes]) -> None:
    alone = []
    for content in requests:
        head, _, body = content.partition(b"\r\n\r\n")
        kind = "image/jpeg" if b"image/jpeg" in head else "image/png"
        told = app.test_client().post(head.split(b" ")[1].decode(), data=body, content_type=kind,
                                      headers={"Content-Encoding": "identity"})  # which is Flask's to look at
        alone.append((told.status_code, told.json))
    assert [(status, json.loads(body)) for status, body in together(front, connect, requests)] == alone


def test_more_than_run_together_are_answered_in_several_runs(front: Front, connect: Callable[[], socket.socket],
                                                             runs: list[int]) -> None:
    found = together(front, connect, [jpeg(IMAGES[GREEN])] * 70)
    assert {(status, label(body)) for status, body in found} == {(200, "green")}
    assert runs == [64, 6]


def test_a_runtime_that_fails_is_told_to_each(front: Front, connect: Callable[[], socket.socket], app: Flask) -> None:
    predictor = app.extensions["lanner"].loaded.resolve("colors", "production").loaded.predictor
    run, predictor._session.run = predictor._session.run, lambda batch: 1 / 0
    assert [status for status, _ in together(front, connect, [jpeg(IMAGES[RED])] * 3)] == [500] * 3
    figures = counted(front, app)
    assert (figures.success.count, figures.fail.count, figures.pending) == (0, 3, 0)
    predictor._session.run = run
    assert [status for status, _ in together(front, connect, [jpeg(IMAGES[RED])] * 3)] == [200] * 3


def test_a_variant_that_is_replaced_before_the_turn_ends_does_not_answer(
        front: Front, connect: Callable[[], socket.socket], app: Flask, root) -> None:
    """The alias moves while requests wait, and what they were meant for is closed."""
    context = app.extensions["lanner"]
    old = context.loaded.resolve("colors", "production")
    publish_model(root, "colors", "m-next")
    version = artifacts.versions(root, "colors")
    (next_version,) = [number for number, model in version.items() if model == "m-next"]
    connections = accepted(front, connect, 3)
    turn = Turns(front)
    for connection in connections:
        connection.sendall(jpeg(IMAGES[BLUE]))
    artifacts.promote(root, "colors", "production", next_version, "onnx-fp32", by="test")
    context.loaded.wake()
    until(lambda: context.loaded.pointed("colors", "production") is not old)
    old.loaded.predictor.close(wait=True)
    turn.end()
    for connection in connections:
        status, _, body = answer(connection)
        assert (status, json.loads(body)["version"], label(body)) == (200, next_version, "blue")


def test_a_predictor_that_closes_in_the_turn_sends_all_the_usual_way(front: Front, connect: Callable[[], socket.socket],
                                                                     app: Flask, root,
                                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    context = app.extensions["lanner"]
    served = context.loaded.resolve("colors", "production")
    submit, closed = served.loaded.predictor.submit, []

    def closes_once(*args, **more):
        from inference.predictor import Closed
        if not closed:
            closed.append(True)
            raise Closed
        return submit(*args, **more)

    monkeypatch.setattr(served.loaded.predictor, "submit", closes_once)
    found = together(front, connect, [jpeg(IMAGES[BLUE])] * 3)
    assert [(status, label(body)) for status, body in found] == [(200, "blue")] * 3
    assert closed


def test_of_a_group_nobody_computes_for_those_who_all_left(connect: Callable[[], socket.socket], front: Front,
                                                           held: Held, app: Flask) -> None:
    first = connect()
    first.sendall(jpeg(IMAGES[RED]))
    assert held.running.wait(10)
    groups = []
    for _ in range(2):
        group = accepted(front, connect, 3)
        turn, before = Turns(front), held.predictor.images
        for connection in group:
            connection.sendall(jpeg(IMAGES[GREEN]))
        turn.end()
        until(lambda before=before: held.predictor.images == before + 3)
        groups.append(group)
    assert app.extensions["lanner"].statistics.snapshot()["colors", 1].pending == 7
    waiting = [waits for _, _, waits in sorted(held.predictor._waiting, key=lambda w: w[:2])]
    for connection in (*groups[0], groups[1][0]):  # all of one group, one of the other
        connection.close()
    until(lambda: waiting[0].gone)
    held.go.set()
    assert [answer(c)[0] for c in (first, *groups[1][1:])] == [200, 200, 200]
    assert held.batches == [1, 3]
    until(lambda: held.predictor.images == 0)
    figures = counted(front, app)
    assert (figures.success.count, figures.fail.count, figures.pending) == (3, 4, 0)


def test_a_group_that_waits_past_its_deadline_is_told_so(front: Front, connect: Callable[[], socket.socket],
                                                         held: Held, app: Flask,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("inference.lane.DEADLINE_S", 0.2)
    connection = connect()
    connection.sendall(jpeg(IMAGES[RED]))
    status, _, body = answer(connection)
    assert (status, json.loads(body)["error"]["code"]) == (503, "deadline")
    figures = counted(front, app)
    assert (figures.fail.count, figures.pending) == (1, 0)


def test_whatever_fails_in_a_turn_each_is_answered_once(front: Front, connect: Callable[[], socket.socket], app: Flask,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args) -> None:
        raise MemoryError("none left")

    for what in ("decode_into", "render"):
        with monkeypatch.context() as patched:
            patched.setattr(f"inference.lane.{what}", fails)
            assert [status for status, _ in together(front, connect, [jpeg(IMAGES[RED])] * 3)] == [500] * 3
    assert [status for status, _ in together(front, connect, [jpeg(IMAGES[RED])] * 3)] == [200] * 3
    figures = counted(front, app)
    assert (figures.success.count, figures.fail.count, figures.pending) == (3, 6, 0)


def test_a_full_turn_turns_away_whoever_asks_and_counts_each(front: Front, connect: Callable[[], socket.socket],
                                                             app: Flask, held: Held) -> None:
    """Those, too, of which nothing is read, since their like was turned away in it. The next turn is another one."""
    context = app.extensions["lanner"]
    object.__setattr__(context.settings, "queue_ms", 500)
    first = connect()
    first.sendall(jpeg(IMAGES[RED]))
    assert held.running.wait(10)
    plain, last = jpeg(IMAGES[RED]), request(IMAGES[RED], "\r\nConnection: close")
    asked = [plain, plain, plain, request(IMAGES[RED], "\r\nX-Other: 1"), plain, last, last, plain]
    connections = accepted(front, connect, len(asked))
    for _ in range(2):
        turn = Turns(front)
        for connection, content in zip(connections, asked, strict=True):
            connection.sendall(content)
        turn.end()
        found = [answer(connection) for connection in connections]
        assert {(status, body) for status, _, body in found} == {(503, found[0][2])}
        assert json.loads(found[0][2])["error"]["code"] == "busy"
        assert {headers["Retry-After"] for _, headers, _ in found} == {found[0][1]["Retry-After"]}
        ended = [headers.get("Connection") == "close" for _, headers, _ in found]
        assert ended == [content is last for content in asked]
        asked = [plain] * 6
        connections = [c for c, over in zip(connections, ended, strict=True) if not over]
    assert counted(front, app).fail.count == 14
    samples = {(s.name, *sorted(s.labels.values())): s.value for f in context.meters.families() for s in f.samples}
    assert samples["lanner_requests_total", "/v1/models/<name>/predict", "503", "POST"] == 14
    held.go.set()
    assert answer(first)[0] == 200
    held.slow(0.0)
    until(lambda: held.predictor.images == 0)
    assert {status for status, _ in together(front, connect, [plain] * 3)} == {200}
    for connection in connections:
        connection.sendall(plain)
        assert answer(connection)[0] == 200
