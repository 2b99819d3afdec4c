"""/v1/jobs/<id>/events through Flask's client; the live stream is in test_server.py."""

from pathlib import Path
from typing import Any

import pytest
from flask import Flask
from flask.testing import FlaskClient

from inference.events import STREAMS
from shared.ledger import Ledger


@pytest.fixture
def ledger(app: Flask) -> Ledger:
    found: Ledger = app.extensions["lanner"].ledger
    return found


@pytest.fixture
def job_id(client: FlaskClient) -> str:
    return str(client.post("/v1/jobs", json={"kind": "preprocess", "source": "cifar10"}).json["id"])


def test_events_as_json_go_on_after_the_last_one_seen(client: FlaskClient, ledger: Ledger, job_id: str) -> None:
    ledger.event(job_id, "progress", step=1)
    events = client.get(f"/v1/jobs/{job_id}/events?format=json").json["events"]
    assert [e["what"] for e in events] == ["queued", "progress"]
    later = client.get(f"/v1/jobs/{job_id}/events?format=json&after={events[0]['id']}").json["events"]
    assert later == events[1:]


def test_the_stream_of_an_ended_job_goes_on_where_it_broke_and_ends(client: FlaskClient, ledger: Ledger,
                                                                    job_id: str) -> None:
    first = client.get(f"/v1/jobs/{job_id}/events?format=json").json["events"][0]["id"]
    ledger.end(job_id, "failed", code="refused", message="no images")
    text = client.get(f"/v1/jobs/{job_id}/events", headers={"Last-Event-ID": first}).text
    assert '"what": "queued"' not in text
    assert text.count('"what": "failed"') == 1
    assert text.endswith("\n\n")
    assert '"message": "no images"' in text.split("event: end\n")[1]


def test_without_redis_the_stream_still_ends_with_the_record(own_valkey: Any, client: FlaskClient, root: Path,
                                                             ledger: Ledger, job_id: str) -> None:
    own_valkey.kill()
    ledger.end(job_id, "succeeded", result={"images": 3})
    assert '"state": "succeeded"' in client.get(f"/v1/jobs/{job_id}/events").text


def test_a_bad_position_and_an_unknown_job_are_refused(client: FlaskClient, job_id: str) -> None:
    assert client.get(f"/v1/jobs/{job_id}/events", headers={"Last-Event-ID": "-inf"}).status_code == 422
    assert client.get("/v1/jobs/j-none/events").status_code == 404


def test_more_streams_than_threads_for_them_are_turned_away(client: FlaskClient, ledger: Ledger, job_id: str) -> None:
    path = f"/v1/jobs/{job_id}/events"
    streams = [client.get(path, buffered=False) for _ in range(STREAMS)]
    assert client.get(path).status_code == 503
    for stream in streams:
        stream.close()
    ledger.end(job_id, "succeeded")
    assert client.get(path).status_code == 200
