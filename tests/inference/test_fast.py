"""What is answered ahead of Flask is what Flask answers, to the byte, and is counted as its own."""

import json
from base64 import b64encode
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flask import Flask
from flask.testing import FlaskClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from inference import fast
from shared import artifacts

from .conftest import BLUE, GREEN, RED, SIZE, png, publish_model

PREDICT, INFER = "/v1/models/colors/predict", "/v2/models/colors/infer"
HEADER = "Inference-Header-Content-Length"
BY_FLASK = {"Sec-Fetch-Site": "same-origin"}  # of a browser: Flask looks at it
PIXELS = np.full((2, SIZE, SIZE, 3), GREEN, np.uint8).tobytes()


def infer_head(**changes: Any) -> bytes:
    entry = {"name": "images", "datatype": "UINT8", "shape": [2, SIZE, SIZE, 3],
             "parameters": {"binary_data_size": len(PIXELS)}}
    return json.dumps({"inputs": [entry], "outputs": [{"name": "probabilities", "parameters": {"binary_data": True}}],
                       **changes}).encode()


HEAD = infer_head()
FORM = b"".join(b'--xyz\r\nContent-Disposition: form-data; name="image"; filename="%b.png"\r\n\r\n%b\r\n'
                % (name, png(color)) for name, color in ((b"a", GREEN), (b"b", RED))) + b"--xyz--\r\n"
