"""Following the aliases: swaps without a restart, and what is damaged never answers."""

import gc
import logging
import threading
from pathlib import Path

import numpy as np
import pytest
from flask import Flask
from flask.testing import FlaskClient

from inference.loaded import LoadedModels
from inference.memory import KEPT
from inference.metrics import Meters
from inference.predictor import Predictor
from shared import artifacts
from shared.errors import NotFound

from .conftest import LABELS, RED, png, publish_model, until

PREDICT = "/v1/models/colors/predict"
SWAPPED = np.eye(3)[::-1] * 0.05  # calls red blue


def ask(client: FlaskClient, query: str = "") -> tuple[int, str]:
    """(version, label) of a red image."""
    answer = client.post(PREDICT + query, data=png(RED), content_type="image/png")
    assert answer.status_code == 200, answer.json
    return answer.json["version"], answer.json["predictions"][0]["top"][0]["label"]


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def move(client: FlaskClient, version: int, variant: str = "onnx-fp32", alias: str = "production") -> None:
    answer = client.put(f"/v1/models/colors/aliases/{alias}", json={"version": version, "variant": variant})
    assert answer.status_code == 200, answer.json


def test_a_moved_alias_answers_without_a_restart_and_loses_no_request(serving: FlaskClient, root: Path,
                                                                      app: Flask) -> None:
    publish_model(root, "colors", "m-2", onnx_fp32=SWAPPED)
    seen: list[tuple[int, str]] = []
    stop = threading.Event()

    def load() -> None:
        with app.test_client() as client:
            while not stop.is_set():
                seen.append(ask(client))

    threads = [threading.Thread(target=load) for _ in range(4)]
    for thread in threads:
        thread.start()
    for version in (2, 1, 2):
        move(serving, version)
        until(lambda version=version: ask(serving)[0] == version)
    stop.set()
    for thread in threads:
        thread.join()
    assert set(seen) == {(1, "red"), (2, "blue")}, "a version answered with the other's labels, or a request failed"


def test_the_replaced_variant_leaves_the_memory(serving: FlaskClient, root: Path, app: Flask) -> None:
    publish_model(root, "colors", "m-2")
    move(serving, 2)
    until(lambda: ask(serving)[0] == 2)
    until(lambda: loaded(serving) == 1)
    predictors = [p for p in gc.get_objects() if isinstance(p, Predictor) and not p.ended.is_set()]
    assert [p.name for p in predictors] == ["m-2 onnx-fp32"]


def loaded(client: FlaskClient) -> int:
    line = next(li for li in client.get("/metrics").text.splitlines() if li.startswith("lanner_loaded_variants "))
    return int(float(line.split()[1]))


def test_two_aliases_of_one_variant_load_it_once(serving: FlaskClient) -> None:
    move(serving, 1, alias="candidate")
    until(lambda: len(serving.get("/readyz").json["models"]) == 2)
    assert ask(serving, "?alias=candidate") == (1, "red")
    assert loaded(serving) == 1


def test_a_flipped_byte_is_refused_and_the_old_variant_serves_on(serving: FlaskClient, root: Path,
                                                                caplog: pytest.LogCaptureFixture) -> None:
    publish_model(root, "colors", "m-2", onnx_fp32=SWAPPED)
    caplog.set_level(logging.ERROR, "lanner.loaded")
    folder = root / "variants/m-2/onnx-fp32"
    record = {**artifacts.aliases(root, "colors")["production"], "seq": 2, "version": 2, "model": "m-2",
              "manifest_sha256": artifacts.manifest_digest(root, "variants/m-2/onnx-fp32")}
    flip_a_byte(folder / "model.onnx")
    artifacts.write_json(root / "aliases/colors/production.json", record)
    ready = until(lambda: (r := serving.get("/readyz")).json["refused"] and r)
    assert ready.status_code == 200
    assert [(r["version"], r["variant"]) for r in ready.json["refused"]] == [(2, "onnx-fp32")]
    assert "model.onnx has other bytes" in ready.json["refused"][0]["reason"]
    assert "colors@production is refused" in caplog.text
    assert ask(serving) == (1, "red")
    artifacts.promote(root, "colors", "production", 1, "onnx-fp32", by="test")
    until(lambda: not serving.get("/readyz").json["refused"])


def test_other_answers_to_the_golden_batch_are_refused(client: FlaskClient, root: Path) -> None:
    """Whole files, right hashes, but the network answers otherwise than when it was measured: permuted labels."""
    publish_model(root, "colors", "m-1", onnx_fp32=SWAPPED)
    publish_model(root, "colors", "m-2", litert_fp32=None)  # nothing of it can stand in: the file is no LiteRT
    golden, other = root / "variants/m-1/onnx-fp32", root / "variants/m-2/litert-fp32"
    staging = artifacts.stage(root, "j-test")
    (staging / "golden.npz").write_bytes((golden / "golden.npz").read_bytes())
    (staging / "model.onnx").write_bytes((other / "model.onnx").read_bytes())
    spec = {"size": 32, "labels": LABELS, "mean": [0.5] * 3, "std": [0.25] * 3}
    artifacts.publish(root, staging, "variants/m-2/onnx-int8", {"format": "onnx", "precision": "fp32", "spec": spec})
    artifacts.promote(root, "colors", "production", 2, "onnx-int8", by="test")
    ready = until(lambda: (r := client.get("/readyz")).json["refused"] and r)
    assert (ready.status_code, ready.json["code"]) == (503, "no_model")
    assert "golden batch is off" in ready.json["refused"][0]["reason"]
    answer = client.post(PREDICT, data=png(RED), content_type="image/png")
    assert (answer.status_code, answer.json["error"]["code"]) == (503, "model_refused")


