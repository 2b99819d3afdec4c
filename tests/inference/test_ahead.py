"""Where a Session can have two batches under way: who is answered when, by which thread, and at the end."""

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flask import Flask

from inference.batch import Answer
from inference.connection import AHEAD
from inference.front import Front
from inference.memory import _warm
from inference.metrics import Meters
from inference.predictor import LOOKED_AT_S, Predictor
from shared.runtimes import Begun, Session

from .conftest import Granian, answer, answers, free_port, label, request, until
from .test_arriving import infer


class Lane(Begun):
    def __init__(self, values: np.ndarray):
        self.values, self.over = values, threading.Event()

    def is_over(self) -> bool:
        return self.over.is_set()

    def scores(self) -> np.ndarray:
        assert self.over.wait(10)
        if self.values[0] == 255:
            raise ValueError("the runtime failed")
        return self.values[:, None].astype(np.float32)


class Laned(Session):
    """Answers each image with the value of its first pixel, once the test says that its batch is over."""

    device, batches, ahead = "NVIDIA H100", (1, 8, 16), 2

    def __init__(self) -> None:
        self.begun, self.ran, self.closed = list[Lane](), list[int](), False
        self.threads = set[str]()

    def begin(self, parts: Sequence[np.ndarray]) -> Begun:
        assert sum(not lane.over.is_set() for lane in self.begun) < self.ahead
        self.begun.append(Lane(np.concatenate([part[:, 0, 0, 0] for part in parts])))
        return self.begun[-1]

    def run(self, batch: np.ndarray) -> np.ndarray:
        assert all(lane.over.is_set() for lane in self.begun)
        self.ran.append(len(batch))
        self.threads.add(threading.current_thread().name)
        return batch[:, 0, 0, :1].astype(np.float32)

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def session() -> Laned:
    return Laned()


@pytest.fixture
def predictor(session: Laned) -> Iterator[Predictor]:
    predictor = Predictor(session, Meters(), "test")
    yield predictor
    for lane in session.begun:
        lane.over.set()
    while predictor.look():
        pass
    predictor.close(wait=True)


def asked(predictor: Predictor, value: int, count: int = 1) -> Answer:
    return predictor.submit(np.full((count, 2, 2, 3), value, np.uint8), lambda answer: None)


def values(found: Answer) -> list[float]:
    assert found.done
    assert found.scores is not None
    values: list[float] = found.scores[:, 0].tolist()
    return values


def test_the_next_batch_begins_while_the_last_one_runs(predictor: Predictor, session: Laned) -> None:
    first = asked(predictor, 1)
    assert predictor.go(ahead=True)
    second = asked(predictor, 2, 2)
    assert predictor.go(ahead=True)
    third, fourth = asked(predictor, 3), asked(predictor, 4, 3)
    assert predictor.go(ahead=True)
    assert [len(lane.values) for lane in session.begun] == [1, 2]
    session.begun[1].over.set()  # the first is not: answers keep their order
    assert predictor.look()
    assert not first.done
    session.begun[0].over.set()
    assert predictor.look()
    assert (values(first), values(second)) == ([1], [2, 2])
    assert session.begun[2].values.tolist() == [3, 4, 4, 4]
    session.begun[2].over.set()
    assert not predictor.look()
    assert (values(third), values(fourth)) == ([3], [4] * 3)
    assert predictor.images == 0
    assert first.run is not None
    assert [count for count, _ in first.run.pieces] == [1]


def test_alone_it_is_answered_at_once(predictor: Predictor, session: Laned) -> None:
    with ExitStack() as stack:
        ends = threading.Timer(0.05, lambda: session.begun[0].over.set())
        stack.callback(ends.join)
        ends.start()
        found = asked(predictor, 7)
        assert not predictor.go()
        assert values(found) == [7]


def test_what_takes_long_is_waited_for_by_a_thread(predictor: Predictor, session: Laned) -> None:
    predictor._run_s = 10 * LOOKED_AT_S
    found = asked(predictor, 7)
    assert not predictor.go(ahead=True)
    until(lambda: bool(session.begun))
    session.begun[0].over.set()
    until(lambda: found.done)
    assert values(found) == [7]


