"""A TensorRT Variant that can't be loaded: its Model's ONNX answers at once, and a rebuild is queued."""

import dataclasses
import errno
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from flask import Flask
from flask.testing import FlaskClient

from inference.app import create_app
from inference.healing import queue_rebuild
from inference.loaded import LoadedModels
from shared import artifacts
from shared.jobs import OptimizeJob
from shared.ledger import Ledger
from shared.queue import queue_of
from shared.settings import Settings

from .conftest import RED, png, publish_model, until

SWAPPED = np.eye(3)[::-1] * 0.05  # calls red blue


def ask(client: FlaskClient) -> dict:
    answer = client.post("/v1/models/colors/predict", data=png(RED), content_type="image/png")
    assert answer.status_code == 200, answer.json
    return answer.json


def optimizations(app: Flask) -> list[OptimizeJob]:
    ledger: Ledger = app.extensions["lanner"].ledger
    return [ledger.request(i).job for i in ledger.ids()]


@pytest.fixture
def healing(settings: Settings) -> Iterator[Flask]:
    """The API with rebuilds queued as under DEVICE=gpu, and ONNX on the CPU, since this host may have nothing else."""
    app = create_app(settings)
    api = app.extensions["lanner"]
    api.loaded.close()
    loaded = LoadedModels(settings.artifacts, api.meters, 1, settings.refresh_s, partial(queue_rebuild, api.ledger))
    app.extensions["lanner"] = dataclasses.replace(api, loaded=loaded)
    yield app
    app.extensions["lanner"].loaded.close()


@pytest.fixture
def promoted(root: Path) -> None:
    version = publish_model(root, "colors", "m-1", onnx_fp32=None, tensorrt_fp16=None)
    artifacts.promote(root, "colors", "production", version, "tensorrt-fp16", by="test")


def damage(root: Path) -> None:
    path = root / "variants/m-1/tensorrt-fp16/model.onnx"
    path.write_bytes(path.read_bytes()[:-1] + b"x")


@pytest.mark.usefixtures("promoted")
def test_without_tensorrt_the_onnx_variant_answers_and_readyz_says_for_which(client: FlaskClient, app: Flask) -> None:
    state = until(lambda: client.get("/readyz").status_code == 200 and client.get("/readyz").json)
    (serving,), (refused,) = state["models"], state["refused"]
    assert (serving["variant"], serving["instead_of"], serving["device"]) == ("onnx-fp32", "tensorrt-fp16", "cpu")
    assert refused["variant"] == "tensorrt-fp16"
    assert "TensorRT can't run here" in refused["reason"]
    assert "rebuild" not in refused
    assert ask(client)["predictions"][0]["top"][0]["label"] == "red"
    assert optimizations(app) == []


@pytest.mark.usefixtures("promoted")
def test_a_damaged_one_is_rebuilt_by_one_job_and_swapped_in_with_the_next_alias(healing: Flask, root: Path) -> None:
    damage(root)
    client = healing.test_client()
    state = until(lambda: (s := client.get("/readyz").json)["refused"] and "rebuild" in s["refused"][0] and s)
    assert state["models"][0]["instead_of"] == "tensorrt-fp16"
    assert optimizations(healing) == [OptimizeJob("m-1", "colors", alias="production")]
    ledger: Ledger = healing.extensions["lanner"].ledger
    assert ledger.ids() == [state["refused"][0]["rebuild"]]
    assert ledger.state(ledger.ids()[0]) == "queued"
    version = publish_model(root, "colors", "m-2", onnx_fp32=SWAPPED)
    artifacts.promote(root, "colors", "production", version, "onnx-fp32", by="j-rebuild")
    until(lambda: ask(client)["predictions"][0]["top"][0]["label"] == "blue")
    state = client.get("/readyz").json
    assert state["refused"] == []
    assert "instead_of" not in state["models"][0]


def test_without_an_onnx_variant_what_served_before_goes_on(serving: FlaskClient, root: Path) -> None:
    version = publish_model(root, "colors", "m-2", tensorrt_fp16=SWAPPED)
    artifacts.promote(root, "colors", "production", version, "tensorrt-fp16", by="test")
    state = until(lambda: (s := serving.get("/readyz").json)["refused"] and s)
    assert state["models"][0]["model_id"] == "m-1"
    assert ask(serving)["predictions"][0]["top"][0]["label"] == "red"


def test_a_rebuild_is_as_the_last_optimization_was_and_one_at_a_time(app: Flask) -> None:
    ledger: Ledger = app.extensions["lanner"].ledger
    ledger.accept("j-old", OptimizeJob("m-1", "colors", variants=("tensorrt-fp16",), budget=2.5, alias="candidate"))
    assert queue_rebuild(ledger, "colors", "m-1", "production") == "j-old"
    ledger.end("j-old", "succeeded")
    job_id = queue_rebuild(ledger, "colors", "m-1", "production")
    assert ledger.request(job_id).job == OptimizeJob("m-1", "colors", variants=("tensorrt-fp16",), budget=2.5)
    assert queue_rebuild(ledger, "colors", "m-1", "production") == job_id
    assert queue_rebuild(ledger, "colors", "m-2", "production") not in ("j-old", job_id)
    ledger.end(job_id, "failed")
    assert queue_rebuild(ledger, "colors", "m-1", "production") not in ("j-old", job_id)


def test_a_rebuild_that_could_not_be_written_down_is_asked_for_again(app: Flask,
                                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    ledger: Ledger = app.extensions["lanner"].ledger

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "no space")

    with monkeypatch.context() as patch:
        patch.setattr(ledger, "accept", full)
        with pytest.raises(OSError, match="no space"):
            queue_rebuild(ledger, "colors", "m-1", "production")
    assert queue_rebuild(ledger, "colors", "m-1", "production") in ledger.ids()
    assert ledger.redis.llen(queue_of("optimization", ledger.redis).key) == 1


def test_of_processes_that_ask_at_one_time_all_mean_one_job(app: Flask, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger: Ledger = app.extensions["lanner"].ledger
    with monkeypatch.context() as patch:
        patch.setattr(ledger, "ids", lambda: [])  # as each saw it
        jobs = {queue_rebuild(ledger, "colors", "m-1", alias) for alias in ("production", "candidate", "production")}
    assert len(jobs) == 1
    assert jobs == set(ledger.ids())
    assert ledger.redis.llen(queue_of("optimization", ledger.redis).key) == 1
