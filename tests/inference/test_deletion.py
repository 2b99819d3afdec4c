"""DELETE: what nothing stands on goes whole, what something stands on stays whole."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from flask.testing import FlaskClient
from redis import Redis

from shared import artifacts, deletions, removal
from shared.errors import Conflict, NotFound
from shared.jobs import OptimizeJob, PredictJob, TrainJob
from shared.ledger import Ledger
from shared.queue import LEASE

from .conftest import RED, png, publish_model, publish_variant, until


@pytest.fixture
def published(serving: FlaskClient, root: Path) -> FlaskClient:
    """`serving`, whose model m-1 was trained on d-1; a second version that no alias points at; predictions r-1."""
    publish_model(root, "colors", "m-2")
    publish_variant(root, "m-2", "onnx-int8")
    for suffix in ("json", "html", "serving.json"):
        (root / "cards").mkdir(exist_ok=True)
        (root / "cards" / f"m-2.{suffix}").write_text("{}")
    for target in ("datasets/d-1", "datasets/d-2", "predictions/r-1"):
        staging = artifacts.stage(root, "j-test")
        (staging / "data").write_bytes(b"bytes")
        artifacts.publish(root, staging, target, {"name": "colors", "summary": {}})
    return serving


@pytest.fixture(autouse=True)
def keeper(root: Path, redis: Redis) -> Iterator[Callable[[], None]]:
    """Something carries out the orders. Returns what ends it."""
    stop = threading.Event()
    redis.set(LEASE, "test")

    def keep() -> None:
        while not stop.wait(0.01):
            deletions.carry_out(root)

    thread = threading.Thread(target=keep)
    thread.start()

    def end() -> None:
        stop.set()
        thread.join()

    yield end
    end()


def code_of(answer: Any) -> tuple[int, str]:
    return answer.status_code, answer.json["error"]["code"] if answer.status_code != 204 else ""


def open_job(root: Path, job: Any, job_id: str = "j-1") -> Ledger:
    ledger = Ledger(root, None)  # type: ignore[arg-type]
    ledger.event = lambda *a, **b: None  # type: ignore[method-assign]
    ledger.live = lambda *a, **b: None  # type: ignore[method-assign]
    ledger.accept(job_id, job)
    return ledger


def test_a_version_goes_with_its_model_and_its_number_is_given_to_no_other(published: FlaskClient, root: Path) -> None:
    assert code_of(published.delete("/v1/models/colors/versions/2")) == (204, "")
    assert artifacts.versions(root, "colors") == {1: "m-1"}
    for target in ("models/m-2", "variants/m-2", "cards/m-2.json", "cards/m-2.html", "cards/m-2.serving.json"):
        assert not (root / target).exists()
    until(lambda: list((root / ".staging").iterdir()) == [])
    assert code_of(published.delete("/v1/models/colors/versions/2")) == (404, "not_found")
    assert publish_model(root, "colors", "m-3") == 3
    assert published.get("/v1/cards/m-2").status_code == 404


def test_a_version_that_an_alias_points_at_stays_and_serves(published: FlaskClient, root: Path) -> None:
    told = published.delete("/v1/models/colors/versions/1")
    assert code_of(told) == (409, "in_use")
    assert "colors@production points at version 1" in told.json["error"]["message"]
    assert published.post("/v1/models/colors/predict", data=png(RED), content_type="image/png").status_code == 200


def test_a_model_that_another_name_has_stays(published: FlaskClient, root: Path) -> None:
    artifacts.register_version(root, "shades", "m-2")
    assert code_of(published.delete("/v1/models/colors/versions/2")) == (204, "")
    assert (root / "models/m-2").is_dir()
    assert artifacts.versions(root, "shades") == {1: "m-2"}


def test_an_alias_goes_and_its_name_answers_no_more_by_it(published: FlaskClient, root: Path) -> None:
    artifacts.promote(root, "colors", "candidate", 2, "onnx-fp32", by="test")
    assert code_of(published.delete("/v1/models/colors/aliases/candidate")) == (204, "")
    assert list(artifacts.aliases(root, "colors")) == ["production"]
    assert code_of(published.delete("/v1/models/colors/aliases/candidate")) == (404, "not_found")
    assert code_of(published.delete("/v1/models/colors/aliases/production")) == (204, "")
    path = "/v1/models/colors/predict"
    until(lambda: published.post(path, data=png(RED), content_type="image/png").status_code == 404)
    for number in (1, 2):
        assert code_of(published.delete(f"/v1/models/colors/versions/{number}")) == (204, "")
    assert published.get("/v1/models").json == {"models": []}
    assert published.get("/v1/models/colors").status_code == 404
    assert published.post("/v2/repository/index").json == []


def test_a_dataset_stays_while_a_model_was_trained_on_it(published: FlaskClient, root: Path) -> None:
    manifest = artifacts.read_json(root / "models/m-2/manifest.json")
    artifacts.write_json(root / "models/m-2/manifest.json", {**manifest, "parents": {"dataset": "d-1"}})
    assert code_of(published.delete("/v1/datasets/d-1")) == (409, "in_use")
    assert code_of(published.delete("/v1/models/colors/versions/2")) == (204, "")
    assert code_of(published.delete("/v1/datasets/d-1")) == (204, "")
    assert published.get("/v1/datasets/d-1").status_code == 404
    assert code_of(published.delete("/v1/datasets/d-1")) == (404, "not_found")


@pytest.mark.parametrize(("job", "path"), [
    (TrainJob("m-9", "d-1", "colors"), "/v1/datasets/d-1"),
    (PredictJob("r-9", "colors", "dataset:d-1/test"), "/v1/datasets/d-1"),
    (OptimizeJob("m-2", "colors"), "/v1/models/colors/versions/2"),
    (PredictJob("r-9", "colors", "dataset:d-2"), "/v1/models/colors/versions/2")])
def test_what_a_job_stands_on_stays_until_that_has_ended(published: FlaskClient, root: Path, job: Any,
                                                         path: str) -> None:
    ledger = open_job(root, job)
    assert code_of(published.delete(path)) == (409, "in_use")
    ledger.end("j-1", "cancelled", code="cancelled")
    assert code_of(published.delete(path)) == (204, "")


def test_predictions_go(published: FlaskClient, root: Path) -> None:
    assert code_of(published.delete("/v1/predictions/r-1")) == (204, "")
    assert code_of(published.delete("/v1/predictions/r-1")) == (404, "not_found")
    assert code_of(published.delete("/v1/predictions/..")) in ((404, "not_found"), (422, "bad_name"))


def test_a_model_that_became_no_version_goes_with_its_dataset(published: FlaskClient, root: Path) -> None:
    staging = artifacts.stage(root, "j-test")
    (staging / "model.keras").write_bytes(b"weights")
    artifacts.publish(root, staging, "models/m-7", {"name": "colors", "parents": {"dataset": "d-2"}, "summary": {}})
    ledger = open_job(root, OptimizeJob("m-7", "colors"))
    assert code_of(published.delete("/v1/datasets/d-2")) == (409, "in_use")
    ledger.end("j-1", "cancelled", code="cancelled")
    assert code_of(published.delete("/v1/datasets/d-2")) == (204, "")
    assert not (root / "models/m-7").exists()


def test_deleting_an_alias_is_a_move_which_a_job_accepted_before_it_respects(published: FlaskClient,
                                                                             root: Path) -> None:
    artifacts.promote(root, "colors", "candidate", 2, "onnx-fp32", by="test")
    seen = artifacts.alias_seq(root, "colors", "candidate")
    published.delete("/v1/models/colors/aliases/candidate")
    with pytest.raises(Conflict, match="colors@candidate was deleted just now"):
        artifacts.promote(root, "colors", "candidate", 2, "onnx-fp32", by="j-1", seq=seen)
    made = artifacts.promote(root, "colors", "candidate", 2, "onnx-fp32", by="api")
    assert made["seq"] == seen + 2
    with pytest.raises(Conflict, match="was moved by api just now"):
        artifacts.promote(root, "colors", "candidate", 2, "onnx-fp32", by="j-1", seq=seen)


@pytest.mark.parametrize("without_lease", [False, True])
@pytest.mark.parametrize("path", ["/v1/models/colors/versions/2", "/v1/datasets/d-2", "/v1/predictions/r-1"])
def test_without_a_keeper_nothing_is_deleted_and_it_is_told(published: FlaskClient, root: Path, path: str, keeper: Any,
                                                            redis: Redis, without_lease: bool,
                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deletions, "WAIT_S", 0.1)
    keeper()
    if without_lease:
        redis.delete(LEASE)
    before = sorted(str(p) for p in root.rglob("*") if p.name not in ("jobs", ".deletions", ".lock"))
    told = published.delete(path)
    assert code_of(told) == (503, "keeper_absent")
    assert "docker compose up -d keeper" in told.json["error"]["message"]
    assert sorted(str(p) for p in root.rglob("*") if p.name not in ("jobs", ".deletions", ".lock")) == before


def test_a_version_whose_model_went_before_its_number_did_can_be_deleted_again(published: FlaskClient,
                                                                               root: Path) -> None:
    deletions.delete(root, None, ["models/m-2", "variants/m-2"])
    assert published.get("/v1/models/colors").status_code == 200
    assert code_of(published.delete("/v1/models/colors/versions/2")) == (204, "")
    assert artifacts.versions(root, "colors") == {1: "m-1"}


def test_a_job_that_ends_while_it_is_looked_for_has_made_a_version_that_is_seen(
        published: FlaskClient, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    staging = artifacts.stage(root, "j-test")
    artifacts.publish(root, staging, "models/m-7", {"name": "late", "parents": {"dataset": "d-2"}, "summary": {}})
    check = removal._check_jobs

    def ends(*args: Any) -> None:
        check(*args)
        artifacts.register_version(root, "late", "m-7")

    monkeypatch.setattr(removal, "_check_jobs", ends)
    told = published.delete("/v1/datasets/d-2")
    assert (code_of(told), "version 1 of late" in told.json["error"]["message"]) == ((409, "in_use"), True)
    assert (root / "models/m-7").is_dir()
    assert (root / "datasets/d-2").is_dir()


@pytest.mark.parametrize("midst", [False, True])
def test_an_alias_does_not_move_to_what_is_deleted_meanwhile(published: FlaskClient, root: Path, midst: bool,
                                                             monkeypatch: pytest.MonkeyPatch) -> None:
    opened = artifacts.open_artifact

    def slow(*args: Any, **options: Any) -> artifacts.Manifest:
        found = opened(*args, **options)
        monkeypatch.setattr(artifacts, "open_artifact", opened)
        assert code_of(published.delete("/v1/models/colors/versions/2")) == (204, "")
        if midst:
            raise FileNotFoundError("model.onnx")
        return found

    monkeypatch.setattr(artifacts, "open_artifact", slow)
    with pytest.raises(NotFound, match="version 2 of colors was deleted just now"):
        artifacts.promote(root, "colors", "candidate", 2, "onnx-int8", by="test")
    assert list(artifacts.aliases(root, "colors")) == ["production"]


def test_a_model_that_is_published_while_its_dataset_is_deleted_is_seen(published: FlaskClient, root: Path,
                                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    open_job(root, OptimizeJob("m-7", "late"), "j-7")
    check, looks = removal._check_jobs, []

    def ends(*args: Any) -> None:
        check(*args)
        if not looks:  # the training ends right after the first look
            staging = artifacts.stage(root, "j-test")
            manifest = {"name": "late", "parents": {"dataset": "d-2"}, "summary": {}}
            artifacts.publish(root, staging, "models/m-7", manifest)
        looks.append(args)

    monkeypatch.setattr(removal, "_check_jobs", ends)
    told = published.delete("/v1/datasets/d-2")
    assert (code_of(told), "job j-7 still stands on" in told.json["error"]["message"]) == ((409, "in_use"), True)
    assert (root / "datasets/d-2").is_dir()