def test_a_failure_is_its_own_batch_s(predictor: Predictor, session: Laned) -> None:
    failed = asked(predictor, 255)
    predictor.go(ahead=True)
    good = asked(predictor, 3)
    predictor.go(ahead=True)
    for lane in session.begun:
        lane.over.set()
    assert not predictor.look()
    assert isinstance(failed.error, ValueError)
    assert values(good) == [3]


def test_a_thread_that_waits_is_answered_with_what_is_under_way_or_after(predictor: Predictor,
                                                                         session: Laned) -> None:
    first = asked(predictor, 1)
    predictor.go(ahead=True)
    found = list[Answer]()
    thread = threading.Thread(target=lambda: found.append(predictor.answer(np.full((1, 2, 2, 3), 9, np.uint8))))
    thread.start()
    until(lambda: predictor.images == 2)
    session.begun[0].over.set()
    assert predictor.look()
    assert values(first) == [1]
    session.begun[1].over.set()
    assert not predictor.look()
    thread.join(10)
    assert values(found[0]) == [9]


@pytest.mark.parametrize("run_s", [0.0, LOOKED_AT_S / 2])
def test_pieces_of_a_large_request_run_alone_and_not_here_unless_soon(predictor: Predictor, session: Laned,
                                                                      run_s: float) -> None:
    first = asked(predictor, 1)
    predictor.go(ahead=True)
    predictor._run_s = run_s
    large = asked(predictor, 2, 40)
    assert predictor.go(ahead=True)
    assert [len(lane.values) for lane in session.begun] == [1]
    session.begun[0].over.set()
    assert not predictor.look()
    assert values(first) == [1]
    until(lambda: large.done)
    assert values(large) == [2] * 40
    assert session.ran == [16, 16, 8]
    assert "MainThread" not in session.threads


