"""POST /v1/models/<name>/predict: the three forms of a body, what the answer says, and every refusal."""

import base64
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flask.testing import FlaskClient
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from inference import codec
from shared import artifacts

from .conftest import BLUE, GREEN, RED, png, publish_model, publish_variant

PREDICT = "/v1/models/colors/predict"


def labels(answer: Any) -> list[str]:
    assert answer.status_code == 200, answer.json
    return [prediction["top"][0]["label"] for prediction in answer.json["predictions"]]


@pytest.mark.parametrize(("form", "kind"), [("PNG", "image/png"), ("JPEG", "image/jpeg"), ("WEBP", "image/webp"),
                                            ("PNG", "application/octet-stream")])
def test_raw_bytes_of_an_image_are_labelled(serving: FlaskClient, form: str, kind: str) -> None:
    assert labels(serving.post(PREDICT, data=png(GREEN, form=form), content_type=kind)) == ["green"]


def test_several_files_of_a_form_are_labelled_in_their_order(serving: FlaskClient) -> None:
    files = [(io.BytesIO(png(color)), f"{i}.png") for i, color in enumerate([BLUE, RED, GREEN])]
    assert labels(serving.post(PREDICT, data={"image": files})) == ["blue", "red", "green"]


def test_base64_in_json_is_labelled(serving: FlaskClient) -> None:
    images = [base64.b64encode(png(color)).decode() for color in (RED, BLUE)]
    assert labels(serving.post(PREDICT, json={"images": images})) == ["red", "blue"]


def test_an_image_of_another_size_and_mode_is_labelled(serving: FlaskClient) -> None:
    out = io.BytesIO()
    Image.new("RGBA", (300, 200), (*RED, 255)).save(out, "PNG")
    assert labels(serving.post(PREDICT, data=out.getvalue(), content_type="image/png")) == ["red"]


def test_the_answer_names_what_answered(serving: FlaskClient, root: Path) -> None:
    answer = serving.post(PREDICT, data=png(RED), content_type="image/png").json
    assert answer == {"model": "colors", "version": 1, "variant": "onnx-fp32", "device": "cpu",
                      "digest": artifacts.manifest_digest(root, "variants/m-1/onnx-fp32"),
                      "predictions": answer["predictions"]}
    top = answer["predictions"][0]["top"]
    assert [t["index"] for t in top][0] == 0
    assert sum(t["probability"] for t in top) == pytest.approx(1, abs=1e-4)
    assert [t["probability"] for t in top] == sorted((t["probability"] for t in top), reverse=True)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 70).flatmap(lambda classes: st.tuples(
    st.lists(st.lists(st.floats(0, 1, width=32) | st.just(math.nan), min_size=classes, max_size=classes), max_size=9),
    st.lists(st.text(), min_size=classes, max_size=classes))), st.integers(1, 99))
def test_the_likeliest_are_written_as_json_whatever_the_labels_and_the_numbers(
        drawn: tuple[list[list[float]], list[str]], k: int) -> None:
    rows, labels = drawn
    scores = np.array(rows, np.float32).reshape(-1, len(labels))
    for row, text in zip(scores, codec.top(scores, codec.entries(labels), k), strict=True):
        top = json.loads(text, parse_constant=lambda text: pytest.fail(f"{text} is not JSON"))["top"]
        assert len(top) == min(k, len(labels)) == len({entry["index"] for entry in top})
        for entry in top:
            assert entry["label"] == labels[entry["index"]]
            score = float(row[entry["index"]])
            assert entry["probability"] == (None if math.isnan(score) else pytest.approx(score, abs=5.1e-7))
        if not np.isnan(row).any():
            best = sorted(row.tolist(), reverse=True)[:k]
            assert [float(row[entry["index"]]) for entry in top] == best


def test_top_k_bounds_the_labels(serving: FlaskClient) -> None:
    for asked, got in ((1, 1), (2, 2), (50, 3)):
        answer = serving.post(f"{PREDICT}?top_k={asked}", data=png(RED), content_type="image/png")
        assert len(answer.json["predictions"][0]["top"]) == got


def test_a_version_and_a_variant_can_be_asked_for(serving: FlaskClient, root: Path) -> None:
    publish_variant(root, "m-1", "onnx-int8")
    assert publish_model(root, "colors", "m-2", onnx_fp32=np.eye(3)[::-1] * 0.05) == 2
    asked = [("", 1, "onnx-fp32", "red"), ("?variant=onnx-int8", 1, "onnx-int8", "red"),
             ("?version=2", 2, "onnx-fp32", "blue"), ("?version=2&variant=onnx-fp32", 2, "onnx-fp32", "blue")]
    for query, version, variant, label in asked:
        answer = serving.post(PREDICT + query, data=png(RED), content_type="image/png")
        assert labels(answer) == [label]
        assert (answer.json["version"], answer.json["variant"]) == (version, variant)


