"""Infer requests as they should not be: each is refused with Triton's sentence, and none crashes the API."""

import base64
import gzip
import json
import zlib
from typing import Any

import numpy as np
import pytest
from flask import Flask
from flask.testing import FlaskClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from werkzeug.test import TestResponse

from .conftest import GREEN, RED, SIZE, png

PIXELS = np.full((1, SIZE, SIZE, 3), RED, np.uint8).tobytes()
BYTES = SIZE * SIZE * 3
HEADER = "Inference-Header-Content-Length"


def message(asked: dict[str, Any] | None = None, **fields: Any) -> dict[str, Any]:
    """One red image in binary; `fields` replace those of the input."""
    tensor = {"name": "images", "datatype": "UINT8", "shape": [1, SIZE, SIZE, 3],
              "parameters": {"binary_data_size": BYTES}, **fields}
    return {"inputs": [tensor], **({"parameters": asked} if asked else {})}


def ask(client: FlaskClient, body: Any, blob: bytes = b"", model: str = "colors", **headers: str) -> TestResponse:
    head = body if isinstance(body, bytes) else json.dumps(body).encode()
    return client.post(f"/v2/models/{model}/infer", data=head + blob, headers={HEADER: str(len(head)), **headers})


def label(answer: TestResponse) -> int:
    assert answer.status_code == 200, answer.text
    return int(np.argmax(answer.json["outputs"][0]["data"]))


def test_an_answer_in_json_and_its_form(serving: FlaskClient) -> None:
    answer = ask(serving, {"id": "", **message()}, PIXELS)
    assert (answer.mimetype, HEADER in answer.headers) == ("application/json", False)
    assert answer.json["outputs"][0].keys() == {"name", "datatype", "shape", "data"}
    assert "id" not in answer.json
    assert label(answer) == 0


def test_an_answer_in_binary_and_its_form(serving: FlaskClient) -> None:
    answer = ask(serving, {"id": "7", **message({"binary_data_output": True})}, PIXELS)
    size = int(answer.headers[HEADER])
    told = json.loads(answer.data[:size])
    assert answer.mimetype == "application/octet-stream"
    assert (told["id"], told["outputs"][0]["parameters"]) == ("7", {"binary_data_size": 12})
    assert np.frombuffer(answer.data[size:], "<f4").argmax() == 0


def test_a_raw_body_is_the_pixels_of_one_image(serving: FlaskClient) -> None:
    answer = serving.post("/v2/models/colors/infer", data=PIXELS, headers={HEADER: "0"})
    assert np.frombuffer(answer.data[int(answer.headers[HEADER]):], "<f4").argmax() == 0
    answer = serving.post("/v2/models/colors/infer", data=PIXELS[1:], headers={HEADER: "0"})
    assert (answer.status_code, answer.json["error"]) == (
        400, "input byte size mismatch for input 'images' for model 'colors'. Expected 3072, got 3071")


def test_an_encoded_image_in_json_is_base64(serving: FlaskClient) -> None:
    def body(text: str) -> dict[str, Any]:
        return {"inputs": [{"name": "images", "datatype": "BYTES", "shape": [1], "data": [text]}]}

    assert label(ask(serving, body(base64.b64encode(png(GREEN, 100, "JPEG")).decode()))) == 1
    assert "image 0 is not base64" in ask(serving, body("ä")).json["error"]
    assert "image 0: the image's format is not recognised" in ask(serving, body("AAAA")).json["error"]


def test_pixels_in_floats_are_rounded(serving: FlaskClient) -> None:
    images = np.full((1, SIZE, SIZE, 3), 0.0)
    images[..., 1] = 99.5  # to 100: ties to even
    floats = ask(serving, message(datatype="FP64", parameters={}, data=images.tolist())).json["outputs"][0]["data"]
    whole = ask(serving, message(parameters={}, data=np.rint(images).astype(int).tolist())).json["outputs"][0]["data"]
    assert floats == whole


NANS = np.full(BYTES, np.nan, "<f4").tobytes()
UNKNOWN_INPUT = "unexpected inference input 'pixels' for model 'colors'"
TWO_SOURCES = "sets data and binary_data_size of data, binary_data_size, shared_memory_region: expected exactly one"
NO_SOURCE = "sets none of data"
BAD_PIXEL = "has values from 0.0 to 256.0: expected pixels from 0 to 255"


