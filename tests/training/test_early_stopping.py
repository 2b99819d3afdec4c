"""Early stopping, and which epoch's weights are published."""

import json
from pathlib import Path

import numpy as np
import pytest

from shared.datasets import Dataset
from shared.jobs import TrainJob
from training import device, fitting
from training.evaluation import best_epoch
from training.jobs import train
from training.recipes import resolve

# Keras 3.15 saves variables through an __array__ without NumPy 2's copy keyword.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def test_training_stops_after_its_patience_and_publishes_the_best_epoch(tmp_path: Path, write_dataset,
                                                                        new_attempt) -> None:
    job = TrainJob("m-1", write_dataset(tmp_path), "colours", epochs=40, early_stopping=2)
    summary = train(job, new_attempt(tmp_path, job))
    history = json.loads((tmp_path / "models/m-1/history.json").read_bytes())
    found = [entry["validation_accuracy"] for entry in history]
    assert summary["epochs"] == len(found) < 40
    assert max(found[-2:]) <= max(found[:-2]) == summary["validation_accuracy"]
    cells = np.array(json.loads((tmp_path / "models/m-1/confusion.json").read_bytes())["cells"])
    assert cells[cells[:, 0] == cells[:, 1], 2].sum() / cells[:, 2].sum() == summary["validation_accuracy"]


@pytest.mark.parametrize(("recipe", "enough", "last"), [("small", 1000, True), ("small", 10, False),
                                                        ("seed-cnn", 1000, False)])
def test_few_validation_images_choose_no_epoch_where_the_rate_falls_to_the_end(
        tmp_path: Path, write_dataset, new_attempt, monkeypatch, recipe: str, enough: int, last: bool) -> None:
    monkeypatch.setattr(fitting, "FEW_TO_CHOOSE", enough)
    job = TrainJob("m-1", write_dataset(tmp_path, images=48), "colours", recipe, epochs=4, batch_size=12,
                   learning_rate=0.001)
    ctx = new_attempt(tmp_path, job)
    device.prepare(ctx.settings)
    training = fitting.Training(Dataset(tmp_path, job.dataset_id), resolve(job, 36), 0, ctx)
    kept = []
    training.after_epoch = lambda: kept.append(training.best)
    training.fit()
    chosen = 3 if last else best_epoch(training.history)
    assert training.published is training.history[chosen]
    assert all(np.array_equal(a, b) for a, b in zip(training.model.get_weights(), kept[chosen], strict=True))


def test_the_best_epoch_is_the_most_accurate_then_the_surest_then_the_first() -> None:
    def history(*pairs: tuple[float, float]) -> list[dict]:
        return [{"validation_accuracy": accuracy, "validation_loss": loss} for accuracy, loss in pairs]

    assert best_epoch(history((0.5, 1.0), (0.7, 2.0), (0.6, 0.5))) == 1
    assert best_epoch(history((0.7, 1.0), (0.7, 0.9), (0.6, 0.5))) == 1
    assert best_epoch(history((0.7, 1.0), (0.7, 1.0))) == 0