CASES: list[tuple[str, bytes, dict[str, str], int]] = [
    (PREDICT, png(RED), {"Content-Type": "image/png"}, 200),
    (PREDICT, png(BLUE, 99, "JPEG"), {"Content-Type": "image/jpeg"}, 200),
    (PREDICT, png(GREEN, form="WEBP"), {"Content-Type": "application/octet-stream"}, 200),
    (PREDICT, b"no image", {"Content-Type": "image/png"}, 422),
    (f"{PREDICT}?top_k=1", png(RED), {"Content-Type": "image/png"}, 200),
    (f"{PREDICT}?alias=production&top_k=99999999", png(RED), {"Content-Type": "image/png"}, 200),
    (f"{PREDICT}?top_k=2", b"no image", {"Content-Type": "image/png"}, 422),
    (f"{PREDICT}?alias=nobody", png(RED), {"Content-Type": "image/png"}, 404),
    ("/v1/models/nope/predict", png(RED), {"Content-Type": "image/png"}, 404),
    ("/v1/models/unpromoted/predict", png(RED), {"Content-Type": "image/png"}, 404),
    (f"{PREDICT}?variant=onnx-fp32", png(RED), {"Content-Type": "image/png"}, 200),
    (f"{PREDICT}?version=1&top_k=1", png(RED), {"Content-Type": "image/png"}, 200),
    (f"{PREDICT}?version=1&variant=onnx-int8", png(RED), {"Content-Type": "image/png"}, 404),
    (f"{PREDICT}?version=7", png(RED), {"Content-Type": "image/png"}, 404),
    (PREDICT, json.dumps({"images": [b64encode(png(color)).decode() for color in (RED, BLUE)]}).encode(),
     {"Content-Type": "application/json; charset=utf-8"}, 200),
    (PREDICT, json.dumps({"images": []}).encode(), {"Content-Type": "application/json"}, 422),
    (PREDICT, json.dumps({"images": ["?"]}).encode(), {"Content-Type": "application/json"}, 400),
    (PREDICT, b'{"images": [', {"Content-Type": "application/json"}, 400),
    (PREDICT, FORM, {"Content-Type": "Multipart/Form-Data; boundary=xyz"}, 200),
    (PREDICT, FORM[:-9], {"Content-Type": "multipart/form-data; boundary=xyz"}, 400),
    (PREDICT, FORM, {"Content-Type": "multipart/form-data"}, 400),
    (PREDICT, FORM, {"Content-Type": 'multipart/form-data; boundary="abc"'}, 400),
    (INFER, HEAD + PIXELS, {HEADER: str(len(HEAD))}, 200),
    (f"{INFER.replace('colors', 'colors@production')}", HEAD + PIXELS, {HEADER: str(len(HEAD))}, 200),
    (INFER, HEAD + PIXELS, {HEADER: str(len(HEAD)), "Accept-Encoding": "br, gzip"}, 200),
    (INFER, HEAD + PIXELS, {HEADER: str(len(HEAD)), "Accept-Encoding": "gzip;q=0.1, deflate"}, 200),
    ("/v2/models/colors/versions/1/infer", HEAD + PIXELS, {HEADER: str(len(HEAD))}, 200),
    ("/v2/models/colors/versions/7/infer", HEAD + PIXELS, {HEADER: str(len(HEAD))}, 404),
    ("/v2/models/nope/infer", HEAD + PIXELS, {HEADER: str(len(HEAD))}, 404),
    (INFER, PIXELS[: len(PIXELS) // 2], {HEADER: "0"}, 200),
    (INFER, HEAD + PIXELS[1:], {HEADER: str(len(HEAD))}, 400),
    (INFER, HEAD, {HEADER: "x"}, 400),
    (INFER, b"{}", {}, 400),
    (INFER, infer_head(parameters={"timeout": 1}) + PIXELS, {HEADER: str(len(infer_head(parameters={"timeout": 1})))},
     503),
]


@pytest.fixture
def other(serving: FlaskClient, root: Path) -> FlaskClient:
    """`serving`, with a Name that has no alias."""
    publish_model(root, "unpromoted", "m-9")
    return serving


@pytest.mark.parametrize(("path", "body", "headers", "status"), CASES)
def test_an_answer_is_that_of_flask_to_the_byte(other: FlaskClient, monkeypatch: pytest.MonkeyPatch, path: str,
                                                body: bytes, headers: dict[str, str], status: int) -> None:
    ahead = other.post(path, data=body, headers=headers)
    behind = other.post(path, data=body, headers={**headers, **BY_FLASK})
    assert (ahead.status_code, ahead.data) == (status, behind.data)
    assert behind.status_code == status
    assert sorted(ahead.headers) == sorted(behind.headers)
    assert ahead.headers.get("Content-Encoding") == behind.headers.get("Content-Encoding")


def reached_flask(app: Flask, client: FlaskClient, path: str, body: bytes, headers: dict[str, str]) -> bool:
    seen: list[str] = []
    app.before_request_funcs[None].insert(0, lambda: seen.append("flask"))
    try:
        client.post(path, data=body, headers=headers)
    finally:
        app.before_request_funcs[None].pop(0)
    return bool(seen)


@pytest.mark.parametrize(("path", "body", "headers", "status"), CASES)
def test_none_of_these_reaches_flask(app: Flask, other: FlaskClient, path: str, body: bytes, headers: dict[str, str],
                                     status: int) -> None:
    assert not reached_flask(app, other, path, body, headers)


@pytest.mark.parametrize(("path", "body", "headers"), [
    (f"{PREDICT}?top_k=0", png(RED), {"Content-Type": "image/png"}),
    (f"{PREDICT}?top_k=1&top_k=2", png(RED), {"Content-Type": "image/png"}),
    (f"{PREDICT}?top_k=1&", png(RED), {"Content-Type": "image/png"}),
    (f"{PREDICT}?top_k=%31", png(RED), {"Content-Type": "image/png"}),
    (f"{PREDICT}?variant=ONNX", png(RED), {"Content-Type": "image/png"}),
    (f"{PREDICT}?version=0", png(RED), {"Content-Type": "image/png"}),
    (f"{PREDICT}?alias=", png(RED), {"Content-Type": "image/png"}),
    (f"{PREDICT}?alias=Production", png(RED), {"Content-Type": "image/png"}),
    (f"{PREDICT}?more=1", png(RED), {"Content-Type": "image/png"}),
    (PREDICT, png(RED), {"Content-Type": "text/plain"}),
    (PREDICT, png(RED), {"Content-Type": "image/png", "Content-Encoding": "gzip"}),
    (PREDICT, b"", {"Content-Type": "image/png"}),
    (PREDICT, b"x" * ((1 << 20) + 1), {"Content-Type": "image/png"}),
    ("/v1/models/Colors/predict", png(RED), {"Content-Type": "image/png"}),
    ("/v1/models/colors/predict/", png(RED), {"Content-Type": "image/png"}),
    (INFER, HEAD + PIXELS, {HEADER: str(len(HEAD)), "Content-Encoding": "identity"}),
    (f"{INFER}/more", HEAD + PIXELS, {HEADER: str(len(HEAD))}),
])
def test_what_is_odd_is_flask_s(app: Flask, serving: FlaskClient, path: str, body: bytes,
                                headers: dict[str, str]) -> None:
    assert reached_flask(app, serving, path, body, headers)


def test_an_alias_in_the_query_answers_and_is_counted_by_its_name(serving: FlaskClient, root: Path) -> None:
    version = publish_model(root, "colors", "m-2", onnx_fp32=np.eye(3)[::-1] * 0.05)
    artifacts.promote(root, "colors", "candidate", version, "onnx-fp32", by="test")
    answer = serving.post(f"{PREDICT}?alias=candidate&top_k=1", data=png(RED), headers={"Content-Type": "image/png"})
    assert (answer.json["version"], [t["label"] for t in answer.json["predictions"][0]["top"]]) == (version, ["blue"])
    told = serving.get("/v2/models/colors@candidate/stats").json
    assert [stats["inference_count"] for stats in told["model_stats"]] == [1]


def test_requests_are_counted_under_their_routes(serving: FlaskClient) -> None:
    serving.post(PREDICT, data=png(RED), headers={"Content-Type": "image/png"})
    serving.post(PREDICT, data=b"x", headers={"Content-Type": "image/png"})
    serving.post(PREDICT, data=png(RED), headers={"Content-Type": "image/png", **BY_FLASK})
    serving.post(INFER, data=HEAD + PIXELS, headers={HEADER: str(len(HEAD))})
    told = serving.get("/metrics").text
    for route, code, count in (("/v1/models/<name>/predict", 200, 2), ("/v1/models/<name>/predict", 422, 1),
                               ("/v2/models/<model>/infer", 200, 1)):
        assert f'lanner_requests_total{{code="{code}",method="POST",route="{route}"}} {count}.0' in told
    rules = {rule.rule for rule in serving.application.url_map.iter_rules()}
    assert {fast.predict.RULE, fast.infer.RULE, fast.infer.VERSION_RULE} <= rules


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(path=st.sampled_from([PREDICT, INFER, "/v2/models/colors/versions/1/infer"]), body=st.binary(max_size=200),
       kind=st.sampled_from(["image/png", "application/octet-stream", "application/json"]),
       header=st.none() | st.integers(-3, 300).map(str))
def test_whatever_the_body_both_say_the_same(serving: FlaskClient, path: str, body: bytes, kind: str,
                                             header: str | None) -> None:
    headers = {"Content-Type": kind, **({} if header is None else {HEADER: header})}
    ahead, behind = (serving.post(path, data=body, headers=h) for h in (headers, {**headers, **BY_FLASK}))
    assert (ahead.status_code, ahead.data) == (behind.status_code, behind.data)


def test_a_body_cut_off_is_refused(serving: FlaskClient) -> None:
    environ = {"CONTENT_LENGTH": "500", "wsgi.input_terminated": True}
    answer = serving.post(PREDICT, data=png(RED)[:60], headers={"Content-Type": "image/png"},
                          environ_overrides=environ)
    assert (answer.status_code, answer.json["error"]["code"]) == (400, "malformed")
    assert answer.json["error"]["message"] == "the body ended after 60 bytes, its Content-Length is 500: send it again"


def test_a_promotion_reaches_it(serving: FlaskClient, root: Path) -> None:
    version = publish_model(root, "colors", "m-2", onnx_fp32=np.eye(3)[::-1] * 0.05)
    artifacts.promote(root, "colors", "candidate", version, "onnx-fp32", by="test")
    pixels = np.full((2, SIZE, SIZE, 3), RED, np.uint8).tobytes()
    answer = serving.post("/v2/models/colors@candidate/infer", data=HEAD + pixels, headers={HEADER: str(len(HEAD))})
    assert np.frombuffer(answer.data[int(answer.headers[HEADER]):], "<f4").reshape(2, 3).argmax(1).tolist() == [2, 2]
