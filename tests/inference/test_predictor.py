"""The Predictor by itself, with a Session that the test can hold."""

import threading
from concurrent.futures import Future, wait

import numpy as np
import pytest

from inference.metrics import Meters
from inference.predictor import MAX_BATCH, MAX_WAITING, Closed, Predictor
from shared.errors import Unavailable

from .conftest import until


class HeldSession:
    """Answers each image with the value of its first pixel, once `go` is set; notes the batches it ran."""

    device = "cpu"

    def __init__(self) -> None:
        self.go, self.batches, self.closed = threading.Event(), [], False
        self.running = threading.Event()

    def run(self, batch: np.ndarray) -> np.ndarray:
        self.running.set()
        assert self.go.wait(10)
        self.batches.append(len(batch))
        if batch[0, 0, 0, 0] == 255:
            raise ValueError("the runtime failed")
        return batch[:, 0, 0, :1].astype(np.float32)

    def close(self) -> None:
        self.closed = True


def images(value: int, count: int = 1) -> np.ndarray:
    return np.full((count, 2, 2, 3), value, np.uint8)


@pytest.fixture
def session() -> HeldSession:
    return HeldSession()


@pytest.fixture
def predictor(session: HeldSession) -> Predictor:
    return Predictor(session, Meters(), "test")


def results(futures: list["Future[np.ndarray]"]) -> list[list[float]]:
    return [f.result(10)[:, 0].tolist() for f in futures]


def test_what_piles_up_while_busy_runs_together(predictor: Predictor, session: HeldSession) -> None:
    first = predictor.submit(images(0))
    session.running.wait(10)
    later = [predictor.submit(images(i, i)) for i in range(1, 6)]
    session.go.set()
    assert results([first, *later]) == [[0], [1], [2] * 2, [3] * 3, [4] * 4, [5] * 5]
    assert session.batches == [1, 15]


def test_a_batch_stops_at_its_most_and_splits_no_request_but_a_larger_one(predictor: Predictor,
                                                                         session: HeldSession) -> None:
    first = predictor.submit(images(0))
    session.running.wait(10)
    later = [predictor.submit(images(i, n)) for i, n in ((1, MAX_BATCH - 1), (2, 2), (3, 2 * MAX_BATCH + 1), (4, 1))]
    session.go.set()
    assert [len(r) for r in results([first, *later])] == [1, MAX_BATCH - 1, 2, 2 * MAX_BATCH + 1, 1]
    assert session.batches == [1, MAX_BATCH - 1, 2, MAX_BATCH, MAX_BATCH, 1, 1]


def test_a_request_that_gave_up_is_not_run(predictor: Predictor, session: HeldSession) -> None:
    first = predictor.submit(images(0))
    session.running.wait(10)
    assert predictor.submit(images(1)).cancel()
    last = predictor.submit(images(2))
    session.go.set()
    assert results([first, last]) == [[0], [2]]
    assert session.batches == [1, 1]


def test_a_failing_run_fails_its_requests_and_no_later_one(predictor: Predictor, session: HeldSession) -> None:
    session.go.set()
    with pytest.raises(ValueError, match="the runtime failed"):
        predictor.submit(images(255)).result(10)
    assert results([predictor.submit(images(7))]) == [[7]]


def test_closing_answers_what_waits_takes_no_more_and_closes_the_session(predictor: Predictor,
                                                                         session: HeldSession) -> None:
    futures = [predictor.submit(images(i)) for i in range(5)]
    predictor.close()
    predictor.close()
    with pytest.raises(Closed):
        predictor.submit(images(9))
    assert not session.closed
    session.go.set()
    assert results(futures) == [[0], [1], [2], [3], [4]]
    until(lambda: session.closed)


def test_more_than_can_wait_is_turned_away_until_there_is_room(predictor: Predictor, session: HeldSession) -> None:
    held = [predictor.submit(images(1, MAX_BATCH)) for _ in range(MAX_WAITING // MAX_BATCH)]
    with pytest.raises(Unavailable):
        predictor.submit(images(2))
    session.go.set()
    wait(held, 10)
    until(lambda: can_submit(predictor))


def can_submit(predictor: Predictor) -> bool:
    try:
        predictor.submit(images(3)).result(10)
    except Unavailable:
        return False
    return True
