"""An API runs a Variant as was found best on this host, and by its defaults wherever that does not hold."""

import os
from pathlib import Path
from typing import Any

import pytest
from flask.testing import FlaskClient

from inference.memory import Memory
from inference.metrics import Meters
from shared import artifacts
from shared.artifacts import read_json, write_json
from shared.fitted import Fit, processes, read_fit, write_fits
from shared.runtimes import MAX_BATCH
from shared.runtimes.onnx import OnnxSession

from .conftest import RED, png, publish_model, until

CORES = len(os.sched_getaffinity(0))
ENTRY = {"device": "cpu", "by_processes": [{"processes": 1, "threads": 1, "batch": 8}]}


def entry(**change: Any) -> dict[str, Any]:
    return {**ENTRY, "by_processes": [{**ENTRY["by_processes"][0], **change}]}  # type: ignore[index,dict-item]


def served(client: FlaskClient, root: Path) -> dict[str, Any]:
    """What /readyz tells of `colors`, promoted now; it answers."""
    artifacts.promote(root, "colors", "production", publish_model(root, "colors", "m-1"), "onnx-fp32", by="test")
    state: dict[str, Any] = until(lambda: client.get("/readyz").json["models"])[0]
    answer = client.post("/v1/models/colors/predict", data=png(RED), content_type="image/png")
    assert answer.json["predictions"][0]["top"][0]["label"] == "red"
    return {key: state[key] for key in ("threads", "batch", "fitted")}


def test_what_was_found_on_this_host_is_used(client: FlaskClient, root: Path) -> None:
    write_fits(root, "m-1", CORES, 0, {"onnx-fp32": ENTRY})
    assert served(client, root) == {"threads": 1, "batch": 8, "fitted": True}


@pytest.mark.parametrize("change", [{"cpu": "another processor"}, {"cores": CORES + 1}, {"variants": {}},
                                    {"variants": {"onnx-fp32": entry(threads=CORES + 1)}},
                                    {"variants": {"onnx-fp32": entry(batch="many")}}, {"variants": 3},
                                    {"variants": {"onnx-fp32": entry(processes=2)}}, {"schema": 1}])
def test_what_was_found_elsewhere_or_makes_no_sense_is_left_alone(client: FlaskClient, root: Path,
                                                                  change: dict[str, Any]) -> None:
    write_fits(root, "m-1", CORES, 0, {"onnx-fp32": ENTRY})
    path = root / "cards/m-1.serving.json"
    write_json(path, {**read_json(path), **change})
    assert served(client, root) == {"threads": CORES, "batch": MAX_BATCH, "fitted": False}


def test_on_a_gpu_several_processes_take_what_one_does_until_they_are_tried(root: Path) -> None:
    write_fits(root, "m-1", CORES, 5, {"tensorrt-fp16": {**ENTRY, "device": "NVIDIA X"}, "onnx-fp32": ENTRY})
    assert read_fit(root, "m-1", "tensorrt-fp16", CORES, 4) == Fit(1, 8, "NVIDIA X", bounded=True)
    assert read_fit(root, "m-1", "onnx-fp32", CORES, 4) is None


def test_a_file_that_is_no_json_stops_no_variant(client: FlaskClient, root: Path) -> None:
    (root / "cards").mkdir(exist_ok=True)
    (root / "cards/m-1.serving.json").write_text("{")
    assert served(client, root)["fitted"] is False


def test_the_most_processes_of_several_names_whatever_is_damaged(root: Path) -> None:
    assert processes(root, CORES) == 1
    for name, model, found in (("colors", "m-1", 2), ("shades", "m-2", 4), ("broken", "m-3", 8), ("odd", "m-4", "x")):
        artifacts.promote(root, name, "production", publish_model(root, name, model), "onnx-fp32", by="test")
        write_fits(root, model, CORES, 0, {"onnx-fp32": {**ENTRY, "processes": found}})
    publish_model(root, "unpromoted", "m-5")
    (root / "aliases/broken/production.json").write_text("{")
    assert processes(root, CORES) == 4
    assert processes(root, CORES + 1) == 1


@pytest.mark.parametrize(("target_ms", "tried", "taken"), [(0, 64, 256), (0, 32, 32), (9, 64, 64)])
def test_of_a_session_for_larger_batches_the_target_alone_keeps_them_small(
        root: Path, monkeypatch: pytest.MonkeyPatch, target_ms: int, tried: int, taken: int) -> None:
    monkeypatch.setattr(OnnxSession, "batches", (1, 64, 256))
    publish_model(root, "colors", "m-1")
    write_fits(root, "m-1", 2, target_ms, {"onnx-fp32": {"device": "cpu", "by_processes": [
        {"processes": 1, "threads": 2, "batch": tried}]}})
    memory = Memory(root, Meters(), 2)
    assert memory.get(("m-1", "onnx-fp32")).batch == taken
    memory.close()


def test_on_another_device_its_batch_does_not_hold(client: FlaskClient, root: Path) -> None:
    write_fits(root, "m-1", CORES, 0, {"onnx-fp32": {**ENTRY, "device": "NVIDIA H100"}})
    assert served(client, root) == {"threads": 1, "batch": MAX_BATCH, "fitted": False}


def test_several_processes_take_what_was_found_for_as_many(root: Path) -> None:
    write_fits(root, "m-1", 8, 0, {"onnx-fp32": {"device": "cpu", "by_processes": [
        {"processes": 1, "threads": 8, "batch": 64}, {"processes": 4, "threads": 2, "batch": 16}]}})
    publish_model(root, "colors", "m-1")
    for count, chosen in ((1, (8, 64, True)), (4, (2, 16, True)), (2, (4, MAX_BATCH, False))):
        memory = Memory(root, Meters(), cores=8, processes=count)
        loaded = memory.get(("m-1", "onnx-fp32"))
        assert (loaded.threads, loaded.batch, loaded.fitted) == chosen
        memory.close()


@pytest.mark.parametrize(("cores", "processes", "quick"), [(1, 1, True), (4, 4, True), (2, 1, False)])
def test_what_takes_a_few_milliseconds_runs_in_the_asking_thread_where_a_process_has_one_core(
        root: Path, cores: int, processes: int, quick: bool) -> None:
    publish_model(root, "colors", "m-1")
    memory = Memory(root, Meters(), cores, processes=processes)
    try:
        predictor = memory.get(("m-1", "onnx-fp32")).predictor
        predictor._run_s = 0.003
        assert predictor.is_quick == quick
    finally:
        memory.close()