def test_an_alias_file_that_is_no_json_leaves_the_old_variant(serving: FlaskClient, root: Path) -> None:
    (root / "aliases/colors/production.json").write_text("{")
    until(lambda: serving.get("/readyz").json["refused"])
    assert ask(serving) == (1, "red")


def test_an_alias_that_names_another_manifest_is_refused(serving: FlaskClient, root: Path) -> None:
    record = artifacts.aliases(root, "colors")["production"]
    artifacts.write_json(root / "aliases/colors/production.json", {**record, "seq": 2, "manifest_sha256": "0" * 64})
    refused = until(lambda: serving.get("/readyz").json["refused"])
    assert "the alias was given to 000" in refused[0]["reason"]
    assert ask(serving) == (1, "red")


def test_moving_an_alias_to_a_damaged_variant_is_a_conflict(serving: FlaskClient, root: Path) -> None:
    publish_model(root, "colors", "m-2")
    flip_a_byte(root / "variants/m-2/onnx-fp32/model.onnx")
    answer = serving.put("/v1/models/colors/aliases/production", json={"version": 2, "variant": "onnx-fp32"})
    assert (answer.status_code, answer.json["error"]["code"]) == (409, "damaged")
    assert ask(serving) == (1, "red")


def test_asking_for_a_damaged_version_fails_and_says_why(serving: FlaskClient, root: Path) -> None:
    publish_model(root, "colors", "m-2")
    flip_a_byte(root / "variants/m-2/onnx-fp32/model.onnx")
    answer = serving.post(PREDICT + "?version=2", data=png(RED), content_type="image/png")
    assert (answer.status_code, answer.json["error"]["code"]) == (500, "damaged")
    assert ask(serving) == (1, "red")


def test_versions_asked_for_by_number_are_kept_up_to_a_bound(serving: FlaskClient, root: Path) -> None:
    for version in range(2, KEPT + 5):
        publish_model(root, "colors", f"m-{version}", onnx_fp32=SWAPPED)
        assert ask(serving, f"?version={version}") == (version, "blue")
        assert loaded(serving) == 1 + min(version - 1, KEPT)
    assert ask(serving) == (1, "red")
    assert ask(serving, "?version=2") == (2, "blue")


def test_a_prediction_right_after_the_first_promotion_waits_for_it(root: Path) -> None:
    loaded = LoadedModels(root, Meters(), cores=1, refresh_s=3600)
    try:
        with pytest.raises(NotFound):
            loaded.resolve("colors", "production")
        publish_model(root, "colors", "m-1")
        artifacts.promote(root, "colors", "production", 1, "onnx-fp32", by="api")
        assert loaded.resolve("colors", "production").version == 1
    finally:
        loaded.close()


@pytest.fixture
def damaged(root: Path, request: pytest.FixtureRequest) -> tuple[Path, bytes]:
    """`colors`, whose production is version 2's onnx-int8, before that version 1's onnx-fp32, as an API finds it that
    begins: with that file damaged, or that of the Model's onnx-fp32, too. Returns the file, and the bytes that it had.
    """
    publish_model(root, "colors", "m-1")
    publish_model(root, "colors", "m-2", onnx_fp32=SWAPPED, onnx_int8=SWAPPED)
    artifacts.promote(root, "colors", "production", 1, "onnx-fp32", by="test")
    artifacts.promote(root, "colors", "production", 2, "onnx-int8", by="test")
    file = root / "variants/m-2/onnx-int8/model.onnx"
    whole = file.read_bytes()
    flip_a_byte(file)
    if request.param == "both":
        flip_a_byte(root / "variants/m-2/onnx-fp32/model.onnx")
    return file, whole


@pytest.mark.parametrize("damaged", ["onnx-int8"], indirect=True)
def test_after_a_restart_the_model_s_onnx_answers_for_a_damaged_variant_until_that_is_mended(
        damaged: tuple[Path, bytes], client: FlaskClient) -> None:
    ready = until(lambda: (r := client.get("/readyz")).status_code == 200 and r)
    assert [(m["version"], m["variant"], m["instead_of"]) for m in ready.json["models"]] == [
        (2, "onnx-fp32", "onnx-int8")]
    assert "other bytes" in ready.json["refused"][0]["reason"]
    assert ask(client) == (2, "blue")
    file, whole = damaged
    file.write_bytes(whole)
    assert client.post("/v2/repository/models/colors/load").status_code == 200
    until(lambda: client.get("/readyz").json["refused"] == [])
    assert ask(client) == (2, "blue")
    assert "instead_of" not in client.get("/readyz").json["models"][0]


@pytest.mark.parametrize("damaged", ["both"], indirect=True)
def test_after_a_restart_what_served_before_answers_where_nothing_of_the_model_can(
        damaged: tuple[Path, bytes], root: Path, client: FlaskClient) -> None:
    until(lambda: client.get("/readyz").status_code == 200)
    assert ask(client) == (1, "red")
    assert client.get("/readyz").json["models"][0]["instead_of"] == "onnx-int8"
    assert artifacts.aliases(root, "colors")["production"]["version"] == 2
