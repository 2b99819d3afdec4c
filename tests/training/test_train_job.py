"""TrainJob end to end: what a Model holds, and that a seed makes it repeatable."""

import json
from pathlib import Path

import keras
import numpy as np
import pytest

from shared.artifacts import open_artifact
from shared.jobs import TrainJob
from training.jobs import train

# Keras 3.15 saves variables through an __array__ without NumPy 2's copy keyword.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory, write_dataset, new_attempt) -> Path:
    root = tmp_path_factory.mktemp("published")
    job = TrainJob("m-1", write_dataset(root), "colours", epochs=3)
    train(job, new_attempt(root, job))
    return root / "models" / "m-1"


def test_a_job_publishes_a_whole_model_that_has_learnt(published: Path) -> None:
    manifest = open_artifact(published.parents[1], "models/m-1")
    summary = manifest["summary"]
    assert {"model.keras", "history.json", "confusion.json", "golden.npz"} < set(manifest["files"])
    assert any(name.startswith("logs/events.out.tfevents") for name in manifest["files"])
    assert summary["validation_accuracy"] > 0.9
    assert (summary["model_id"], summary["recipe"], summary["epochs"]) == ("m-1", "small", 3)
    assert manifest["metrics"]["validation_accuracy"] == summary["validation_accuracy"]
    assert manifest["parents"] == {"dataset": "d-300-32-0"}
    assert manifest["spec"] == open_artifact(published.parents[1], "datasets/d-300-32-0")["spec"]
    assert (manifest["recipe"]["epochs"], manifest["recipe"]["batch_size"], manifest["recipe"]["seed"]) == (3, 14, 0)


def test_history_has_an_entry_per_epoch(published: Path) -> None:
    history = json.loads((published / "history.json").read_bytes())
    assert [entry["epoch"] for entry in history] == [1, 2, 3]
    assert {"loss", "accuracy", "validation_loss", "validation_accuracy", "learning_rate", "seconds"} < set(history[0])
    assert history[0]["learning_rate"] > history[-1]["learning_rate"] > 0


def test_the_confusion_matrix_agrees_with_the_accuracy_and_the_recall(published: Path) -> None:
    confusion = json.loads((published / "confusion.json").read_bytes())
    matrix = np.zeros((3, 3), int)
    for true, found, images in confusion["cells"]:
        matrix[true, found] = images
    metrics = open_artifact(published.parents[1], "models/m-1")["metrics"]
    assert confusion["labels"] == ["red", "green", "blue"]
    assert matrix.sum(1).tolist() == [25, 25, 25]
    assert np.trace(matrix) / matrix.sum() == metrics["validation_accuracy"]
    assert confusion["recall"] == (np.diag(matrix) / matrix.sum(1)).tolist() == list(metrics["recall"].values())


def test_the_saved_model_takes_raw_pixels_and_gives_the_golden_probabilities(published: Path) -> None:
    model = keras.models.load_model(published / "model.keras")
    golden = np.load(published / "golden.npz")
    assert (golden["images"].dtype, golden["images"].shape) == (np.uint8, (75, 32, 32, 3))
    assert golden["probabilities"].dtype == np.float32
    np.testing.assert_allclose(golden["probabilities"].sum(1), 1, atol=1e-5)
    np.testing.assert_allclose(model.predict(golden["images"], verbose=0), golden["probabilities"], atol=1e-5)


def test_a_seed_makes_a_training_repeatable(tmp_path: Path, write_dataset, new_attempt) -> None:
    dataset_id = write_dataset(tmp_path, images=120)
    found = []
    for model_id, seed in (("m-1", 7), ("m-2", 7), ("m-3", 8)):
        job = TrainJob(model_id, dataset_id, "colours", epochs=1, seed=seed)
        train(job, new_attempt(tmp_path, job, f"j-{model_id}"))
        found.append(np.load(tmp_path / "models" / model_id / "golden.npz")["probabilities"])
    assert np.array_equal(found[0], found[1])
    assert not np.array_equal(found[0], found[2])
