"""Which Variants stay in memory."""

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import pytest
from flask.testing import FlaskClient
from hypothesis import given, settings
from hypothesis import strategies as st

from inference.app import create_app
from inference.memory import KEPT, Key, Memory
from inference.metrics import Meters
from shared import artifacts
from shared.settings import Settings

from .conftest import RED, onnx_bytes, png, publish_model, publish_variant, until

SIZES = (20_000, 50_000, 90_000, 30_000, 140_000)  # bytes that each Variant has more than its network


def padded(size: int) -> bytes:
    model = onnx.load_from_string(onnx_bytes(np.eye(3) * 0.05))
    model.doc_string = "x" * size
    return bytes(model.SerializeToString())


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("artifacts")
    for i, size in enumerate(SIZES):
        publish_variant(root, f"m-{i}", "onnx-fp32", padded(size))
    return root


def size_of(root: Path, key: Key) -> int:
    files = artifacts.read_json(root / "variants" / key[0] / key[1] / "manifest.json")["files"]
    return sum(entry["size"] for entry in files.values())


KEYS = st.integers(0, len(SIZES) - 1).map(lambda i: (f"m-{i}", "onnx-fp32"))


@settings(max_examples=25, deadline=None)
@given(budget=st.integers(1, 500_000), steps=st.lists(st.one_of(KEYS, st.sets(KEYS, max_size=2)), max_size=12))
def test_what_goes_is_what_was_asked_for_least_recently_and_never_what_is_pinned(
        published: Path, budget: int, steps: list[Key | set[Key]]) -> None:
    memory, asked, pinned = Memory(published, Meters(), 1, budget=budget), list[Key](), set[Key]()
    for step in steps:
        if isinstance(step, set):
            for key in step:  # an alias after the other moves
                memory.get(key)
                memory.pin(pinned | {key})
                asked = [other for other in asked if other not in pinned | {key}]
                pinned = pinned | {key}
            asked = [key for key in asked if key not in pinned]
            pinned = step
            memory.pin(step)
        else:
            memory.get(step)
            asked = [key for key in asked if key != step] + ([step] if step not in pinned else [])
        held = {(f"m-{i}", "onnx-fp32") for i in range(len(SIZES)) if memory.peek((f"m-{i}", "onnx-fp32"))}
        others = [key for key in asked if key in held]
        assert pinned <= held
        assert held == pinned | set(others)
        assert others == asked[len(asked) - len(others):], "one that was asked for later went first"
        assert sum(size_of(published, key) for key in held) <= budget or len(others) <= 1
        if len(others) < len(asked) and not isinstance(step, set):  # the next one did not fit
            assert sum(size_of(published, key) for key in held | {asked[-len(others) - 1]}) > budget
        asked = others
        assert all(memory.get(key).predictor.answer(np.zeros((1, 32, 32, 3), np.uint8)).done for key in pinned)
    memory.close()


def test_without_a_budget_the_last_few_stay(published: Path) -> None:
    memory = Memory(published, Meters(), 1)
    for i in range(len(SIZES)):
        memory.get((f"m-{i}", "onnx-fp32"))
    assert [bool(memory.peek((f"m-{i}", "onnx-fp32"))) for i in range(len(SIZES))] == [False] + [True] * KEPT
    memory.close()


def test_the_index_tells_what_went_and_a_request_brings_it_back(root: Path, settings: Settings) -> None:
    app = create_app(dataclasses.replace(settings, loaded_mib=1))
    client: FlaskClient = app.test_client()
    for i in range(3):
        publish_model(root, "colors", f"m-{i}", onnx_fp32=padded(600_000))
    artifacts.promote(root, "colors", "production", 1, "onnx-fp32", by="test")
    until(lambda: client.get("/readyz").status_code == 200)

    def states() -> dict[str, str]:
        return {entry["version"]: entry["state"] for entry in client.post("/v2/repository/index").json}

    def ask(version: int) -> int:
        return client.post(f"/v1/models/colors/predict?version={version}&variant=onnx-fp32", data=png(RED),
                           headers={"Content-Type": "image/png"}).status_code

    for asked, gone in ((2, 3), (3, 2), (2, 3)):
        assert ask(asked) == 200
        assert states() == {"1": "READY", str(asked): "READY", str(gone): "UNAVAILABLE"}
    assert "lanner_loaded_variants 2.0" in client.get("/metrics").text
    app.extensions["lanner"].loaded.close()
