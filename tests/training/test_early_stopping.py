"""Early stopping, and which epoch's weights are published."""

import json
from pathlib import Path

import numpy as np
import pytest

from shared.jobs import TrainJob
from training.evaluation import best_epoch
from training.jobs import train

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
    confusion = np.array(json.loads((tmp_path / "models/m-1/confusion.json").read_bytes())["matrix"])
    assert np.trace(confusion) / confusion.sum() == summary["validation_accuracy"]


def test_the_best_epoch_is_the_most_accurate_then_the_surest_then_the_first() -> None:
    def history(*pairs: tuple[float, float]) -> list[dict]:
        return [{"validation_accuracy": accuracy, "validation_loss": loss} for accuracy, loss in pairs]

    assert best_epoch(history((0.5, 1.0), (0.7, 2.0), (0.6, 0.5))) == 1
    assert best_epoch(history((0.7, 1.0), (0.7, 0.9), (0.6, 0.5))) == 1
    assert best_epoch(history((0.7, 1.0), (0.7, 1.0))) == 0
