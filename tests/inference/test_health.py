"""/livez, /readyz and /metrics."""

import dataclasses
import os
from pathlib import Path

import pytest
from flask.testing import FlaskClient
from prometheus_client.parser import text_string_to_metric_families

from inference.app import create_app
from shared import artifacts, gpu
from shared.settings import Settings

from .conftest import RED, png, publish_model, until


def samples(client: FlaskClient) -> dict[tuple[str, ...], float]:
    """(name, values of the labels in their alphabetical order...) -> value of what /metrics answers."""
    text = client.get("/metrics").text
    found = [s for family in text_string_to_metric_families(text) for s in family.samples]
    return {(s.name, *(value for _, value in sorted(s.labels.items()))): s.value for s in found}


def test_without_a_promotion_the_api_lives_and_is_not_ready(client: FlaskClient) -> None:
    assert client.get("/livez").status_code == 200
    answer = client.get("/readyz")
    assert answer.status_code == 503
    assert answer.json["code"] == answer.json["error"]["code"] == "no_model"
    assert (answer.json["models"], answer.json["refused"], answer.json["redis"]) == ([], [], True)


def test_readiness_lists_what_answers(serving: FlaskClient, root: object) -> None:
    assert serving.get("/readyz").json == {
        "ready": True, "redis": True, "refused": [], "unloaded": [],
        "models": [{"name": "colors", "alias": "production", "version": 1, "model_id": "m-1", "variant": "onnx-fp32",
                    "digest": artifacts.manifest_digest(root, "variants/m-1/onnx-fp32"), "device": "cpu",  # type: ignore[arg-type]
                    "threads": len(os.sched_getaffinity(0)), "batch": 64, "fitted": False}]}


def test_metrics_count_requests_images_and_jobs(serving: FlaskClient) -> None:
    for _ in range(3):
        serving.post("/v1/models/colors/predict", data=png(RED), content_type="image/png")
    serving.post("/v1/pipelines", json={"source": "cifar10"})
    serving.get("/nowhere")
    seen = samples(serving)
    route = "/v1/models/<name>/predict"
    assert seen["lanner_requests_total", "200", "POST", route] == 3
    assert seen["lanner_requests_total", "404", "GET", "none"] == 1
    assert seen["lanner_images_total", "colors"] == 3
    assert seen["lanner_batch_images_sum",] == 3
    for stage in ("decode", "queue", "compute", "encode"):
        assert seen["lanner_predict_seconds_count", stage] == 3
    assert seen["lanner_jobs", "queued"] == 1
    assert seen["lanner_jobs", "waiting"] == 2
    assert seen["lanner_queue_length", "preprocessing"] == 1
    assert seen["lanner_queue_length", "training"] == 0
    assert seen["lanner_loaded_variants",] == 1
    lines = [line.rpartition(" ")[0] for line in serving.get("/metrics").text.splitlines() if line[0] != "#"]
    assert len(lines) == len(set(lines)), "a sample twice: Prometheus refuses the whole scrape"


@pytest.mark.skipif(bool(gpu.find()), reason="this host has a GPU")
def test_under_device_gpu_the_cpu_does_not_answer_in_its_stead(settings: Settings, root: Path) -> None:
    publish_model(root, "colors", "m-1", onnx_fp32=None)
    artifacts.promote(root, "colors", "production", 1, "onnx-fp32", by="test")
    app = create_app(dataclasses.replace(settings, device="gpu"))
    client = app.test_client()
    try:
        state = until(lambda: client.get("/readyz").json["refused"] and client.get("/readyz"))
    finally:
        app.extensions["lanner"].loaded.close()
    assert state.status_code == 503
    assert "DEVICE=gpu, but ONNX Runtime" in state.json["refused"][0]["reason"]
