"""What the API says of its own speed, in a real Valkey, and its start under DEVICE=gpu."""

import dataclasses
import os
import subprocess
import sys

import pytest

from inference.app import create_app
from inference.statistics import Statistics
from shared import artifacts, serving
from shared.stack import free_port

from .conftest import RED, png, publish_model, until


@pytest.fixture
def slow(settings, root):
    """A client of an API that serves `colors` and has a target."""
    app = create_app(dataclasses.replace(settings, serving_p99_ms=1))
    artifacts.promote(root, "colors", "production", publish_model(root, "colors", "m-1"), "onnx-fp32", by="test")
    yield app.test_client()
    app.extensions["lanner"].loaded.close()


def ask(client, body):
    return client.post("/v1/models/colors/predict", data=body, content_type="image/png")


def test_it_is_said_while_predictions_are_asked_for_and_forgotten_after(slow, redis):
    until(lambda: slow.get("/readyz").status_code == 200)
    assert serving.p99_ms(redis, ["cpu"]) is None
    assert ask(slow, png(RED)).status_code == 200
    assert until(lambda: serving.p99_ms(redis, ["cpu"])) > 0
    assert serving.p99_ms(redis, ["GPU-other"]) is None
    until(lambda: serving.p99_ms(redis, ["cpu"]) is None)


def test_of_several_processes_the_slowest_is_heard_and_one_that_ended_is_not(redis, monkeypatch):
    serving.say(redis, "cpu", 40, "a:1")
    serving.say(redis, "cpu", 5, "a:2")
    assert serving.p99_ms(redis, ["cpu"]) == 40
    now = serving.time.time()
    monkeypatch.setattr(serving.time, "time", lambda: now + serving.KEPT_MS / 1000)
    serving.say(redis, "cpu", 6, "a:2")
    assert serving.p99_ms(redis, ["cpu", "GPU-other"]) == 6
    assert 0 < redis.pttl(serving.KEY.format("cpu")) <= serving.KEPT_MS


def test_the_p99_is_that_of_the_slowest_hundredth():
    statistics = Statistics()
    assert statistics.p99_ms(2.0) is None
    for i in range(100):
        with statistics.request("colors") as timing:
            timing.found(1)
            timing.began -= (1000 if i == 50 else 10) * 1_000_000
    assert 10 <= statistics.p99_ms(2.0) < 1000  # one in a hundred is no slower than that
    with statistics.request("colors") as timing:
        timing.found(1)
        timing.began -= 1000 * 1_000_000
    assert statistics.p99_ms(2.0) >= 1000


def start(tmp_path, *smi):
    """`python -m inference` under DEVICE=gpu with an nvidia-smi that prints these rows."""
    script = tmp_path / "bin" / "nvidia-smi"
    script.parent.mkdir()
    script.write_text("#!/bin/sh\n" + "".join(f"echo '{row}'\n" for row in smi))
    script.chmod(0o755)
    env = {**os.environ, "DEVICE": "gpu", "ARTIFACTS": str(tmp_path), "PATH": f"{script.parent}:{os.environ['PATH']}",
           "PORT": str(free_port())}
    env.pop("CUDA_VISIBLE_DEVICES", None)
    return subprocess.Popen([sys.executable, "-m", "inference"], env=env, stdout=subprocess.DEVNULL,
                            stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize(("smi", "sentence"), [
    ((), "DEVICE=gpu, but no GPU is visible (nvidia-smi shows none). Install the NVIDIA driver"),
    (("GPU-a, Tesla V100, 470.57.02, 16160, 7.0",), "driver 470.57.02 is too old, CUDA 12 needs at least 525.60.13"),
])
def test_without_a_gpu_or_with_an_old_driver_it_refuses_to_start(tmp_path, smi, sentence):
    process = start(tmp_path, *smi)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 1
    assert sentence in said


def test_with_a_gpu_it_says_device_driver_and_libraries(tmp_path):
    process = start(tmp_path, "GPU-a, NVIDIA H100 80GB HBM3, 580.65.06, 81559, 9.0")
    try:
        assert "NVIDIA H100 80GB HBM3, 81559 MiB, capability 9.0, driver 580.65.06" in process.stderr.readline()
        assert "libraries: onnxruntime" in process.stderr.readline()
    finally:
        process.terminate()
        process.communicate(timeout=30)
