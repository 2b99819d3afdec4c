"""What keeps jobs from running is told: nobody to run them, no keeper, no queue, no disk."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from flask.testing import FlaskClient
from redis import Redis

from shared import disk
from shared.queue import LEASE

from .conftest import until

SERVICES = ("optimization", "preprocessing", "training")


@pytest.fixture
def worker(root: Path, valkey: Any) -> Iterator["subprocess.Popen[bytes]"]:
    env = {**os.environ, "DEVICE": "cpu", "ARTIFACTS": str(root), "REDIS_URL": valkey.url, "IMPORT_AHEAD": "off"}
    process = subprocess.Popen([sys.executable, "-m", "shared.worker", "preprocessing"], env=env)
    yield process
    process.kill()
    process.wait()


def test_who_works_and_what_waits(client: FlaskClient, redis: Redis, worker: "subprocess.Popen[bytes]") -> None:
    until(lambda: client.get("/v1/system").json["queues"]["preprocessing"]["workers"])
    redis.set(LEASE, "token", px=60_000)
    worker.send_signal(signal.SIGSTOP)  # it takes nothing
    client.post("/v1/pipelines", json={"source": "cifar10"})
    told = client.get("/v1/system").json
    assert (told["redis"], told["keeper"]) == (True, True)
    (at_work,) = told["queues"]["preprocessing"]["workers"]
    assert (at_work["host"], at_work["job"]) == (os.uname().nodename, None)
    assert {service: told["queues"][service]["queued"] for service in SERVICES} == {
        "optimization": 0, "preprocessing": 1, "training": 0}
    assert 0 <= told["queues"]["preprocessing"]["oldest_s"] < 60
    assert told["trouble"] == ["no optimization worker is there", "no training worker is there"]
    assert 0 < told["disk"]["free"] < told["disk"]["total"]
    text = client.get("/metrics").text
    assert 'lanner_workers{queue="preprocessing"} 1.0' in text
    assert 'lanner_workers{queue="training"} 0.0' in text
    assert "lanner_keeper 1.0" in text
    assert "lanner_disk_free_bytes " in text


def test_a_full_volume_and_no_keeper_are_told(client: FlaskClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "RESERVE", 1 << 62)
    told = client.get("/v1/system").json
    assert (told["keeper"], told["disk"]["free"]) == (False, 0)
    assert told["trouble"] == [*(f"no {service} worker is there" for service in SERVICES), "no keeper is there",
                               "the volume is full"]


def test_without_redis_the_rest_is_told(own_valkey: Any, client: FlaskClient) -> None:
    own_valkey.kill()
    told = client.get("/v1/system").json
    assert told["trouble"] == ["the queue does not answer"]
    assert (told["redis"], told["keeper"], told["queues"]["training"]["workers"]) == (False, None, None)
