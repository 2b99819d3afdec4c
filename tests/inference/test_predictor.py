"""What runs together, for whom, and what does not run at all; with a Session that the test can hold, and a real one."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inference.metrics import Meters
from inference.predictor import LAST, MAX_WAITING, Closed, NotInTime, Predictor
from shared.errors import Unavailable
from shared.runtimes import MAX_BATCH, Session
from shared.runtimes.onnx import OnnxSession

from .conftest import SIZE, onnx_bytes, until

Scores = "Future[list[float]]"


class HeldSession(Session):
    """Answers each image with the value of its first pixel, once `go` is set; notes the batches it ran, and where."""

    def __init__(self, device: str = "cpu") -> None:
        self.device, self.own_thread = device, device != "cpu"
        self.go, self.running, self.closed = threading.Event(), threading.Event(), False
        self.ran: list[list[int]] = []
        self.threads: set[int] = set()

    def run(self, batch: np.ndarray) -> np.ndarray:
        self.running.set()
        assert self.go.wait(10)
        self.threads.add(threading.get_ident())
        self.ran.append(batch[:, 0, 0, 0].tolist())
        if batch[0, 0, 0, 0] == 255:
            raise ValueError("the runtime failed")
        return batch[:, 0, 0, :1].astype(np.float32)

    def close(self) -> None:
        self.closed = True


def images(value: int, count: int = 1) -> np.ndarray:
    return np.full((count, 2, 2, 3), value, np.uint8)


@pytest.fixture(params=["cpu", "NVIDIA H100"])
def session(request: pytest.FixtureRequest) -> HeldSession:
    return HeldSession(request.param)


@pytest.fixture
def predictor(session: HeldSession) -> Iterator[Predictor]:
    predictor = Predictor(session, Meters(), "test")
    yield predictor
    session.go.set()
    predictor.close(wait=True)


@pytest.fixture
def ask(predictor: Predictor) -> Iterator[Callable[..., Scores]]:
    """Ask in a thread of its own; returns once the images wait or run, unless they are turned away."""
    with ThreadPoolExecutor(100) as pool:
        def ask(value: int, count: int = 1, patience_s: float = 60.0, priority: int = LAST) -> Scores:
            before = predictor.images
            future = pool.submit(lambda: predictor.answer(images(value, count), time.monotonic() + patience_s,
                                                          priority).scores[:, 0].tolist())
            until(lambda: predictor.images > before or future.done())
            return future

        yield ask


def results(futures: list[Scores]) -> list[list[float]]:
    return [f.result(10) for f in futures]


def test_what_piles_up_while_busy_runs_together(ask: Callable[..., Scores], session: HeldSession) -> None:
    first = ask(0)
    session.running.wait(10)
    later = [ask(i, i) for i in range(1, 6)]
    session.go.set()
    assert results([first, *later]) == [[0], [1], [2] * 2, [3] * 3, [4] * 4, [5] * 5]
    assert [len(b) for b in session.ran] == [1, 15]


def test_a_batch_stops_at_its_most_and_splits_no_request_but_a_larger_one(ask: Callable[..., Scores],
                                                                         session: HeldSession) -> None:
    first = ask(0)
    session.running.wait(10)
    later = [ask(i, n) for i, n in ((1, MAX_BATCH - 1), (2, 2), (3, 2 * MAX_BATCH + 1), (4, 1))]
    session.go.set()
    assert [len(r) for r in results([first, *later])] == [1, MAX_BATCH - 1, 2, 2 * MAX_BATCH + 1, 1]
    assert [len(b) for b in session.ran] == [1, MAX_BATCH - 1, 2, MAX_BATCH, MAX_BATCH, 1, 1]


def test_a_session_says_how_many_run_at_once(session: HeldSession, predictor: Predictor) -> None:
    session.batches = (1, 8, 200)
    session.go.set()
    large = Predictor(session, Meters(), "large")
    assert (large.most, large.at_once) == (200, 200)
    assert large.answer(images(7, 450)).scores is not None
    assert [len(b) for b in session.ran] == [200, 200, 50]
    large.close(wait=True)


def test_the_urgent_run_first_and_the_others_as_they_came(ask: Callable[..., Scores], session: HeldSession) -> None:
    first = ask(0)
    session.running.wait(10)
    later = [ask(i, 40, priority=priority) for i, priority in ((1, LAST), (2, 2), (3, 1), (4, LAST), (5, 2), (6, 1))]
    session.go.set()
    assert results([first, *later]) == [[0], *([i] * 40 for i in range(1, 7))]
    assert [batch[0] for batch in session.ran] == [0, 3, 6, 2, 5, 1, 4]


def test_a_request_whose_time_is_over_is_not_run(ask: Callable[..., Scores], session: HeldSession,
                                                 predictor: Predictor) -> None:
    first = ask(0)
    session.running.wait(10)
    late = [ask(1, patience_s=0.05), ask(2, patience_s=0.05)]
    for future in late:
        with pytest.raises(NotInTime):
            future.result(10)
    last = ask(3)
    with pytest.raises(NotInTime):
        predictor.answer(images(4), time.monotonic() - 1)
    session.go.set()
    assert results([first, last]) == [[0], [3]]
    assert session.ran == [[0], [3]]
    until(lambda: predictor.images == 0)


def test_what_can_not_be_answered_in_time_is_turned_away_at_once(ask: Callable[..., Scores], predictor: Predictor,
                                                                 session: HeldSession) -> None:
    first = ask(0)
    session.running.wait(10)
    time.sleep(0.3)
    session.go.set()
    first.result(10)
    session.go.clear()
    assert predictor._run_s > 0.02  # a tenth of the first one's 0.3 s
    predictor._run_s = 60.0
    second = ask(1)
    with pytest.raises(Unavailable, match="too many images wait already"):
        predictor.answer(images(2), time.monotonic() + 9)
    session.go.set()
    assert results([second]) == [[1]]


def test_more_images_than_a_run_has_lately_take_longer_in_proportion(ask: Callable[..., Scores], predictor: Predictor,
                                                                     session: HeldSession) -> None:
    first = ask(0)
    session.running.wait(10)
    predictor._run_s = 0.01
    waiting = [ask(i) for i in range(1, 20)]
    assert predictor.is_full(0.18)
    assert not predictor.is_full(0.21)
    with pytest.raises(Unavailable, match="too many images wait already"):
        predictor.answer(images(2), queue_s=0.18)
    session.go.set()
    assert results([first, *waiting]) == [[i] for i in range(20)]
    assert not predictor.is_full(0.0)


@pytest.mark.parametrize("count", [65, 30])
def test_what_takes_long_is_not_run_by_the_thread_that_answers_however_soon_runs_were_over(
        predictor: Predictor, session: HeldSession, count: int) -> None:
    """65 images run in pieces; 30 take thirty times as long as the one image of late."""
    session.go.set()
    predictor._run_s, told = 0.0005, threading.Event()
    predictor.submit(images(1, count), lambda answer: told.set())
    predictor.go()
    assert told.wait(10)
    assert session.threads.isdisjoint({threading.get_ident()})


def test_idle_it_counts_only_what_would_run_before(predictor: Predictor) -> None:
    predictor._run_s, predictor._run_images = 0.1, 10.0
    assert not predictor.is_full(0.0)
    assert not predictor.is_full(0.02, more=1)  # which runs with it, and takes a tenth of ten
    assert predictor.is_full(0.02, more=3)


def test_what_comes_as_a_long_run_ends_does_not_wait_for_the_whole_of_one(
        ask: Callable[..., Scores], predictor: Predictor, session: HeldSession,
        monkeypatch: pytest.MonkeyPatch) -> None:
    first = ask(0)
    session.running.wait(10)
    predictor._run_s, now = 10.0, time.monotonic()
    assert predictor.is_full(4.0)
    monkeypatch.setattr("inference.predictor.time", SimpleNamespace(monotonic=lambda: now + 7.0))
    assert not predictor.is_full(4.0)
    assert predictor.is_full(2.0)
    monkeypatch.setattr("inference.predictor.time", SimpleNamespace(monotonic=lambda: now + 99.0))
    assert not predictor.is_full(0.0)  # it takes longer than they do lately: it may be over at any time
    assert predictor.is_full(9.0, more=1)
    monkeypatch.undo()
    session.go.set()
    assert results([first]) == [[0]]


def test_a_failing_run_fails_its_requests_and_no_later_one(ask: Callable[..., Scores], session: HeldSession) -> None:
    session.go.set()
    with pytest.raises(ValueError, match="the runtime failed"):
        ask(255).result(10)
    assert results([ask(7)]) == [[7]]


def test_closing_answers_what_waits_takes_no_more_and_closes_the_session(ask: Callable[..., Scores],
                                                                         predictor: Predictor,
                                                                         session: HeldSession) -> None:
    futures = [ask(i) for i in range(5)]
    predictor.close()
    predictor.close()
    with pytest.raises(Closed):
        predictor.answer(images(9))
    assert not session.closed
    session.go.set()
    assert results(futures) == [[0], [1], [2], [3], [4]]
    predictor.close(wait=True)
    assert session.closed


def test_what_is_idle_closes_at_once(predictor: Predictor, session: HeldSession) -> None:
    predictor.close(wait=True)
    assert session.closed


def test_more_than_can_wait_is_turned_away_until_there_is_room(ask: Callable[..., Scores], predictor: Predictor,
                                                               session: HeldSession) -> None:
    held = [ask(1, MAX_BATCH) for _ in range(MAX_WAITING // MAX_BATCH)]
    with pytest.raises(Unavailable):
        predictor.answer(images(2))
    session.go.set()
    wait(held, 10)
    assert results([ask(3)]) == [[3]]


def test_on_a_gpu_one_thread_alone_runs_the_session(ask: Callable[..., Scores], session: HeldSession) -> None:
    """Runtimes keep memory for each thread that they meet; on the CPU an idle Session needs no other thread."""
    session.go.set()
    results([ask(i) for i in range(8)])
    assert threading.get_ident() not in session.threads
    assert len(session.threads) == 1 or session.device == "cpu"


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("network") / "model.onnx"
    path.write_bytes(onnx_bytes(np.random.default_rng(3).normal(0, 0.02, (3, 3))))
    return path


@settings(max_examples=40, deadline=None)
@given(sizes=st.lists(st.integers(1, 70), min_size=1, max_size=12), seed=st.integers(0, 2**32 - 1),
       priorities=st.lists(st.sampled_from([1, 2, LAST]), min_size=12, max_size=12))
def test_batched_answers_are_single_answers_in_order(network: Path, sizes: list[int], seed: int,
                                                     priorities: list[int]) -> None:
    asked = [np.random.default_rng([seed, i]).integers(0, 256, (n, SIZE, SIZE, 3), np.uint8)
             for i, n in enumerate(sizes)]
    single = OnnxSession(network)
    predictor = Predictor(OnnxSession(network), Meters(), "test")
    with ThreadPoolExecutor(len(asked)) as pool:
        answers = list(pool.map(lambda i: predictor.answer(asked[i], priority=priorities[i]), range(len(asked))))
    predictor.close(wait=True)
    for batch, answer in zip(asked, answers, strict=True):
        np.testing.assert_allclose(answer.scores, np.concatenate([single.run(image[None]) for image in batch]),
                                   atol=1e-6)


def test_one_that_is_closed_while_all_that_wait_give_up_ends(session: HeldSession) -> None:
    predictor = Predictor(session, Meters(), "test")
    waiting = predictor.submit(images(1), lambda answer: None)
    predictor.close()
    assert not session.closed
    waiting.gone = True
    predictor.go()
    assert predictor.ended.wait(10)
    assert session.closed


def test_where_no_thread_can_be_had_the_next_request_tries_again(session: HeldSession,
                                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    predictor = Predictor(session, Meters(), "test", inline_s=0.0)
    session.go.set()

    def none(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", none)
        predictor.submit(images(1), lambda answer: None)
        with pytest.raises(RuntimeError):
            predictor.go()
    done = threading.Event()
    predictor.submit(images(2), lambda answer: done.set())
    predictor.go()
    assert done.wait(10)
    predictor.close(wait=True)
