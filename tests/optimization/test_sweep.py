"""Threads and batches of an API on this host: what is measured, and what is chosen of it."""

import threading

import numpy as np
import pytest

from optimization import sweep
from optimization.sweep import BATCHES, CLIENTS, Trial, choose, closed_loop, fit, thread_counts

IMAGES = np.random.default_rng(0).integers(0, 256, (70, 32, 32, 3), np.uint8)


class Noting:
    """A Session that notes the batches it ran."""

    device = "cpu"

    def __init__(self, error=None):
        self.batches, self.closed, self.error = [], False, error

    def run(self, batch):
        assert batch.dtype == np.uint8
        assert batch.shape[1:] == (32, 32, 3)
        self.batches.append(len(batch))
        if self.error and len(self.batches) > 1:
            raise self.error
        return np.zeros((len(batch), 3), np.float32)

    def close(self):
        self.closed = True


@pytest.mark.parametrize(("cores", "counts"), [(1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (16, [1, 2, 4, 8, 16])])
def test_threads_are_tried_by_doubling_up_to_all_cores(cores, counts):
    assert thread_counts(cores) == counts


def test_what_waits_runs_together_up_to_the_batch():
    session = Noting()
    rate, took = closed_loop(session, [sweep._jpeg(image) for image in IMAGES], 32, batch=8, seconds=0.05)
    assert session.batches[0] == 8  # the first run of a shape, not counted
    assert max(session.batches[1:]) <= 8
    assert len(took) == sum(session.batches[1:]) >= 3
    assert rate > 0
    assert min(took) > 0


def test_every_choice_is_measured_and_every_session_closed():
    opened = {}

    def open_(threads):
        opened[threads] = Noting()
        return opened[threads]

    looked = []
    found = fit(open_, "cpu", 2, IMAGES, target_ms=0, between=lambda: looked.append(None))
    assert [(t["threads"], t["batch"]) for t in found["tried"]] == [(n, b) for n in (1, 2) for b in BATCHES]
    assert len(looked) == sweep.ROUNDS * 2 * len(BATCHES)
    assert all(session.closed for session in opened.values())
    assert {"threads": found["threads"], "batch": found["batch"], "images_per_s": found["images_per_s"],
            "p99_ms": found["p99_ms"]} in found["tried"]


def test_on_a_gpu_batches_alone_are_tried():
    assert {t["threads"] for t in fit(lambda threads: Noting(), "NVIDIA H100", 16, IMAGES, 0)["tried"]} == {16}


def test_a_session_that_fails_leaves_no_thread():
    session = Noting(ValueError("the runtime failed"))
    with pytest.raises(ValueError, match="the runtime failed"):
        closed_loop(session, [sweep._jpeg(IMAGES[0])], 32, batch=8)
    assert not [thread for thread in threading.enumerate() if thread.name == "sweep"]


TRIALS = [Trial(1, 8, 5000.0, 12.0), Trial(1, 64, 7000.0, 20.0), Trial(2, 8, 7100.0, 9.0), Trial(2, 64, 9000.0, 16.0)]


@pytest.mark.parametrize(("target_ms", "choice"), [(0, (2, 64)), (30, (2, 64)), (15, (2, 8)), (5, (2, 8))])
def test_the_most_images_within_the_target_win_or_the_soonest_where_none_is(target_ms, choice):
    best = choose(TRIALS, target_ms)
    assert (best.threads, best.batch) == choice


def test_as_fast_on_fewer_threads_or_in_smaller_batches_is_better():
    near = [Trial(1, 16, 8900.0, 9.0), Trial(1, 64, 8950.0, 15.0), Trial(2, 64, 9000.0, 16.0)]
    assert choose(near, 0) == near[0]
    assert max(BATCHES) == CLIENTS  # a larger one would never fill
