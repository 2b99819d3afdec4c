"""The Model folder: weights, history, confusion matrix, logs and the golden batch, checked by reloading, published."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any, Protocol

import keras
import numpy as np

from shared.artifacts import Manifest, publish, stage, write_bytes, write_json
from shared.attempt import Attempt
from shared.datasets import Dataset
from shared.errors import LannerError
from shared.intervals import wilson
from shared.jobs import TrainJob, TuneJob
from training.evaluation import Predict, confusion, new_predict
from training.recipes import Recipe

GOLDEN = 256
RELOADED = 1e-5  # largest difference of a probability after saving and loading the same float32 weights


class Trained(Protocol):
    """What is published of a training that has been fitted."""

    dataset: Dataset
    recipe: Recipe
    seed: int
    ctx: Attempt
    precision: str
    history: list[dict[str, Any]]
    model: keras.Model
    predict: Predict

    @property
    def published(self) -> dict[str, Any]:
        """The history's entry of the epoch that `model` has the weights of; views_accuracy in it where asked for."""
        ...

    def fit(self) -> None: ...


def publish_model(training: Trained, job: TrainJob | TuneJob, ctx: Attempt, device: str,
                  trials: list[dict[str, Any]] | None = None) -> Manifest:
    """Write models/<model_id> whole or not at all; returns its manifest. `trials`: those it is the best of.

    Raises:
        LannerError: the saved model answers other than the trained one.
    """
    ctx.report("publish", 0, 1)
    staging = stage(ctx.root, ctx.job_id)
    try:
        manifest = _write(staging, training, job, device)
        if trials is not None:
            write_json(staging / "trials.json", trials)
            manifest["summary"]["trials"] = len(trials)
        manifest = publish(ctx.root, staging, job.target, manifest)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    ctx.report("publish", 1, 1)
    return manifest


def _write(staging: Path, training: Trained, job: TrainJob | TuneJob, device: str) -> Manifest:
    dataset, labels = training.dataset, list(training.dataset.spec.labels)
    images, truth = dataset.images("validation"), dataset.labels("validation")
    best = training.published
    cells, recall = confusion(training.predict(images).argmax(1), truth, len(labels))

    training.model.save(staging / "model.keras")
    write_json(staging / "history.json", training.history)
    write_bytes(staging / "confusion.json", json.dumps({"labels": labels, "cells": cells, "recall": recall}).encode())
    shutil.copytree(training.ctx.work / "logs", staging / "logs")
    _write_golden(staging, training, images)

    seconds = round(sum(entry["seconds"] for entry in training.history), 1)
    right = round(best["validation_accuracy"] * len(truth))
    metrics = {"validation_accuracy": best["validation_accuracy"],
               "validation_interval": list(wilson(right, len(truth))), "validation_loss": best["validation_loss"],
               "recall": dict(zip(labels, recall, strict=True))}
    if "views_accuracy" in best:
        metrics["views_accuracy"] = best["views_accuracy"]
    return {
        "name": job.name,
        "parents": {"dataset": dataset.id},
        "spec": dataset.spec.to_json(),
        "recipe": {**dataclasses.asdict(training.recipe), "seed": training.seed},
        "metrics": metrics,
        "device": device,
        "precision": training.precision,
        "seconds": seconds,
        "summary": {"model_id": job.model_id, "name": job.name, "recipe": training.recipe.name,
                    "epochs": len(training.history),
                    "validation_accuracy": best["validation_accuracy"], "seconds": seconds,
                    **({"chosen": list(training.recipe.chosen)} if training.recipe.chosen else {})},
    }


def _write_golden(staging: Path, training: Trained, images: np.ndarray) -> None:
    """golden.npz: images uint8 [<=256, S, S, 3] from all over the validation split, the reloaded model's answers."""
    chosen = np.ascontiguousarray(images[np.linspace(0, len(images) - 1, min(GOLDEN, len(images))).astype(int)])
    reloaded: Any = keras.models.load_model(staging / "model.keras", compile=False)
    got = new_predict(reloaded)(chosen)
    off = float(np.abs(got - training.predict(chosen)).max())
    if not off <= RELOADED:
        raise LannerError(f"model.keras answers other than the trained network, off by {off:.2g} where {RELOADED:g} is "
                          "allowed: the save is broken", "broken_save")
    np.savez(staging / "golden.npz", images=chosen, probabilities=got)
