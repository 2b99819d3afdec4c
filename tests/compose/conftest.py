"""The Compose stack of this checkout under its own project name: built for the CPU, up for the tests, then gone."""

import json
import os
import signal
import socket
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lanner.client import TERMINAL, Client

ROOT = Path(__file__).parents[2]
COLOURS = {"blue": (40, 60, 210), "green": (50, 200, 70), "red": (210, 50, 40)}


def docker(*args: str, seconds: float = 60, **env: str) -> str:
    """What a docker command prints; AssertionError with all of it when it fails."""
    done = subprocess.run(["docker", *args], cwd=ROOT, env={**os.environ, **env}, capture_output=True, text=True,
                          timeout=seconds)
    assert done.returncode == 0, f"docker {' '.join(args)}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
    return done.stdout


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


class Compose:
    """`docker compose` on one project, and a client of its API."""

    def __init__(self, imports: Path):
        self.imports, self.port, self.tensorboard_port = imports, free_port(), free_port()
        self.env = {"COMPOSE_PROJECT_NAME": f"lanner-test-{uuid.uuid4().hex[:8]}", "DEVICE": "cpu",
                    "IMPORTS": str(imports), "PORT": str(self.port), "TENSORBOARD_PORT": str(self.tensorboard_port)}
        self.client = Client(f"http://127.0.0.1:{self.port}")

    def __call__(self, *args: str, seconds: float = 600) -> str:
        return docker("compose", *args, seconds=seconds, **self.env)

    def up(self, *args: str) -> None:
        self("up", "--detach", "--no-build", "--wait", *args)

    def containers(self, service: str) -> list[dict[str, Any]]:
        """`docker inspect` of a service's containers, also of those that have stopped."""
        ids = self("ps", "--all", "--quiet", service).split()
        found: list[dict[str, Any]] = json.loads(docker("inspect", *ids)) if ids else []
        return found

    def python(self, service: str, code: str) -> str:
        return self("exec", "-T", service, "python", "-c", code).strip()

    def kill(self, service: str) -> str:
        """End a service's container by SIGKILL as a crash would, unknown to Docker; returns its id."""
        (container,) = self.containers(service)
        os.kill(container["State"]["Pid"], signal.SIGKILL)
        return str(container["Id"])

    def until(self, condition: Callable[[], Any], seconds: float, what: str) -> Any:
        """Poll until the condition holds; fails with the stack's log after `seconds`."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if value := condition():
                return value
            time.sleep(0.3)
        raise AssertionError(f"{what}: not within {seconds} s\n{self('logs', '--no-color', '--tail', '40')}")

    def ended(self, job_id: str, seconds: float = 300) -> dict[str, Any]:
        """The job's view once it is terminal."""
        self.until(lambda: self.client.job(job_id)["state"] in TERMINAL, seconds, f"end of {job_id}")
        return self.client.job(job_id)

    def submit(self, source: str, name: str, epochs: int) -> dict[str, Any]:
        """A pipeline that ends with one variant, whatever its accuracy."""
        return self.client.submit_pipeline(source, name=name, preprocess={"size": 32},
                                           train={"epochs": epochs, "batch_size": 16},
                                           optimize={"variants": ["onnx-fp32"], "budget": 100})

    def succeeded(self, accepted: dict[str, Any]) -> dict[str, dict[str, Any]]:
        """Every stage of a pipeline as its job's view, once all have succeeded."""
        views = {stage: self.ended(job_id) for stage, job_id in accepted["jobs"].items()}
        failed = {stage: view["error"] for stage, view in views.items() if view["state"] != "succeeded"}
        assert not failed, failed
        return views

    def trains(self, job_id: str, steps: int = 24) -> dict[str, Any]:
        """The job's view once its training has done some steps and goes on."""
        def view() -> dict[str, Any] | None:
            job = self.client.job(job_id)
            assert job["state"] not in TERMINAL, f"{job_id} ended before it could be disturbed: {job}"
            progress = job["progress"] or {}
            return job if progress.get("stage") == "train" and progress["step"] >= steps else None

        return dict(self.until(view, 300, f"{job_id} training"))


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """240 PNGs of 32x32 in three classes that a network tells apart at once: noise around a colour."""
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for label, colour in COLOURS.items():
        (folder / label).mkdir()
        for i in range(80):
            pixels = np.clip(rng.normal(colour, 40, (32, 32, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / label / f"{i}.png")
    return folder


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Compose]:
    compose = Compose(tmp_path_factory.mktemp("host") / "imports")
    try:
        compose("build", "--quiet", seconds=1800)
        compose.up()
        yield compose
    finally:
        compose.client.__exit__(None, None, None)
        compose("down", "--volumes", "--remove-orphans", "--timeout", "5")


@pytest.fixture(scope="session")
def source(stack: Compose, images: Path) -> str:
    """The uploaded images, as the word that a pipeline takes."""
    return str(stack.client.upload(images)["source"])


@pytest.fixture(scope="session")
def pipeline(stack: Compose, source: str) -> dict[str, Any]:
    """A finished pipeline of the Name `colours`: the API's answer when it was accepted."""
    accepted = stack.submit(source, "colours", epochs=12)
    stack.succeeded(accepted)
    return accepted
