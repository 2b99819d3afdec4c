"""kill -9 at every named point, in the real rooms: every accepted job ends in one terminal state and publishes once."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shared import faults
from shared.artifacts import aliases, open_artifact, versions
from shared.jobs import OptimizeJob, PreprocessJob, TrainJob, new_id
from tests.system.conftest import Stack

pytestmark = pytest.mark.system

# Each point in a room whose way it lies on.
CASES = [
    ("after-pop", "training"), ("mid-decode", "preprocessing"), ("mid-train", "training"),
    ("mid-export", "optimization"), ("before-rename", "preprocessing"), ("after-rename", "training"),
    ("before-record-ends", "preprocessing"), ("before-alias", "optimization"),
]


def test_every_point_has_a_case():
    assert sorted(point for point, _ in CASES) == sorted(faults.POINTS)


@pytest.fixture(scope="module")
def house(tmp_path_factory, valkey_server):
    """A stack with a keeper, a folder to import from, and one Dataset and one Model to start the later stages with."""
    valkey_server.wipe()
    top = tmp_path_factory.mktemp("house")
    (top / "artifacts").mkdir()
    pictures(top / "imports" / "shades")
    stack = Stack(top / "artifacts", valkey_server)
    stack.imports = str(top / "imports")
    stack.keeper()
    for service, kind in (("preprocessing", preprocess()), ("training", None)):
        stack.worker(service, IMPORTS=stack.imports)
        job = kind or train(stack.dataset_id)
        assert stack.ended(stack.accept(job), 120)["state"] == "succeeded"
        if kind:
            stack.dataset_id = job.dataset_id
        else:
            stack.model_id = job.model_id
        stack.stop(service)
    yield stack
    stack.close()


def pictures(folder: Path) -> None:
    """Three classes that a small network tells apart: dark, middle and bright noise, 40 images each."""
    noise = np.random.default_rng(0)
    for level, name in ((40, "dark"), (128, "middle"), (215, "bright")):
        (folder / name).mkdir(parents=True)
        for i in range(40):
            pixels = np.clip(noise.normal(level, 25, (32, 32, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")


def preprocess():
    return PreprocessJob(dataset_id=new_id("d"), name="shades", source="import:shades")


def train(dataset_id):
    return TrainJob(model_id=new_id("m"), dataset_id=dataset_id, name="shades", epochs=2, batch_size=32)


@pytest.mark.parametrize(("point", "service"), CASES)
def test_kill_9_loses_nothing_and_publishes_once(house, point, service):
    match service:
        case "preprocessing":
            job = preprocess()
        case "training":
            job = train(house.dataset_id)
        case _:
            job = OptimizeJob(model_id=house.model_id, name="shades", variants=("onnx-fp32", "litert-fp32"))
    moved = aliases(house.root, "shades").get("production", {}).get("seq", 0)
    house.worker(service, FAULT=point, IMPORTS=house.imports)
    try:
        view = house.ended(house.accept(job), 150)
    finally:
        house.stop(service)
    assert (house.root / ".faults" / point).exists()
    assert (view["state"], view["error"]) == ("succeeded", None)
    died = [a for a in view["attempts"] if "outcome" not in a]
    assert len(died) == (0 if point == "after-pop" else 1)
    if job.target:
        assert open_artifact(house.root, job.target)["id"] == job.target.split("/")[1]
        assert open_artifact(house.root, job.target)["summary"] == view["result"]
    else:
        for variant in job.variants:
            open_artifact(house.root, f"variants/{job.model_id}/{variant}")
        assert versions(house.root, "shades") == {1: job.model_id}
        assert aliases(house.root, "shades")["production"]["seq"] > moved
