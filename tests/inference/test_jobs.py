"""/v1/pipelines and /v1/jobs: what is written, what is delivered, what the same request again does."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
from flask import Flask
from flask.testing import FlaskClient
from redis import Redis

from shared import artifacts
from shared.ledger import Ledger
from shared.queue import queue_of

from .conftest import png, publish_model

ROOM = ("preprocessing", "training", "optimization")


@pytest.fixture
def ledger(app: Flask) -> Ledger:
    found: Ledger = app.extensions["lanner"].ledger
    return found


def waiting(redis: Redis) -> dict[str, list[str]]:
    """Service -> job ids on its queue."""
    return {service: [i.rsplit("_", 1)[0] for i in queue_of(service, redis).job_ids] for service in ROOM}


def publish_dataset(root: Path, dataset_id: str, name: str = "flowers") -> None:
    staging = artifacts.stage(root, "j-test")
    artifacts.write_json(staging / "stats.json", {"classes": [3, 4]})
    artifacts.publish(root, staging, f"datasets/{dataset_id}", {"name": name, "summary": {"images": 7}})


def test_a_pipeline_is_three_records_and_the_first_is_delivered(client: FlaskClient, redis: Redis,
                                                                ledger: Ledger) -> None:
    body = {"source": "cifar10", "preprocess": {"seed": 1}, "train": {"recipe": "small", "epochs": 2},
            "optimize": {"variants": ["onnx-fp32"]}}
    answer = client.post("/v1/pipelines", json=body)
    assert answer.status_code == 202
    jobs = answer.json["jobs"]
    first, second, third = (ledger.request(jobs[stage]) for stage in ("preprocess", "train", "optimize"))
    assert (first.job.name, first.job.source, first.job.seed) == ("cifar10", "cifar10", 1)
    assert first.job.dataset_id == second.job.dataset_id == answer.json["dataset_id"]
    assert second.job.model_id == third.job.model_id == answer.json["model_id"]
    assert (second.job.epochs, third.job.variants) == (2, ("onnx-fp32",))
    assert (first.parent, second.parent, third.parent) == ("", first.id, second.id)
    assert {r.pipeline for r in (first, second, third)} == {answer.json["pipeline"]}
    assert waiting(redis) == {"preprocessing": [first.id], "training": [], "optimization": []}
    for link in (answer.json["links"]["pipeline"], *answer.json["links"]["jobs"].values()):
        assert client.get(link).status_code == 200


def test_a_pipeline_shows_its_jobs_and_one_state(client: FlaskClient, ledger: Ledger) -> None:
    answer = client.post("/v1/pipelines", json={"source": "cifar10"}).json
    link, jobs = answer["links"]["pipeline"], answer["jobs"]
    view = client.get(link).json
    assert (view["state"], view["name"]) == ("queued", "cifar10")
    assert list(view["jobs"]) == ["preprocess", "train", "optimize"]
    assert [j["state"] for j in view["jobs"].values()] == ["queued", "waiting", "waiting"]
    ledger.end(jobs["preprocess"], "succeeded")
    assert client.get(link).json["state"] == "running"
    ledger.end(jobs["train"], "failed", code="refused", message="no")
    ledger.end(jobs["optimize"], "failed", code="parent_failed", message="no")
    assert client.get(link).json["state"] == "failed"
    assert [p["pipeline"] for p in client.get("/v1/pipelines").json["pipelines"]] == [answer["pipeline"]]
    assert client.get("/v1/pipelines/p-none").status_code == 404


@pytest.mark.parametrize(("filename", "given", "name"), [
    ("My Flowers.tar.gz", "", "my-flowers"), ("photos.zip", "", "photos"), ("", "", "u-1"), ("---.zip", "", "dataset"),
    ("photos.zip", "holiday", "holiday")])
def test_an_upload_gives_the_pipeline_its_name(client: FlaskClient, filename: str, given: str, name: str) -> None:
    client.put(f"/v1/uploads/u-1?filename={filename}", data=b"zip")
    body = {"source": "upload:u-1"} | ({"name": given} if given else {})
    assert client.post("/v1/pipelines", json=body).json["name"] == name


@pytest.mark.parametrize("path", ["/v1/pipelines", "/v1/jobs"])
def test_the_same_idempotency_key_is_the_same_work(client: FlaskClient, redis: Redis, path: str) -> None:
    headers, body = {"Idempotency-Key": "once"}, {"source": "cifar10", "kind": "preprocess"}
    if path == "/v1/pipelines":
        del body["kind"]
    first, again = (client.post(path, json=body, headers=headers) for _ in range(2))
    assert (first.status_code, again.status_code) == (202, 200)
    assert first.json == again.json
    assert len(waiting(redis)["preprocessing"]) == 1
    other = client.post(path, json={**body, "name": "other"}, headers=headers)
    assert (other.status_code, other.json["error"]["code"]) == (409, "key_reused")
    assert client.post(path, json=body, headers={"Idempotency-Key": "x" * 256}).status_code == 400


def test_a_repeated_key_delivers_what_was_accepted_and_never_delivered(client: FlaskClient, redis: Redis) -> None:
    """As after the API died between the record and the queue."""
    body, headers = {"source": "cifar10"}, {"Idempotency-Key": "once"}
    job_id = client.post("/v1/pipelines", json=body, headers=headers).json["jobs"]["preprocess"]
    redis.flushall()
    assert client.post("/v1/pipelines", json=body, headers=headers).status_code == 200
    assert waiting(redis)["preprocessing"] == [job_id]


def test_one_stage_takes_its_name_from_what_it_reads(client: FlaskClient, root: Path, redis: Redis) -> None:
    publish_dataset(root, "d-1")
    answer = client.post("/v1/jobs", json={"kind": "train", "dataset_id": "d-1", "epochs": 3})
    assert answer.status_code == 202
    assert answer.json["job"]["name"] == "flowers"
    assert answer.json["job"]["model_id"].startswith("m-")
    assert (answer.json["state"], answer.json["parent"]) == ("queued", "")
    assert waiting(redis)["training"] == [answer.json["id"]]
    tune = client.post("/v1/jobs", json={"kind": "tune", "dataset_id": "d-1", "recipes": ["small"]}).json
    assert (tune["kind"], tune["job"]["name"], tune["job"]["recipes"]) == ("tune", "flowers", ["small"])
    assert waiting(redis)["training"] == [answer.json["id"], tune["id"]]
    publish_model(root, "colors", "m-1")
    assert client.post("/v1/jobs", json={"kind": "optimize", "model_id": "m-1"}).json["job"]["name"] == "colors"


def test_a_predict_job_is_accepted_for_a_name_and_a_source_that_exist(client: FlaskClient, root: Path,
                                                                      redis: Redis) -> None:
    publish_dataset(root, "d-1")
    publish_model(root, "colors", "m-1")
    answer = client.post("/v1/jobs", json={"kind": "predict", "name": "colors", "source": "dataset:d-1/test"})
    assert answer.status_code == 202
    assert answer.json["job"]["predictions_id"].startswith("r-")
    assert waiting(redis)["optimization"] == [answer.json["id"]]
    for source in ("dataset:d-none", "upload:u-none"):
        missing = client.post("/v1/jobs", json={"kind": "predict", "name": "colors", "source": source})
        assert (missing.status_code, missing.json["error"]["code"]) == (404, "not_found")
    assert [job["id"] for job in client.get("/v1/jobs?kind=predict").json["jobs"]] == [answer.json["id"]]


def test_a_stage_waits_for_the_job_that_makes_what_it_reads(client: FlaskClient, redis: Redis, ledger: Ledger) -> None:
    first = client.post("/v1/jobs", json={"kind": "preprocess", "source": "cifar10"}).json
    train = client.post("/v1/jobs", json={"kind": "train", "dataset_id": first["job"]["dataset_id"]}).json
    assert (train["parent"], train["state"], train["job"]["name"]) == (first["id"], "waiting", "cifar10")
    optimize = client.post("/v1/jobs", json={"kind": "optimize", "model_id": train["job"]["model_id"]}).json
    assert (optimize["parent"], optimize["state"]) == (train["id"], "waiting")
    assert waiting(redis) == {"preprocessing": [first["id"]], "training": [], "optimization": []}
    ledger.end(first["id"], "failed", code="refused", message="no images")
    late = client.post("/v1/jobs", json={"kind": "train", "dataset_id": first["job"]["dataset_id"], "name": "late"})
    assert (late.status_code, late.json["error"]["code"]) == (404, "not_found")


def test_a_record_that_another_version_wrote_is_in_nobody_s_way(client: FlaskClient, root: Path,
                                                                caplog: pytest.LogCaptureFixture) -> None:
    job = client.post("/v1/jobs", json={"kind": "preprocess", "source": "cifar10"}).json
    record = json.loads((root / "jobs" / job["id"] / "request.json").read_bytes())
    for odd, change in (("j-kind", {"kind": "distil"}), ("j-field", {"job": {**record["job"], "hue": 1}}),
                        ("j-shape", {"parent": None, "job": []})):
        artifacts.write_json(root / "jobs" / odd / "request.json", {**record, "id": odd, **change})
    artifacts.write_bytes(root / "jobs/j-torn/request.json", b'{"id": ')
    artifacts.write_json(root / "jobs/j-old/request.json", {"id": "j-old"})
    client.put("/v1/uploads/u-1", data=b"bytes")
    assert 'lanner_jobs{state="unreadable"} 5.0' in client.get("/metrics").text
    assert client.delete("/v1/uploads/u-1").status_code == 204
    assert [known["id"] for known in client.get("/v1/jobs").json["jobs"]] == [job["id"]]
    after = client.post("/v1/jobs", json={"kind": "train", "dataset_id": job["job"]["dataset_id"]})
    assert (after.status_code, after.json["parent"]) == (202, job["id"])
    told = client.get("/v1/jobs/j-kind")
    assert (told.status_code, told.json["error"]["code"]) == (500, "damaged")
    assert caplog.text.count("the record of job j-kind is none that this version wrote") == 1


def test_an_artifact_that_exists_is_not_made_again(client: FlaskClient, root: Path) -> None:
    publish_dataset(root, "d-1")
    answer = client.post("/v1/jobs", json={"kind": "preprocess", "source": "cifar10", "dataset_id": "d-1"})
    assert (answer.status_code, answer.json["error"]["code"]) == (409, "id_taken")


BAD = [
    ("/v1/pipelines", {"source": "imagenet"}, 422, "bad_job"),
    ("/v1/pipelines", {"source": 7}, 422, "bad_job"),
    ("/v1/pipelines", {"source": "import:"}, 422, "bad_job"),
    ("/v1/pipelines", {"source": "upload:u-none"}, 404, "not_found"),
    ("/v1/pipelines", {"source": "upload:../../etc"}, 422, "bad_name"),
    ("/v1/pipelines", {"source": "cifar10", "name": "../x"}, 422, "bad_name"),
    ("/v1/pipelines", {"source": "cifar10", "colour": 1}, 422, "bad_job"),
    ("/v1/pipelines", {"source": "cifar10", "train": {"recpie": "small"}}, 422, "bad_job"),
    ("/v1/pipelines", {"source": "cifar10", "train": {"epochs": "3"}}, 422, "bad_job"),
    ("/v1/pipelines", {"source": "cifar10", "train": 3}, 422, "bad_job"),
    ("/v1/pipelines", {"source": "cifar10", "train": {"augmentation": {"flip": True}}}, 422, "bad_augmentation"),
    ("/v1/pipelines", {"source": "cifar10", "train": {"augmentation": {"cutout": 300}}}, 422, "bad_augmentation"),
    ("/v1/pipelines", {"source": "cifar10", "train": {"recipe": "speedrun", "augmentation": {"cutout": 4}}}, 422,
     "bad_augmentation"),
    ("/v1/pipelines", {"source": "cifar10", "train": {"recipe": "transfer"}}, 422, "no_weights"),
    ("/v1/pipelines", {"source": "cifar10", "train": {"model_id": "m-mine"}}, 422, "bad_job"),
    ("/v1/pipelines", {"source": "cifar10", "preprocess": {"size": 8}}, 422, "bad_job"),
    ("/v1/pipelines", {"source": "cifar10", "optimize": {"variants": ["onnx-int4"]}}, 422, "bad_job"),
    ("/v1/jobs", {"kind": "deploy"}, 422, "bad_job"),
    ("/v1/jobs", {"kind": "predict"}, 422, "bad_name"),
    ("/v1/jobs", {"kind": "predict", "name": "nobody", "source": "dataset:d-1"}, 404, "not_found"),
    ("/v1/jobs", {"kind": "predict", "name": "nobody", "source": "import:../x"}, 404, "not_found"),
    ("/v1/jobs", {"kind": ["train"]}, 422, "bad_job"),
    ("/v1/jobs", {}, 422, "bad_job"),
    ("/v1/jobs", {"kind": "train"}, 422, "bad_name"),
    ("/v1/jobs", {"kind": "train", "dataset_id": "d-none"}, 404, "not_found"),
    ("/v1/jobs", {"kind": "train", "dataset_id": "../d"}, 422, "bad_name"),
    ("/v1/jobs", {"kind": "optimize", "model_id": "m-none"}, 404, "not_found"),
]


@pytest.mark.parametrize(("path", "body", "status", "code"), BAD)
def test_a_bad_job_is_refused_and_nothing_is_written(client: FlaskClient, root: Path, redis: Redis, path: str,
                                                     body: dict[str, Any], status: int, code: str) -> None:
    answer = client.post(path, json=body)
    assert (answer.status_code, answer.json["error"]["code"]) == (status, code), answer.json
    assert not (root / "jobs").exists()
    assert waiting(redis) == {service: [] for service in ROOM}


def test_a_body_that_is_no_json_is_malformed(client: FlaskClient) -> None:
    json = "application/json"
    for data, kind, status in ((b"{", json, 400), (b"\xff", json, 400), (bytes(2 << 20), json, 413),
                               (b'{"source": "cifar10"}', "text/plain", 415)):
        assert client.post("/v1/pipelines", data=data, content_type=kind).status_code == status


def test_jobs_are_listed_the_latest_first_by_state_and_kind(client: FlaskClient, ledger: Ledger) -> None:
    ids = [client.post("/v1/jobs", json={"kind": "preprocess", "source": "cifar10"}).json["id"] for _ in range(3)]
    ledger.end(ids[0], "succeeded")

    def listed(query: str = "") -> list[str]:
        return [job["id"] for job in client.get(f"/v1/jobs{query}").json["jobs"]]

    assert listed() == ids[::-1]
    assert listed("?limit=1") == ids[2:]
    assert listed("?state=succeeded") == ids[:1]
    assert listed("?state=queued&kind=preprocess") == [ids[2], ids[1]]
    assert listed("?kind=train") == []
    for query in ("?state=odd", "?kind=odd", "?limit=0", "?limit=many", "?limit=501"):
        assert client.get(f"/v1/jobs{query}").status_code == 422
    assert client.get(f"/v1/jobs/{ids[0]}").json["state"] == "succeeded"
    assert client.get("/v1/jobs/j-none").status_code == 404


def test_a_record_that_cannot_be_read_hides_no_other(client: FlaskClient, root: Path) -> None:
    job_id = client.post("/v1/jobs", json={"kind": "preprocess", "source": "cifar10"}).json["id"]
    (root / "jobs/j-broken").mkdir()
    (root / "jobs/j-broken/request.json").write_text("{")
    assert [job["id"] for job in client.get("/v1/jobs").json["jobs"]] == [job_id]


def test_cancelling_asks_once_and_an_ended_job_is_a_conflict(client: FlaskClient, ledger: Ledger, redis: Redis) -> None:
    job_id = client.post("/v1/jobs", json={"kind": "preprocess", "source": "cifar10"}).json["id"]
    answer = client.post(f"/v1/jobs/{job_id}/cancel")
    assert (answer.status_code, answer.json["cancel_asked"]) == (202, True)
    assert ledger.cancel_asked(job_id)
    assert redis.llen("lanner:nudge") == 1
    ledger.end(job_id, "cancelled", code="cancelled", message="cancelled on request")
    answer = client.post(f"/v1/jobs/{job_id}/cancel")
    assert (answer.status_code, answer.json["error"]["code"]) == (409, "already_ended")
    assert client.post("/v1/jobs/j-none/cancel").status_code == 404


def test_without_redis_jobs_are_refused_at_once_and_the_rest_goes_on(own_valkey: Any, serving: FlaskClient,
                                                                     root: Path) -> None:
    stage = {"kind": "preprocess", "source": "cifar10"}
    job_id = serving.post("/v1/jobs", json=stage).json["id"]
    own_valkey.kill()
    for path, body in (("/v1/pipelines", {"source": "cifar10"}), ("/v1/jobs", stage)):
        began = time.monotonic()
        answer = serving.post(path, json=body)
        assert time.monotonic() - began < 5  # the timeouts of a client that waits for Redis are longer
        assert (answer.status_code, answer.json["error"]["code"]) == (503, "queue_unavailable")
        assert int(answer.headers["Retry-After"]) >= 1
    assert [p.name for p in (root / "jobs").iterdir()] == [job_id], "a refused job left a record"
    assert serving.get(f"/v1/jobs/{job_id}").json["state"] == "queued"
    assert serving.post(f"/v1/jobs/{job_id}/cancel").status_code == 202
    ready = serving.get("/readyz")
    assert (ready.status_code, ready.json["redis"]) == (200, False)
    assert serving.get("/metrics").status_code == 200
    answer = serving.post("/v1/models/colors/predict", data=png((255, 0, 0)), content_type="image/png")
    assert answer.json["predictions"][0]["top"][0]["label"] == "red"
    own_valkey.start()
    assert serving.post("/v1/pipelines", json={"source": "cifar10"}).status_code in (202, 503)  # at rest for a second
    time.sleep(1.1)
    assert serving.post("/v1/pipelines", json={"source": "cifar10"}).status_code == 202


def test_a_traceparent_is_kept_with_the_jobs_and_a_malformed_one_is_not(client: FlaskClient, root: Path,
                                                                        ledger: Ledger) -> None:
    publish_dataset(root, "d-1")
    told = f"00-{'a' * 32}-{'b' * 16}-01"
    for header, kept in ((told, told), ("nonsense", ""), ("", "")):
        pipeline = client.post("/v1/pipelines", json={"source": "cifar10"}, headers={"traceparent": header}).json
        job = client.post("/v1/jobs", json={"kind": "train", "dataset_id": "d-1"}, headers={"traceparent": header}).json
        ids = [*pipeline["jobs"].values(), job["id"]]
        assert {ledger.request(job_id).traceparent for job_id in ids} == {kept}


def test_the_log_of_an_attempt_is_text(client: FlaskClient, ledger: Ledger) -> None:
    job_id = client.post("/v1/jobs", json={"kind": "preprocess", "source": "cifar10"}).json["id"]
    assert client.get(f"/v1/jobs/{job_id}/log").status_code == 404
    for number in (1, 2):
        ledger.begin(job_id, "w")
        ledger.log_of(job_id, number).write_text(f"attempt {number}: é")
    answer = client.get(f"/v1/jobs/{job_id}/log")
    assert (answer.status_code, answer.mimetype, answer.text) == (200, "text/plain", "attempt 2: é")
    assert client.get(f"/v1/jobs/{job_id}/log?attempt=1").text == "attempt 1: é"
    for query, status, code in (("attempt=3", 404, "not_found"), ("attempt=../1", 422, "bad_request")):
        told = client.get(f"/v1/jobs/{job_id}/log?{query}")
        assert (told.status_code, told.json["error"]["code"]) == (status, code)
