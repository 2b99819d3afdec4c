"""/v1/datasets, /v1/models, /v1/cards and moving aliases."""

from pathlib import Path
from typing import Any

import pytest
from flask.testing import FlaskClient

from shared import artifacts

from .conftest import publish_model, publish_variant


@pytest.fixture
def published(client: FlaskClient, root: Path) -> FlaskClient:
    """Two versions of `colors`, the first with two Variants and a card, and the dataset d-1."""
    publish_model(root, "colors", "m-1")
    publish_variant(root, "m-1", "onnx-int8")
    publish_model(root, "colors", "m-2")
    staging = artifacts.stage(root, "j-test")
    artifacts.write_json(staging / "stats.json", {"classes": {"red": 3}})
    artifacts.publish(root, staging, "datasets/d-1", {"name": "colors", "summary": {"images": 3}})
    artifacts.write_json(root / "cards/m-1.json", {"winner": "onnx-int8"})
    artifacts.write_bytes(root / "cards/m-1.html", b"<h1>colors</h1>")
    return client


def test_datasets_are_listed_and_shown_with_their_statistics(published: FlaskClient) -> None:
    listed = published.get("/v1/datasets").json["datasets"]
    assert [(d["id"], d["name"], d["summary"]) for d in listed] == [("d-1", "colors", {"images": 3})]
    shown = published.get("/v1/datasets/d-1").json
    assert shown["stats"] == {"classes": {"red": 3}}
    assert list(shown["files"]) == ["stats.json"]
    assert published.get("/v1/datasets/d-none").status_code == 404


def test_a_dataset_with_a_missing_file_is_damaged(published: FlaskClient, root: Path) -> None:
    (root / "datasets/d-1/stats.json").unlink()
    answer = published.get("/v1/datasets/d-1")
    assert (answer.status_code, answer.json["error"]["code"]) == (500, "damaged")


def test_predictions_are_listed_shown_and_sent_as_they_are(published: FlaskClient, root: Path) -> None:
    staging = artifacts.stage(root, "j-test")
    (staging / "predictions.parquet").write_bytes(b"PAR1 a table PAR1")
    artifacts.publish(root, staging, "predictions/r-1", {"name": "colors", "summary": {"images": 3}})
    assert [p["id"] for p in published.get("/v1/predictions").json["predictions"]] == ["r-1"]
    shown = published.get("/v1/predictions/r-1").json
    assert (shown["summary"], shown["table"]) == ({"images": 3}, "/v1/predictions/r-1/predictions.parquet")
    with published.get(shown["table"]) as answer:
        assert (answer.data, answer.mimetype) == (b"PAR1 a table PAR1", "application/vnd.apache.parquet")
    assert published.get("/v1/predictions/r-none").status_code == 404
    assert published.get("/v1/predictions/r-none/predictions.parquet").status_code == 404


def test_models_are_listed_and_shown_with_versions_and_variants(published: FlaskClient, root: Path) -> None:
    assert published.get("/v1/models").json == {
        "models": [{"name": "colors", "versions": {"1": "m-1", "2": "m-2"}, "aliases": {}}]}
    shown = published.get("/v1/models/colors").json
    assert [(v["version"], [x["variant"] for x in v["variants"]]) for v in shown["versions"]] == [
        (2, ["onnx-fp32"]), (1, ["onnx-fp32", "onnx-int8"])]
    variant = shown["versions"][1]["variants"][0]
    assert variant["digest"] == artifacts.manifest_digest(root, "variants/m-1/onnx-fp32")
    assert variant["bytes"] > 0
    one = published.get("/v1/models/colors/versions/1").json
    assert one["manifest"]["summary"] == {"validation_accuracy": 0.9}
    for path in ("/v1/models/cats", "/v1/models/colors/versions/3", "/v1/models/colors/versions/x"):
        assert published.get(path).status_code == 404


