"""A training beside predictions: the real API under requests, the real training worker, one Valkey."""

import base64
import importlib.util
import json
import threading
import urllib.request
from pathlib import Path

import numpy as np
import pytest

from shared import artifacts
from shared.jobs import TrainJob
from shared.stack import free_port


def module(path):
    """The fixtures of another room."""
    spec = importlib.util.spec_from_file_location(f"one_gpu_{path.stem}", path)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


pytestmark = pytest.mark.system
TESTS = Path(__file__).parents[1]
api = module(TESTS / "inference" / "conftest.py")
colours = module(TESTS / "training" / "colours.py")


class Asked:
    """Requests, one after the other until `close`; every answer's status."""

    def __init__(self, port):
        self.url, self.statuses, self._over = f"http://127.0.0.1:{port}/v1/models/colors/predict", set(), False
        self._thread = threading.Thread(target=self._ask)
        self._thread.start()

    def _ask(self):
        image = base64.b64encode(api.png(api.RED)).decode()
        body = json.dumps({"images": [image] * 64}).encode()  # so many take longer than a target of 1 ms anywhere
        while not self._over:
            request = urllib.request.Request(self.url, body, {"Content-Type": "application/json"})
            with urllib.request.urlopen(request, timeout=20) as answer:
                self.statuses.add(answer.status)

    def close(self):
        self._over = True
        self._thread.join()


@pytest.fixture
def serving(stack):
    """serving(target_ms) starts an API that answers, and returns its port."""
    version = api.publish_model(stack.root, "colors", "m-colors")
    artifacts.promote(stack.root, "colors", "production", version, "onnx-fp32", by="test")

    def start(target_ms):
        port = free_port()
        stack.start("inference", "inference", PORT=str(port), SERVING_P99_MS=str(target_ms), REFRESH_S="0.05")
        stack.until(lambda: api.answers(port), what="the API")
        return port

    return start


def trained(stack, dataset_id, model_id):
    """Train; the progress events' metrics, and the job."""
    job = TrainJob(model_id, dataset_id, "colours", "small", epochs=2, batch_size=32)
    job_id = stack.accept(job)
    view = stack.ended(job_id, 120)
    assert view["state"] == "succeeded", view["error"]
    events = [event for _, event in stack.ledger.events(job_id)]
    return [e["metrics"] for e in events if e["what"] == "progress" and e["stage"] == "train"], job


def weights(root, job):
    import keras

    return keras.models.load_model(root / job.target / "model.keras", compile=False).get_weights()


def test_over_its_target_predictions_go_on_and_the_training_pauses_without_another_result(stack, serving):
    dataset = colours.write_dataset(stack.root, images=300, size=16)
    stack.worker("training", SERVING_P99_MS="1", CPU_THREADS="2")
    idle_told, idle = trained(stack, dataset, "m-idle")
    asked = Asked(serving(1))
    try:
        told, yielding = trained(stack, dataset, "m-yielding")
    finally:
        asked.close()
    assert asked.statuses == {200}
    assert told[-1]["yielded_s"] > 0
    for name in ("training", "inference"):
        stack.stop(name)
    stack.worker("training", CPU_THREADS="2")
    asked = Asked(serving(0))
    try:
        off_told, off = trained(stack, dataset, "m-off")
    finally:
        asked.close()
    assert not [metrics for metrics in idle_told + off_told if "yielded_s" in metrics]
    for a, b, c in zip(*(weights(stack.root, job) for job in (idle, yielding, off)), strict=True):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(a, c)
