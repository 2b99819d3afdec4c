"""Spans of a request's stages, as a collector gets them over OTLP/HTTP."""

import dataclasses
import io
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from flask.testing import FlaskClient

from inference.app import create_app
from shared import artifacts
from shared.settings import Settings

from ..collector import Collector, collecting
from .conftest import RED, SIZE, png, publish_model, until

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
HEADERS = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
STAGES = ["decode", "queue", "compute", "encode"]


@pytest.fixture
def collector() -> Iterator[Collector]:
    with collecting() as server:
        yield server


@pytest.fixture
def traced(settings: Settings, root: Path, collector: Collector) -> Iterator[FlaskClient]:
    app = create_app(dataclasses.replace(settings, otel_exporter_otlp_endpoint=collector.url))
    artifacts.promote(root, "colors", "production", publish_model(root, "colors", "m-1"), "onnx-fp32", by="test")
    client = app.test_client()
    until(lambda: client.get("/readyz").status_code == 200)
    yield client
    app.extensions["lanner"].loaded.close()


def predict(client: FlaskClient, query: str = "") -> int:
    return client.post(f"/v1/models/colors/predict{query}", data=png(RED), content_type="image/png",
                       headers=HEADERS).status_code


def infer(client: FlaskClient, **more: str) -> int:
    head = json.dumps({"inputs": [{"name": "images", "datatype": "UINT8", "shape": [1, SIZE, SIZE, 3],
                                   "parameters": {"binary_data_size": SIZE * SIZE * 3}}]}).encode()
    return client.post("/v2/models/colors/infer", data=head + bytes(SIZE * SIZE * 3), headers={
        **HEADERS, "Inference-Header-Content-Length": str(len(head)), "Content-Type": "application/octet-stream",
        **more}).status_code


@pytest.mark.parametrize("ask", [predict, lambda client: predict(client, "?top_k=1"), infer,
                                 lambda client: infer(client, **{"Content-Encoding": "identity"})],
                         ids=["ahead of Flask", "Flask", "v2 ahead of Flask", "v2 Flask"])
def test_the_stages_of_a_request_are_spans_of_the_client_s_trace(traced: FlaskClient, collector: Collector,
                                                                 ask: Any) -> None:
    began = time.time_ns()
    assert ask(traced) == 200
    ended = time.time_ns()
    spans = collector.named(5)
    assert set(spans) == {"predict", *STAGES}
    assert {span.trace_id.hex() for span in spans.values()} == {TRACE}
    request = spans["predict"]
    assert request.parent_span_id.hex() == PARENT
    assert {spans[stage].parent_span_id for stage in STAGES} == {request.span_id}
    slack = 50_000_000  # the wall clock may be set while a request runs
    assert began - slack <= request.start_time_unix_nano <= request.end_time_unix_nano <= ended + slack
    moments = [request.start_time_unix_nano]
    for stage in STAGES:
        moments += [spans[stage].start_time_unix_nano, spans[stage].end_time_unix_nano]
    moments.append(request.end_time_unix_nano)
    assert all(after - before >= -2000 for before, after in zip(moments, moments[1:], strict=False)), moments
    assert {a.key: a.value.string_value or a.value.int_value for a in request.attributes} == {
        "lanner.model": "colors", "lanner.images": 1}
    assert collector.services == {"lanner-inference"}


def test_a_request_that_fails_says_why_in_its_span(traced: FlaskClient, collector: Collector) -> None:
    answer = traced.post("/v1/models/colors/predict", data={"image": (io.BytesIO(b"no image"), "x.png")},
                         headers={"traceparent": "nonsense"})
    assert answer.status_code == 422
    span = collector.named(1)["predict"]
    assert span.status.code == 2
    assert "x.png" in span.status.message
    assert span.parent_span_id == b""


def test_a_collector_that_does_not_answer_costs_no_request(settings: Settings, root: Path) -> None:
    app = create_app(dataclasses.replace(settings, otel_exporter_otlp_endpoint="http://127.0.0.1:9"))
    artifacts.promote(root, "colors", "production", publish_model(root, "colors", "m-1"), "onnx-fp32", by="test")
    client = app.test_client()
    until(lambda: client.get("/readyz").status_code == 200)
    assert [predict(client) for _ in range(20)] == [200] * 20
    app.extensions["lanner"].loaded.close()


def test_without_a_collector_no_exporter_is_imported_and_without_the_extra_one_is_told() -> None:
    code = ("import sys; from shared.settings import load; from shared import tracing; import inference.app\n"
            "assert tracing.start(load({}), 'x') is None\n"
            "assert not [name for name in sys.modules if name.startswith('opentelemetry.exporter')]\n"
            "sys.modules['opentelemetry.sdk.trace'] = None\n"
            "tracing.start(load({'OTEL_EXPORTER_OTLP_ENDPOINT': 'http://127.0.0.1:9'}), 'x')\n")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "install the extra `tracing`" in done.stderr
