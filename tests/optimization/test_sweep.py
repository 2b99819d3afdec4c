"""Processes, threads and batches of an API on this host: what is measured, and what is chosen of it."""

import multiprocessing
import threading
from functools import partial

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from optimization import sweep
from optimization.sweep import (
    BATCHES,
    CLIENTS,
    Trial,
    choose,
    closed_loop,
    fit,
    fit_processes,
    process_counts,
    thread_counts,
)
from shared.runtimes import load

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
    best = {key: found[key] for key in ("processes", "threads", "batch", "images_per_s", "p99_ms")}
    assert best in found["tried"]
    assert found["by_processes"] == [best]


@pytest.fixture
def opened(tmp_path):
    """Opens a real Variant's file, in this process or in another one."""
    nodes = [helper.make_node("Cast", ["images"], ["pixels"], to=TensorProto.FLOAT),
             helper.make_node("ReduceMean", ["pixels", "axes"], ["probabilities"], keepdims=0)]
    graph = helper.make_graph(nodes, "means", [helper.make_tensor_value_info("images", TensorProto.UINT8,
                                                                            ["N", 32, 32, 3])],
                              [helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["N", 3])],
                              [numpy_helper.from_array(np.array([1, 2], np.int64), "axes")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    return partial(load, tmp_path, "onnx")


def test_processes_are_tried_with_their_share_of_the_cores_and_of_the_clients(opened):
    found = fit(opened, "cpu", 2, IMAGES, target_ms=0, processes=process_counts(2))
    assert [(t["processes"], t["threads"], t["batch"]) for t in found["tried"]] == [
        *((1, n, b) for n in (1, 2) for b in BATCHES), *((2, 1, b) for b in BATCHES if b <= CLIENTS // 2)]
    assert [best["processes"] for best in found["by_processes"]] == [1, 2]
    assert all(t["images_per_s"] > 0 and t["p99_ms"] > 0 for t in found["tried"])
    assert {key: found[key] for key in found["by_processes"][0]} in found["by_processes"]
    assert multiprocessing.active_children() == []


def test_on_a_gpu_processes_are_tried_after_one_and_what_they_do_is_added(opened):
    before = fit(opened, "NVIDIA H100", 2, IMAGES, target_ms=0)
    assert {t["processes"] for t in before["tried"]} == {1}
    found = fit_processes(opened, before, 2, IMAGES, 0, [1, 2])
    assert found["tried"][:len(before["tried"])] == before["tried"]
    assert [(t["processes"], t["threads"], t["batch"]) for t in found["tried"][len(before["tried"]):]] == [
        (2, 1, b) for b in BATCHES if b <= CLIENTS // 2]
    assert [best["processes"] for best in found["by_processes"]] == [1, 2]
    assert found["by_processes"][0] == before["by_processes"][0]
    assert found["by_processes"][1] in found["tried"]
    best = {key: found[key] for key in found["by_processes"][0]}
    assert best in found["by_processes"]
    assert found["device"] == "NVIDIA H100"
    assert multiprocessing.active_children() == []


def test_a_process_that_fails_fails_the_sweep_with_its_reason(opened):
    (opened.args[0] / "model.onnx").write_bytes(b"no model")
    with pytest.raises(RuntimeError, match="a process of the sweep failed: Damaged: .*model.onnx"):
        sweep.sweep(opened, [(2, 1)], IMAGES)
    assert multiprocessing.active_children() == []


def test_a_process_that_is_killed_fails_the_sweep(opened):
    with pytest.raises(sweep.SweepFailed, match="a process of the sweep failed: it ended"):
        sweep.sweep(opened, [(2, 1)], IMAGES, lambda: multiprocessing.active_children()[0].kill())
    assert multiprocessing.active_children() == []


def test_leaving_early_ends_the_processes(opened):
    def leave():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sweep.sweep(opened, [(2, 1)], IMAGES, leave)
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize(("cores", "counts"), [(1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (16, [1, 2, 4, 8])])
def test_processes_are_tried_by_doubling_up_to_eight(cores, counts):
    assert process_counts(cores) == counts


def test_on_a_gpu_batches_alone_are_tried():
    assert {t["threads"] for t in fit(lambda threads: Noting(), "NVIDIA H100", 16, IMAGES, 0)["tried"]} == {16}


def test_a_session_that_fails_leaves_no_thread():
    session = Noting(ValueError("the runtime failed"))
    with pytest.raises(ValueError, match="the runtime failed"):
        closed_loop(session, [sweep._jpeg(IMAGES[0])], 32, batch=8)
    assert not [thread for thread in threading.enumerate() if thread.name == "sweep"]


TRIALS = [Trial(1, 1, 8, 5000.0, 12.0), Trial(1, 1, 64, 7000.0, 20.0), Trial(1, 2, 8, 7100.0, 9.0),
          Trial(1, 2, 64, 9000.0, 16.0)]


@pytest.mark.parametrize(("target_ms", "choice"), [(0, (2, 64)), (30, (2, 64)), (15, (2, 8)), (5, (2, 8))])
def test_the_most_images_within_the_target_win_or_the_soonest_where_none_is(target_ms, choice):
    best = choose(TRIALS, target_ms)
    assert (best.threads, best.batch) == choice


def test_as_fast_on_fewer_threads_or_in_smaller_batches_is_better():
    near = [Trial(1, 1, 16, 8900.0, 9.0), Trial(1, 1, 64, 8950.0, 15.0), Trial(1, 2, 64, 9000.0, 16.0),
            Trial(2, 1, 16, 9100.0, 9.0)]
    assert choose(near, 0) == near[0]
    assert max(BATCHES) == CLIENTS  # a larger one would never fill
