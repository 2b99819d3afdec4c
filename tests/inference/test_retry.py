"""Trying again, going on from a Dataset, and cancelling a whole pipeline."""

from pathlib import Path
from typing import Any

import pytest
from flask import Flask
from flask.testing import FlaskClient
from redis import Redis

from shared.ledger import Ledger

from .test_jobs import publish_dataset, waiting


@pytest.fixture
def ledger(app: Flask) -> Ledger:
    found: Ledger = app.extensions["lanner"].ledger
    return found


@pytest.fixture
def failed(client: FlaskClient, root: Path, ledger: Ledger) -> dict[str, Any]:
    """A pipeline whose training has failed, with what waited for it."""
    body = {"source": "cifar10", "train": {"recipe": "small", "epochs": 7}, "optimize": {"alias": "candidate"}}
    pipeline: dict[str, Any] = client.post("/v1/pipelines", json=body).json
    ledger.end(pipeline["jobs"]["preprocess"], "succeeded")
    publish_dataset(root, pipeline["dataset_id"])
    ledger.end(pipeline["jobs"]["train"], "failed", code="internal", message="out of memory")
    ledger.end(pipeline["jobs"]["optimize"], "failed", code="parent_failed", message="out of memory")
    return pipeline


def test_what_failed_is_tried_again_with_what_failed_with_it(client: FlaskClient, failed: dict[str, Any], redis: Redis,
                                                             ledger: Ledger) -> None:
    redis.flushall()
    answer = client.post(f"/v1/jobs/{failed['jobs']['train']}/retry")
    assert answer.status_code == 202
    again = answer.json["jobs"]
    assert set(again) == {"train", "optimize"}
    assert waiting(redis)["training"] == [again["train"]]
    train, optimize = (ledger.request(again[kind]) for kind in ("train", "optimize"))
    assert (train.job, train.pipeline, train.parent) == (
        ledger.request(failed["jobs"]["train"]).job, failed["pipeline"], "")
    assert (optimize.job.alias, optimize.parent) == ("candidate", train.id)  # type: ignore[union-attr]
    view = client.get(f"/v1/pipelines/{failed['pipeline']}").json
    assert (view["state"], {kind: job["id"] for kind, job in view["jobs"].items()}) == (
        "running", {"preprocess": failed["jobs"]["preprocess"], **again})
    once_more = client.post(f"/v1/jobs/{failed['jobs']['train']}/retry")
    assert (once_more.status_code, once_more.json["id"]) == (200, train.id)


def test_a_stage_alone_waits_for_who_makes_what_it_reads(client: FlaskClient, failed: dict[str, Any]) -> None:
    missing = client.post(f"/v1/jobs/{failed['jobs']['optimize']}/retry")
    assert (missing.status_code, missing.json["error"]["code"]) == (404, "not_found")
    train = client.post(f"/v1/jobs/{failed['jobs']['train']}/retry").json
    assert client.post(f"/v1/jobs/{failed['jobs']['optimize']}/retry").json["parent"] == train["id"]


def test_what_has_not_failed_is_not_tried_again(client: FlaskClient, failed: dict[str, Any]) -> None:
    done = client.post(f"/v1/jobs/{failed['jobs']['preprocess']}/retry")
    assert (done.status_code, done.json["error"]["code"]) == (409, "already_ended")
    job_id = client.post("/v1/jobs", json={"kind": "preprocess", "source": "cifar10"}).json["id"]
    runs = client.post(f"/v1/jobs/{job_id}/retry")
    assert (runs.status_code, runs.json["error"]["code"]) == (409, "still_open")
    assert client.post("/v1/jobs/j-none/retry").status_code == 404


def test_a_pipeline_from_a_dataset_trains_at_once(client: FlaskClient, root: Path, redis: Redis) -> None:
    publish_dataset(root, "d-1")
    answer = client.post("/v1/pipelines", json={"source": "dataset:d-1", "preprocess": {}, "train": {"epochs": 2}})
    assert (answer.status_code, answer.json["name"], answer.json["dataset_id"]) == (202, "flowers", "d-1")
    assert set(answer.json["jobs"]) == {"train", "optimize"}
    assert waiting(redis) == {"preprocessing": [], "training": [answer.json["jobs"]["train"]], "optimization": []}
    named = client.post("/v1/pipelines", json={"source": "dataset:d-1", "name": "roses"}).json
    assert (named["name"], named["model_id"] != answer.json["model_id"]) == ("roses", True)
    for source, more, status, code in (("dataset:d-2", {}, 404, "not_found"), ("dataset:", {}, 422, "bad_name"),
                                       ("dataset:d-1", {"preprocess": {"size": 64}}, 422, "bad_job")):
        told = client.post("/v1/pipelines", json={"source": source, **more})
        assert (told.status_code, told.json["error"]["code"]) == (status, code)