def test_what_is_given_up_as_it_begins_leaves_nothing_busy(predictor: Predictor, session: Laned,
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    late, collect = asked(predictor, 1), predictor._collect

    def too_late() -> list[Answer]:
        late.deadline = 0.0
        return collect()

    with monkeypatch.context() as patch:
        patch.setattr(predictor, "_collect", too_late)
        assert not predictor.go(ahead=True)
    assert late.gone
    found = asked(predictor, 2)
    assert predictor.go(ahead=True)
    session.begun[0].over.set()
    assert not predictor.look()
    assert values(found) == [2]
    predictor.close(wait=True)


def test_time_is_shared_by_what_was_over_at_one_look(predictor: Predictor, session: Laned) -> None:
    """And what waits behind another batch counts as waiting."""
    first = asked(predictor, 1)
    predictor.go(ahead=True)
    second = asked(predictor, 2, 3)
    predictor.go(ahead=True)
    time.sleep(0.04)
    for lane in session.begun:
        lane.over.set()
    predictor.look()
    assert first.run is not None
    assert second.run is not None
    (one, one_ns), = first.run.pieces
    (three, three_ns), = second.run.pieces
    assert (one, three) == (1, 3)
    assert three_ns == pytest.approx(3 * one_ns, rel=0.3)
    assert second.waited_ns == pytest.approx(one_ns, rel=0.3)
    assert 0.015e9 < one_ns + three_ns < 0.2e9


def test_where_there_is_room_for_one_batch_alone_it_is_one_at_a_time(session: Laned) -> None:
    def begin(parts: Sequence[np.ndarray]) -> Begun:
        if session.begun:
            raise MemoryError("no room")
        session.begun.append(Lane(parts[0][:, 0, 0, 0]))
        session.begun[0].over.set()
        return session.begun[0]

    session.begin = begin  # type: ignore[method-assign]
    _warm(session, np.zeros((8, 2, 2, 3), np.uint8))
    assert session.ahead == 1
    with pytest.raises(MemoryError):
        _warm(session, np.zeros((8, 2, 2, 3), np.uint8))


def test_closed_while_something_is_under_way_it_ends_behind_that(predictor: Predictor, session: Laned) -> None:
    found = asked(predictor, 1)
    predictor.go(ahead=True)
    predictor.close()
    assert not session.closed
    session.begun[0].over.set()
    assert not predictor.look()
    assert values(found) == [1]
    assert predictor.ended.wait(10)
    assert session.closed


class Timed(Session):
    """The Session of a Variant as one with two lanes; a run takes `takes_s`. Notes how many were under way."""

    ahead = 2

    def __init__(self, inner: Session):
        self.inner, self.device, self.batches, self.takes_s = inner, "NVIDIA H100", (1, 256), 0.002
        self.under_way, self.most = 0, 0
        self.lent = list[int]()

    def begin(self, parts: Sequence[np.ndarray]) -> Begun:
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        return Later(self, self.inner.run(np.concatenate(parts)))

    def run(self, batch: np.ndarray) -> np.ndarray:
        return self.begin([batch]).scores()

    def room(self, size: int) -> memoryview:
        self.lent.append(size)
        return memoryview(np.empty(size, np.uint8))

    def close(self) -> None:
        self.inner.close()


class Later(Begun):
    def __init__(self, session: Timed, found: np.ndarray):
        self.session, self.found, self.at = session, found, time.monotonic() + session.takes_s

    def is_over(self) -> bool:
        return time.monotonic() > self.at

    def scores(self) -> np.ndarray:
        time.sleep(max(0.0, self.at - time.monotonic()))
        self.session.under_way -= 1
        return self.found


@pytest.fixture
def timed(app: Flask) -> Timed:
    predictor = app.extensions["lanner"].loaded.resolve("colors", "production").loaded.predictor
    predictor._session = Timed(predictor._session)
    return predictor._session


def test_many_clients_at_the_front_are_answered_each_its_own(connect: Callable[[], socket.socket], timed: Timed,
                                                             front: Front) -> None:
    def ask(seed: int) -> None:
        rng, connection = np.random.default_rng(seed), connect()
        for _ in range(15):
            chosen = rng.integers(0, 3, rng.integers(30, 257))
            connection.sendall(infer(chosen))
            status, headers, body = answer(connection)
            scores = np.frombuffer(body[int(headers["Inference-Header-Content-Length"]):], "<f4").reshape(-1, 3)
            assert (status, scores.argmax(1).tolist()) == (200, chosen.tolist())
            connection.sendall(request())
            assert label(answer(connection)[2]) == "red"
        done.append(seed)

    done = list[int]()
    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(done) == list(range(6))
    assert (timed.most, timed.under_way) == (2, 0)
    assert timed.lent
    until(lambda: front.arriving == 0)
    assert front._looked_at == []


def test_a_tensor_lies_where_the_session_wants_it(connect: Callable[[], socket.socket], timed: Timed,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    at, begin = list[int](), timed.begin

    def noted(parts: Sequence[np.ndarray]) -> Begun:
        at.extend(part.ctypes.data % 16 for part in parts)
        return begin(parts)

    monkeypatch.setattr(timed, "begin", noted)
    connection, whole = connect(), infer(np.zeros(100, int))
    connection.sendall(whole[:1000])
    until(lambda: bool(timed.lent))
    connection.sendall(whole[1000:])
    assert answer(connection)[0] == 200
    size = len(whole) - whole.index(b"\r\n\r\n") - 4
    assert AHEAD < size <= timed.lent[0] < size + 64
    assert at == [0]


def test_a_client_that_leaves_meanwhile_holds_up_nobody(connect: Callable[[], socket.socket], timed: Timed,
                                                        front: Front) -> None:
    for _ in range(5):
        gone, half = connect(), connect()
        half.sendall(infer(np.zeros(200, int))[:AHEAD + 1000])
        until(lambda: front.arriving == 1)
        gone.sendall(infer(np.zeros(100, int)))
        gone.close()
        half.close()
        until(lambda: front.arriving == 0)
        connection = connect()
        connection.sendall(request())
        assert json.loads(answer(connection)[2])["predictions"][0]["top"][0]["label"] == "red"
    until(lambda: timed.under_way == 0)


def test_a_front_that_ends_takes_what_is_under_way_along(app: Flask, serving: Any, granian: Granian, tmp_path: Path,
                                                         timed: Timed) -> None:
    front, port = Front(app.wsgi_app, tmp_path / "api.sock"), free_port()  # type: ignore[arg-type]
    front.start("127.0.0.1", port, shared=False)
    until(lambda: answers(port))
    timed.takes_s = 0.3
    with (socket.create_connection(("127.0.0.1", port)) as half,
          socket.create_connection(("127.0.0.1", port)) as connection):
        half.sendall(infer(np.zeros(200, int))[:AHEAD + 1000])
        until(lambda: front.arriving == 1)
        connection.sendall(infer(np.zeros(100, int)))
        until(lambda: timed.under_way == 1)
    front.close()
    assert timed.under_way == 0
