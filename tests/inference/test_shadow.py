"""A share of live images answered by the candidate too: what is told of it, and that no live request notices."""

import dataclasses
import io
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flask import Flask
from flask.testing import FlaskClient
from PIL import Image

from inference.app import create_app
from inference.shadow import MOST_WAITING
from shared import artifacts
from shared.intervals import wilson
from shared.runtimes import Session
from shared.settings import Settings

from .conftest import BLUE, GREEN, RED, SIZE, png, publish_model, until

SWAPPED = np.eye(3)[::-1] * 0.05  # calls red blue and blue red; green stays
SHADOW, PREDICT = "/v1/models/colors/shadow", "/v1/models/colors/predict"


@pytest.fixture
def shadowing(settings: Settings, root: Path) -> Iterator[Flask]:
    """An API that mirrors every image of `colors`: production tells all colours, its candidate swaps red and blue."""
    app = create_app(dataclasses.replace(settings, shadow_share=1.0))
    for alias, model, weights in (("production", "m-1", None), ("candidate", "m-2", SWAPPED)):
        version = publish_model(root, "colors", model, onnx_fp32=weights)
        artifacts.promote(root, "colors", alias, version, "onnx-fp32", by="test")
    with app.test_client() as client:
        until(lambda: len(client.get("/readyz").json.get("models", ())) == 2)
    yield app
    app.extensions["lanner"].loaded.close()


@pytest.fixture
def live(shadowing: Flask) -> FlaskClient:
    return shadowing.test_client()


def ask(client: FlaskClient, *colors: tuple[int, int, int], query: str = "") -> None:
    """One request, by the fast path for one image where that is all; production is right."""
    if len(colors) == 1:
        answer = client.post(PREDICT + query, data=png(colors[0]), content_type="image/png")
    else:
        answer = client.post(PREDICT + query, data={"image": [(io.BytesIO(png(c)), "x.png") for c in colors]})
    assert answer.status_code == 200, answer.json
    assert query or [p["top"][0]["index"] for p in answer.json["predictions"]] == [c.index(255) for c in colors]


def report(client: FlaskClient, mirrored: int) -> dict[str, Any]:
    return until(lambda: (r := client.get(SHADOW).json)["mirrored"] == mirrored and r)


def test_every_route_s_live_images_are_compared_and_told(live: FlaskClient) -> None:
    ask(live, RED)
    ask(live, RED, GREEN, BLUE)
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(png(c)))) for c in (GREEN, GREEN)])
    head = json.dumps({"inputs": [{"name": "images", "datatype": "UINT8", "shape": [2, SIZE, SIZE, 3],
                                   "parameters": {"binary_data_size": pixels.nbytes}}]}).encode()
    headers = {"Inference-Header-Content-Length": str(len(head)), "Content-Type": "application/octet-stream"}
    for more in ({}, {"Content-Encoding": "identity"}):  # ahead of Flask, and through it
        assert live.post("/v2/models/colors/infer", data=head + pixels.tobytes(),
                         headers=headers | more).status_code == 200
    told = report(live, 8)
    assert (told["disagreements"], told["rate"], told["dropped"], told["failed"]) == (3, 0.375, 0, 0)
    assert told["interval"] == [round(end, 6) for end in wilson(3, 8)]
    assert told["confusion"] == [{"production": "green", "candidate": "green", "images": 5},
                                 {"production": "red", "candidate": "blue", "images": 2},
                                 {"production": "blue", "candidate": "red", "images": 1}]
    assert (told["production"]["version"], told["candidate"]["version"], told["share"]) == (1, 2, 1.0)
    for side in ("production", "candidate"):
        assert 0 < told["run_ms"][side]["p50"] <= told["run_ms"][side]["p99"]
        assert told["run_ms"][side]["runs"] == 4
    metrics = live.get("/metrics").text
    assert 'lanner_shadow_images_total{model="colors",outcome="compared"} 8.0' in metrics
    assert 'lanner_shadow_disagreements_total{model="colors"} 3.0' in metrics
    assert 'lanner_shadow_seconds_count{alias="candidate"} 4.0' in metrics