@pytest.mark.parametrize(("body", "blob", "status", "sentence"), [
    (b"", b"", 400, "failed to parse the request JSON buffer"),
    (b"{", b"", 400, "failed to parse the request JSON buffer"),
    (b"[]", b"", 400, "failed to parse the request JSON buffer"),
    (b"[" * 100_000, b"", 400, "failed to parse the request JSON buffer"),
    (b"\xff", b"", 400, "failed to parse the request JSON buffer"),
    ({}, b"", 400, "Unable to parse 'inputs'"),
    ({"inputs": []}, b"", 400, "expected 1 inputs but got 0 inputs for model 'colors'"),
    ({"inputs": [{}, {}]}, b"", 400, "expected 1 inputs but got 2 inputs for model 'colors'"),
    ({"inputs": [1]}, b"", 400, "Unable to parse 'inputs'"),
    ({"inputs": [{}]}, b"", 400, "Unable to parse 'name'"),
    (message(name="pixels"), PIXELS, 400, UNKNOWN_INPUT),
    (message(datatype="FP8"), PIXELS, 400, "datatype 'FP8' of input 'images' is unknown"),
    (message(datatype="BOOL"), PIXELS, 400, "data-type is 'BOOL', but model 'colors' expects 'UINT8'"),
    (message(shape=[1, -1]), PIXELS, 400, "Unable to parse 'shape'"),
    (message(shape=[0, SIZE, SIZE, 3]), b"", 400, "Unable to parse 'shape'"),
    (message(shape=[1] * 99 + [BYTES]), PIXELS, 400, "Unable to parse 'shape'"),
    (message(shape=[1, 2 ** 30, 2 ** 30, 3]), PIXELS, 400, "input byte size mismatch"),
    (message(shape=[1, 3, SIZE, SIZE]), PIXELS, 400, "Expected [-1,32,32,3], got [1, 3, 32, 32]"),
    (message(shape=[1, BYTES]), PIXELS, 400, "Expected [-1,32,32,3], got"),
    (message(), PIXELS[:-2], 400,
     "unexpected size for input 'images', expecting 2 additional bytes for model 'colors'"),
    (message(), PIXELS + b"x", 400, "unexpected additional input data for model 'colors'"),
    (message(parameters={"binary_data_size": -1}), b"", 400, "Unable to parse 'binary_data_size'"),
    (message(parameters={"binary_data_size": "12"}), b"", 400, "Unable to parse 'binary_data_size'"),
    (message(parameters={"binary_data_size": True}), b"x", 400, "Unable to parse 'binary_data_size'"),
    (message(parameters={"binary_data_size": 12}), b"x" * 12, 400, "Expected 3072, got 12"),
    (message(data=[1]), PIXELS, 400, TWO_SOURCES),
    (message(parameters={}), b"", 400, NO_SOURCE),
    (message(parameters={}, data=[1]), b"", 400, "has 1 elements, its shape [1, 32, 32, 3] has 3072"),
    (message(parameters={}, data=[1]), b"x", 400, "unexpected additional input data"),
    (message(parameters={}, data=[300] * BYTES), b"", 400, "has values that are not UINT8"),
    (message(parameters={}, datatype="FP32", data=[0] * (BYTES - 1) + [256]), b"", 400, BAD_PIXEL),
    (message(parameters={}, datatype="FP32", data=[float("nan")] * BYTES), b"", 400,
     "failed to parse the request JSON buffer"),
    (message(parameters={"binary_data_size": 4 * BYTES}, datatype="FP32"), NANS, 400, "expected pixels from 0 to 255"),
    (message(parameters={"shared_memory_region": "in", "shared_memory_byte_size": BYTES}), b"", 400,
     "shared memory of clients is not allowed"),
    ({**message(), "outputs": [{"name": "scores"}]}, PIXELS, 400, "unexpected inference output 'scores'"),
    ({**message(), "outputs": [{"name": "probabilities", "parameters": {"classification": -1}}]}, PIXELS, 400,
     "Unable to parse 'classification'"),
    ({**message(), "outputs": [{"name": "probabilities",
                                "parameters": {"classification": 1, "shared_memory_region": "out"}}]}, PIXELS, 400,
     "can't be in a shared memory region and have 'classification'"),
    (message({"priority": -1}), PIXELS, 400, "Unable to parse 'priority'"),
    (message({"triton_x": 1}), PIXELS, 400, "parameter keys starting with 'triton_' are reserved"),
    (message({"variant": "onnx-fp64"}), PIXELS, 404,
     "Request for unknown model: 'colors' is not found: version 1 of colors has no onnx-fp64"),
    (message({"variant": "../m-1"}), PIXELS, 404, "is not found"),
    (message({"timeout": 1}), PIXELS, 503, "no answer within 1e-06 s")])
def test_what_is_no_request_is_told_why(serving: FlaskClient, body: Any, blob: bytes, status: int,
                                        sentence: str) -> None:
    answer = ask(serving, body, blob)
    assert (answer.status_code, answer.json.keys()) == (status, {"error"})
    assert sentence in answer.json["error"]