BAD = [
    ("", {"data": b"not an image", "content_type": "image/png"}, 422, "bad_image"),
    ("", {"data": b"", "content_type": "image/png"}, 422, "bad_image"),
    ("", {"data": png(RED, size=256)[:200], "content_type": "image/png"}, 422, "bad_image"),
    ("", {"data": b"x" * (1 << 20) + b"x", "content_type": "image/png"}, 413, "too_large"),
    ("", {"data": b"hello", "content_type": "text/plain"}, 415, "unsupported_media_type"),
    ("", {"data": png(RED)}, 415, "unsupported_media_type"),
    ("", {"data": png(RED), "content_type": "image/png", "headers": {"Content-Encoding": "gzip"}}, 415,
     "unsupported_media_type"),
    ("", {"json": {"images": []}}, 422, "no_image"),
    ("", {"json": {"images": "aGk="}}, 400, "malformed"),
    ("", {"json": {"images": ["%%"]}}, 400, "malformed"),
    ("", {"json": {"images": ["é"]}}, 400, "malformed"),
    ("", {"json": {"pictures": []}}, 400, "malformed"),
    ("", {"json": [1]}, 400, "malformed"),
    ("", {"json": {"images": ["aGk="] * 257}}, 422, "too_many_images"),
    ("", {"data": "{", "content_type": "application/json"}, 400, "malformed"),
    ("", {"data": "[" * 100_000, "content_type": "application/json"}, 400, "malformed"),
    ("", {"data": b"--b\r\nnonsense", "content_type": "multipart/form-data; boundary=b"}, 400, "malformed"),
    ("", {"data": b"--b--", "content_type": "multipart/form-data"}, 400, "malformed"),
    ("", {"data": {"text": "no file"}, "content_type": "multipart/form-data"}, 422, "no_image"),
    ("?top_k=0", {"data": png(RED), "content_type": "image/png"}, 422, "bad_request"),
    ("?top_k=five", {"data": png(RED), "content_type": "image/png"}, 422, "bad_request"),
    ("?version=9", {"data": png(RED), "content_type": "image/png"}, 404, "not_found"),
    ("?version=-1", {"data": png(RED), "content_type": "image/png"}, 422, "bad_request"),
    ("?variant=litert-int8", {"data": png(RED), "content_type": "image/png"}, 404, "not_found"),
    ("?variant=../onnx-fp32", {"data": png(RED), "content_type": "image/png"}, 404, "not_found"),
    ("?alias=nowhere", {"data": png(RED), "content_type": "image/png"}, 404, "not_found"),
    ("?alias=../production", {"data": png(RED), "content_type": "image/png"}, 422, "bad_name"),
]


@pytest.mark.parametrize(("query", "request_", "status", "code"), BAD)
def test_a_bad_request_is_refused_with_its_code(serving: FlaskClient, query: str, request_: dict[str, Any], status: int,
                                                code: str) -> None:
    answer = serving.post(PREDICT + query, **request_)
    assert (answer.status_code, answer.json["error"]["code"]) == (status, code), answer.json
    assert answer.json["error"]["message"]


def test_the_bad_image_among_several_is_named(serving: FlaskClient) -> None:
    files = [(io.BytesIO(png(RED)), "good.png"), (io.BytesIO(b"broken"), "broken.png")]
    answer = serving.post(PREDICT, data={"image": files})
    assert answer.status_code == 422
    assert answer.json["error"]["message"].startswith("image 1 (broken.png): ")


def test_more_files_than_accepted_are_refused(serving: FlaskClient) -> None:
    answer = serving.post(PREDICT, data={"image": [(io.BytesIO(b"x"), f"{i}.png") for i in range(400)]})
    assert (answer.status_code, answer.json["error"]["code"]) == (422, "too_many_images")


def test_an_unknown_model_is_not_found(serving: FlaskClient) -> None:
    answer = serving.post("/v1/models/cats/predict", data=png(RED), content_type="image/png")
    assert (answer.status_code, answer.json["error"]["code"]) == (404, "not_found")


def test_a_model_without_a_promotion_says_which_aliases_it_has(client: FlaskClient, root: Path) -> None:
    publish_model(root, "colors", "m-1")
    answer = client.post(PREDICT, data=png(RED), content_type="image/png")
    assert answer.status_code == 404
    assert "none yet" in answer.json["error"]["message"]