def test_only_what_production_answers_is_mirrored(live: FlaskClient) -> None:
    for query in ("?alias=candidate", "?version=1", "?version=2&variant=onnx-fp32"):
        ask(live, RED, query=query)
    ask(live, GREEN)
    assert report(live, 1)["confusion"] == [{"production": "green", "candidate": "green", "images": 1}]


@pytest.mark.parametrize("alias", ["production", "candidate"])
def test_it_begins_anew_when_either_alias_moves(live: FlaskClient, root: Path, alias: str) -> None:
    ask(live, RED)
    report(live, 1)
    version = publish_model(root, "colors", "m-3")
    moved = live.put(f"/v1/models/colors/aliases/{alias}", json={"version": version, "variant": "onnx-fp32"})
    assert moved.status_code == 200
    told = until(lambda: (r := live.get(SHADOW).json)[alias]["version"] == version and r)
    assert (told["mirrored"], told["rate"], told["interval"], told["confusion"]) == (0, None, None, [])
    ask(live, BLUE)
    assert report(live, 1)["disagreements"] == (alias == "production")


def test_a_name_without_a_candidate_and_no_share_tell_of_nothing(serving: FlaskClient, root: Path) -> None:
    told = serving.get(SHADOW).json
    assert (told["candidate"], told["share"], told["mirrored"]) == (None, 0.0, 0)
    assert serving.get("/v1/models/nobody/shadow").status_code == 404
    artifacts.promote(root, "colors", "candidate", publish_model(root, "colors", "m-2"), "onnx-fp32", by="test")
    until(lambda: serving.get(SHADOW).json["candidate"])
    ask(serving, RED)
    assert serving.get(SHADOW).json["mirrored"] == 0


class Stuck(Session):
    """A Session that runs nothing until it is let go; then it fails."""

    device = "cpu"

    def __init__(self) -> None:
        self.go = threading.Event()

    def run(self, batch: np.ndarray) -> np.ndarray:
        self.go.wait(30)
        raise ValueError("the runtime failed")

    def close(self) -> None: ...


def test_a_candidate_that_hangs_and_fails_costs_live_requests_nothing(shadowing: Flask, live: FlaskClient) -> None:
    predictor = shadowing.extensions["lanner"].loaded.pointed("colors", "candidate").loaded.predictor
    predictor._session.close()
    predictor._session = stuck = Stuck()
    for _ in range(MOST_WAITING + 5):
        ask(live, RED)
    told = live.get(SHADOW).json
    assert (told["mirrored"], told["dropped"]) == (0, 5)
    stuck.go.set()
    told = until(lambda: (r := live.get(SHADOW).json)["failed"] == MOST_WAITING and r)
    assert (told["mirrored"], told["dropped"]) == (0, 5)
    ask(live, GREEN)


def test_it_gives_way_to_live_requests_and_still_comes_to_its_turn(shadowing: Flask, live: FlaskClient) -> None:
    loaded = shadowing.extensions["lanner"].loaded
    ask(live, RED)
    report(live, 1)
    held = loaded.pointed("colors", "production").loaded.predictor
    held._count += 1  # an image that never ceases to run
    try:
        for _ in range(3):
            ask(live, RED)
        report(live, 4)
    finally:
        held._count -= 1


def test_a_candidate_of_another_size_sees_the_encoded_image_at_its_own(live: FlaskClient, root: Path) -> None:
    version = publish_model(root, "colors", "m-3", onnx_fp32=SWAPPED, size=64)
    artifacts.promote(root, "colors", "candidate", version, "onnx-fp32", by="test")
    until(lambda: live.get(SHADOW).json["candidate"]["version"] == version)
    ask(live, BLUE)
    assert report(live, 1)["confusion"] == [{"production": "blue", "candidate": "red", "images": 1}]
    pixels = np.asarray(Image.open(io.BytesIO(png(RED))))
    assert live.post("/v2/models/colors/infer", data=pixels.tobytes(), headers={
        "Inference-Header-Content-Length": "0", "Content-Type": "application/octet-stream"}).status_code == 200
    assert until(lambda: live.get(SHADOW).json["failed"]) == 1