@pytest.mark.parametrize("length", ["-1", "9999999", "x", "", "1.5", "٣"])
def test_a_header_length_out_of_range_is_refused(serving: FlaskClient, length: str) -> None:
    answer = serving.post("/v2/models/colors/infer", data=b"{}", headers={HEADER: length})
    assert answer.status_code == 400
    assert "inference header size should be in range" in answer.json["error"] or "Unable to" in answer.json["error"]


def test_more_images_than_one_request_may_have_are_refused(serving: FlaskClient) -> None:
    body = {"inputs": [{"name": "images", "datatype": "BYTES", "shape": [257], "data": ["AAAA"] * 257}]}
    assert ask(serving, body).json["error"] == "inference request batch-size must be <= 256 for 'colors'"


@pytest.mark.parametrize("coding", ["gzip", "deflate"])
def test_compressed_bodies_are_bounded_by_what_they_become(serving: FlaskClient, coding: str) -> None:
    pack = gzip.compress if coding == "gzip" else zlib.compress
    whole = json.dumps(message()).encode()

    def send(body: bytes) -> TestResponse:
        return serving.post("/v2/models/colors/infer", data=body,
                            headers={HEADER: str(len(whole)), "Content-Encoding": coding})

    assert label(send(pack(whole + PIXELS))) == 0
    bomb = send(pack(bytes(2 << 20)))
    assert (bomb.status_code, "decompressed" in bomb.json["error"]) == (413, True)
    assert "ends before it is whole" in send(pack(whole + PIXELS)[:-9]).json["error"]
    assert "can't be decompressed" in send(b"\x1f\x8b" + b"x" * 99).json["error"]
    assert "can't be decompressed" in send(whole).json["error"]


def test_other_codings_are_refused_and_answers_are_coded_where_asked(serving: FlaskClient) -> None:
    assert ask(serving, message(), PIXELS, **{"Content-Encoding": "br"}).status_code == 415
    assert gzip.decompress(ask(serving, message(), PIXELS, **{"Accept-Encoding": "br, gzip"}).data).startswith(b"{")
    assert zlib.decompress(ask(serving, message(), PIXELS, **{"Accept-Encoding": "deflate, gzip;q=0.5"}).data)
    for none in ("", "br", "gzip;q=0"):
        assert ask(serving, message(), PIXELS, **{"Accept-Encoding": none}).json


def test_errors_have_triton_s_form_and_status(serving: FlaskClient) -> None:
    for method, path, status in (("GET", "/v2/models/nope", 404), ("GET", "/v2/models/colors/versions/9", 404),
                                 ("GET", "/v2/models/colors@nope/config", 404), ("GET", "/v2/nowhere", 404),
                                 ("GET", "/v2/models/colors@", 400), ("GET", "/v2/models/..", 400),
                                 ("GET", "/v2/models/colors/infer", 405), ("POST", "/v2", 405),
                                 ("POST", "/v2/cudasharedmemory/unregister", 404),
                                 ("GET", "/v2/models/colors/versions/x", 404)):
        answer = serving.open(path, method=method)
        assert (answer.status_code, isinstance(answer.json["error"], str)) == (status, True), path


@pytest.fixture(scope="module")
def seeds() -> list[bytes]:
    whole = json.dumps(message()).encode() + PIXELS
    texts = json.dumps(message(parameters={}, datatype="FP32", data=[1.5] * BYTES)).encode()
    return [whole, texts, json.dumps({"inputs": [{"name": "images", "datatype": "BYTES", "shape": [1],
                                                  "parameters": {"binary_data_size": 9}}]}).encode() + b"\5\0\0\0image"]


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_request_is_answered_or_refused_and_never_crashes(serving: FlaskClient, app: Flask,
                                                                   seeds: list[bytes], data: st.DataObject) -> None:
    body = bytearray(data.draw(st.sampled_from(seeds)))
    for _ in range(data.draw(st.integers(0, 4))):
        at = data.draw(st.integers(0, min(len(body) - 1, 300)))
        body[at:at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    length = data.draw(st.integers(-2, len(body) + 2) | st.just(body.find(b"]}") + 2))
    answer = serving.post("/v2/models/colors/infer", data=bytes(body), headers={HEADER: str(length)})
    assert answer.status_code in (200, 400, 404), answer.text


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(
                        ["name", "data", "shape", "parameters", "datatype", "classification"]), inner, max_size=3))


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.sampled_from(["id", "parameters", "inputs", "outputs"]), value=JSON,
       inner=st.sampled_from(["name", "datatype", "shape", "parameters", "data"]), deep=st.booleans())
def test_any_json_in_any_place_is_answered_or_refused(serving: FlaskClient, place: str, value: Any, inner: str,
                                                      deep: bool) -> None:
    body = message()
    if deep:
        body["inputs"][0][inner] = value
    else:
        body[place] = value
    assert ask(serving, body, PIXELS).status_code in (200, 400)