def test_the_same_key_is_the_same_pipeline_though_its_dataset_was_still_made(client: FlaskClient, root: Path,
                                                                            ledger: Ledger) -> None:
    first = client.post("/v1/jobs", json={"kind": "preprocess", "source": "cifar10"}).json
    body, headers = {"source": f"dataset:{first['job']['dataset_id']}"}, {"Idempotency-Key": "k"}
    pipeline = client.post("/v1/pipelines", json=body, headers=headers)
    assert ledger.request(pipeline.json["jobs"]["train"]).parent == first["id"]
    ledger.end(first["id"], "succeeded")
    publish_dataset(root, first["job"]["dataset_id"], "cifar10")
    again = client.post("/v1/pipelines", json=body, headers=headers)
    assert (again.status_code, again.json["jobs"]) == (200, pipeline.json["jobs"])


def test_cancelling_a_pipeline_asks_each_of_its_jobs(client: FlaskClient, ledger: Ledger) -> None:
    pipeline = client.post("/v1/pipelines", json={"source": "cifar10"}).json
    ledger.end(pipeline["jobs"]["preprocess"], "succeeded")
    answer = client.post(f"/v1/pipelines/{pipeline['pipeline']}/cancel")
    assert answer.status_code == 202
    assert {kind: job["cancel_asked"] for kind, job in answer.json["jobs"].items()} == {
        "preprocess": False, "train": True, "optimize": True}
    for kind in ("train", "optimize"):
        ledger.end(pipeline["jobs"][kind], "cancelled", code="cancelled")
    over = client.post(f"/v1/pipelines/{pipeline['pipeline']}/cancel")
    assert (over.status_code, over.json["error"]["code"]) == (409, "already_ended")
    assert client.post("/v1/pipelines/p-none/cancel").status_code == 404


def test_children_that_nobody_has_ended_yet_or_that_were_cancelled_are_tried_again_too(client: FlaskClient,
                                                                                     ledger: Ledger) -> None:
    pipeline = client.post("/v1/pipelines", json={"source": "cifar10"}).json
    ledger.end(pipeline["jobs"]["preprocess"], "cancelled", code="cancelled")
    ledger.end(pipeline["jobs"]["train"], "cancelled", code="cancelled")
    again = client.post(f"/v1/jobs/{pipeline['jobs']['preprocess']}/retry").json["jobs"]
    assert set(again) == {"preprocess", "train", "optimize"}
    assert not set(again.values()) & set(pipeline["jobs"].values())
    assert [ledger.request(again[kind]).parent for kind in ("train", "optimize")] == [
        again["preprocess"], again["train"]]


def test_what_succeeded_later_is_not_tried_again(client: FlaskClient, failed: dict[str, Any], ledger: Ledger) -> None:
    again = client.post(f"/v1/jobs/{failed['jobs']['train']}/retry").json
    ledger.end(again["id"], "succeeded")
    told = client.post(f"/v1/jobs/{failed['jobs']['train']}/retry")
    assert (told.status_code, told.json["error"]["code"]) == (409, "already_ended")
    assert again["id"] in told.json["error"]["message"]


def test_two_requests_at_once_mean_one_job(client: FlaskClient, failed: dict[str, Any], ledger: Ledger,
                                           monkeypatch: pytest.MonkeyPatch) -> None:
    before = list(ledger.requests())
    monkeypatch.setattr("inference.retry.recent", lambda ledger: before)  # neither sees what the other has accepted
    ids = [client.post(f"/v1/jobs/{failed['jobs']['train']}/retry").json["jobs"] for _ in range(2)]
    assert ids[0] == ids[1]
    assert len(list(ledger.requests())) == len(before) + 2