@pytest.mark.parametrize(("path", "accept", "kind"), [
    ("m-1", "application/json", "application/json"), ("m-1", "text/html,*/*;q=0.8", "text/html"),
    ("m-1", "*/*", "application/json"), ("m-1.html", "application/json", "text/html"),
    ("m-1.json", "text/html", "application/json")])
def test_a_card_is_json_or_a_page(published: FlaskClient, path: str, accept: str, kind: str) -> None:
    answer = published.get(f"/v1/cards/{path}", headers={"Accept": accept})
    assert (answer.status_code, answer.mimetype) == (200, kind)
    assert "script-src" not in answer.headers["Content-Security-Policy"]
    assert answer.headers["Content-Security-Policy"].startswith("default-src 'none'")


def test_a_model_without_a_card_and_odd_names_are_not_found(published: FlaskClient) -> None:
    for path in ("m-2", "m-1.exe", "m-1.html.json"):
        assert published.get(f"/v1/cards/{path}").status_code == 404
    for path in ("..%2fm-1", ".html", "%2e%2e"):
        assert published.get(f"/v1/cards/{path}").status_code in (404, 422)


def test_an_alias_moves_and_counts_its_moves(published: FlaskClient, root: Path) -> None:
    for seq, (version, variant) in enumerate([(1, "onnx-int8"), (2, "onnx-fp32"), (1, "onnx-fp32")], start=1):
        answer = published.put("/v1/models/colors/aliases/production", json={"version": version, "variant": variant})
        assert answer.status_code == 200
        record: dict[str, Any] = artifacts.aliases(root, "colors")["production"]
        assert answer.json == {"name": "colors", "alias": "production", **record}
        assert (record["seq"], record["version"], record["variant"]) == (seq, version, variant)
        assert record["moved_by"] == "api"


def test_one_call_rolls_back_and_another_one_forward(published: FlaskClient, root: Path) -> None:
    back = "/v1/models/colors/aliases/production/rollback"
    assert (published.post(back).status_code, published.post("/v1/models/cats/aliases/a/rollback").status_code) == (404,
                                                                                                                    404)
    places = [(1, "onnx-int8"), (2, "onnx-fp32")]
    for version, variant in [*places, places[1]]:  # the second one twice, as after a rebuild
        published.put("/v1/models/colors/aliases/production", json={"version": version, "variant": variant})
        if (version, variant) == places[0]:
            first = published.post(back)
            assert (first.status_code, first.json["error"]["code"]) == (409, "no_previous")
    for expected in (places[0], places[1]):
        answer = published.post(back)
        assert (answer.status_code, answer.json["version"], answer.json["variant"]) == (200, *expected)
        record = artifacts.aliases(root, "colors")["production"]
        assert (record["version"], record["variant"]) == expected


@pytest.mark.parametrize(("path", "body", "status"), [
    ("colors/aliases/production", {"version": 3, "variant": "onnx-fp32"}, 404),
    ("colors/aliases/production", {"version": 2, "variant": "onnx-int8"}, 404),
    ("cats/aliases/production", {"version": 1, "variant": "onnx-fp32"}, 404),
    ("colors/aliases/production", {"version": "1", "variant": "onnx-fp32"}, 400),
    ("colors/aliases/production", {"version": True, "variant": "onnx-fp32"}, 400),
    ("colors/aliases/production", {"version": 1}, 400),
    ("colors/aliases/production", {"version": 1, "variant": "../m-2"}, 422),
    ("colors/aliases/Production", {"version": 1, "variant": "onnx-fp32"}, 422),
    ("colors/aliases/a%2e%2e", {"version": 1, "variant": "onnx-fp32"}, 422),
])
def test_a_bad_move_is_refused(published: FlaskClient, root: Path, path: str, body: dict[str, Any],
                               status: int) -> None:
    assert published.put(f"/v1/models/{path}", json=body).status_code == status
    assert artifacts.aliases(root, "colors") == {}
