"""Statistics and metrics are what happened, whichever route it came by."""

import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flask import Flask
from flask.testing import FlaskClient

from inference.app import create_app
from shared.settings import Settings

from .conftest import RED, SIZE, png, publish_model

STATS = "/v2/models/colors/stats"


def infer(client: FlaskClient, count: int = 1, model: str = "colors") -> int:
    pixels = np.full((count, SIZE, SIZE, 3), RED, np.uint8)
    head = json.dumps({"inputs": [{"name": "images", "datatype": "UINT8", "shape": list(pixels.shape),
                                   "parameters": {"binary_data_size": pixels.nbytes}}]}).encode()
    return client.post(f"/v2/models/{model}/infer", data=head + pixels.tobytes(),
                       headers={"Inference-Header-Content-Length": str(len(head))}).status_code


def predict(client: FlaskClient, image: bytes | None = None, query: str = "") -> int:
    return client.post(f"/v1/models/colors/predict{query}", data=image or png(RED),
                       content_type="image/png").status_code


def stats(client: FlaskClient, path: str = STATS) -> dict[str, Any]:
    [entry] = client.get(path).json["model_stats"]
    return entry


def test_requests_images_and_runs_of_both_apis_are_counted_once(serving: FlaskClient) -> None:
    before = stats(serving)
    assert (before["inference_count"], before["execution_count"], before["version"]) == (0, 0, "1")
    assert [infer(serving), infer(serving, 3), infer(serving, 90), predict(serving)] == [200] * 4
    told = stats(serving)
    assert (told["inference_count"], told["execution_count"]) == (95, 5)
    assert {stage: figure["count"] for stage, figure in told["inference_stats"].items()} == {
        "success": 4, "fail": 0, "queue": 4, "compute_input": 4, "compute_infer": 4, "compute_output": 4,
        "cache_hit": 0, "cache_miss": 0}
    assert {b["batch_size"]: b["compute_infer"]["count"] for b in told["batch_stats"]} == {1: 2, 3: 1, 26: 1, 64: 1}
    assert all(b[stage]["count"] == b["compute_infer"]["count"] for b in told["batch_stats"]
               for stage in ("compute_input", "compute_output"))
    stages = told["inference_stats"]
    parts = sum(stages[stage]["ns"] for stage in ("queue", "compute_input", "compute_infer", "compute_output"))
    assert 0 < parts < stages["success"]["ns"]
    assert all(type(n) is int for figure in stages.values() for n in figure.values())


def test_a_failure_is_counted_and_what_does_not_exist_is_not(serving: FlaskClient) -> None:
    assert predict(serving, b"no image") == 422
    assert infer(serving, 257) == 400
    assert infer(serving, model="nope") == 404
    assert infer(serving, model="colors@nope") == 404
    assert stats(serving)["inference_stats"]["fail"]["count"] == 2
    assert stats(serving)["inference_count"] == 0
    assert [entry["name"] for entry in serving.get("/v2/models/stats").json["model_stats"]] == ["colors"]


def test_versions_and_aliases_are_told_apart(serving: FlaskClient, root: Path) -> None:
    publish_model(root, "colors", "m-2")
    serving.put("/v1/models/colors/aliases/candidate", json={"version": 2, "variant": "onnx-fp32"})
    assert [infer(serving), infer(serving, model="colors@candidate"), predict(serving, query="?alias=candidate"),
            predict(serving, query="?version=2")] == [200] * 4
    assert {(e["name"], e["version"]): e["inference_count"]
            for e in serving.get("/v2/models/stats").json["model_stats"]} == {
        ("colors", "1"): 1, ("colors", "2"): 1, ("colors@candidate", "2"): 2}
    assert stats(serving, "/v2/models/colors/versions/2/stats")["inference_count"] == 1
    assert stats(serving, "/v2/models/colors@candidate/stats")["inference_count"] == 2


def test_many_threads_lose_no_count(serving: FlaskClient, app: Flask) -> None:
    def load() -> None:
        with app.test_client() as client:
            for _ in range(25):
                assert infer(client, 2) == 200

    threads = [threading.Thread(target=load) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    told = stats(serving)
    assert (told["inference_count"], told["inference_stats"]["success"]["count"]) == (400, 200)
    assert told["execution_count"] == sum(b["compute_infer"]["count"] for b in told["batch_stats"]) <= 200
    assert sum(b["batch_size"] * b["compute_infer"]["count"] for b in told["batch_stats"]) == 400


def value(text: str, name: str, labels: str) -> float:
    return float(next(line for line in text.splitlines() if line.startswith(f"{name}{{{labels}}} ")).split()[-1])


def test_metrics_tell_the_same(serving: FlaskClient) -> None:
    infer(serving, 3)
    predict(serving, b"no image")
    text, labels = serving.get("/metrics").text, 'model="colors",version="1"'
    assert {name: value(text, f"nv_inference_{name}", labels) for name in (
        "request_success", "request_failure", "count", "exec_count", "pending_request_count")} == {
            "request_success": 1, "request_failure": 1, "count": 3, "exec_count": 1, "pending_request_count": 0}
    assert value(text, "nv_inference_compute_infer_duration_us", labels) == (
        stats(serving)["inference_stats"]["compute_infer"]["ns"] // 1000)


SMI = """#!/bin/sh
echo asked >> "$(dirname "$0")/calls"
case "$1" in --query-gpu=uuid,utilization.gpu,power.draw,power.limit,memory.used,memory.total) ;; *) exit 9;; esac
echo "GPU-1, 37, 101.25, 700.00, 1024, 81559"
echo "GPU-2, [N/A], 60.00, 700.00, 0, 81559"
"""


def test_gpus_are_told_in_triton_s_units_and_asked_once_a_second(settings: Settings, tmp_path: Path,
                                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(SMI)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    app = create_app(settings)
    try:
        with app.test_client() as client:
            text = [client.get("/metrics").text for _ in range(3)][-1]
    finally:
        app.extensions["lanner"].loaded.close()
    assert value(text, "nv_gpu_utilization", 'gpu_uuid="GPU-1"') == pytest.approx(0.37)
    assert value(text, "nv_gpu_power_usage", 'gpu_uuid="GPU-1"') == 101.25
    assert value(text, "nv_gpu_memory_used_bytes", 'gpu_uuid="GPU-1"') == 1 << 30
    assert value(text, "nv_gpu_memory_total_bytes", 'gpu_uuid="GPU-2"') == 81559 << 20
    assert 'nv_gpu_utilization{gpu_uuid="GPU-2"}' not in text
    assert len((tmp_path / "calls").read_text().splitlines()) < 3


def test_without_a_gpu_nothing_is_told_of_one(settings: Settings, monkeypatch: pytest.MonkeyPatch,
                                              tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    app = create_app(settings)
    try:
        with app.test_client() as client:
            assert "nv_gpu" not in client.get("/metrics").text
    finally:
        app.extensions["lanner"].loaded.close()
