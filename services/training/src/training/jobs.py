"""Dataset -> Model: what the queue `training` runs."""

import dataclasses
import time
from typing import Any

import numpy as np

from shared.attempt import Attempt, attempt
from shared.augmentation import check_augmentation
from shared.datasets import Dataset
from shared.errors import Refused
from shared.jobs import TrainJob, TuneJob
from training import compiled, recipes
from training.recipes import Recipe, resolve

# What a training imports, for a process that waits for one: none of it touches a GPU.
AHEAD = ("training.auto", "training.fitting", "training.publishing", "training.selection",
         "training.speedrun.fitting")


def run(job_id: str) -> dict[str, Any]:
    return attempt(job_id, body)


def body(job: TrainJob | TuneJob, ctx: Attempt) -> dict[str, Any]:
    with compiled.kept(ctx):
        return tune(job, ctx) if isinstance(job, TuneJob) else train(job, ctx)


def train(job: TrainJob, ctx: Attempt) -> dict[str, Any]:
    """Train the job's recipe on its Dataset and publish models/<model_id>; returns the manifest's summary.

    Raises:
        Refused: an unknown recipe or augmentation, a value that can't work on this Dataset, no GPU under DEVICE=gpu, or
            a training that diverged.
        LannerError: too little memory; the next attempt takes half the batch.
        Stopped, Cancelled: asked to, with a checkpoint in ctx.work.
    """
    began = time.monotonic()
    # Imported here, under the run lock, unless a process has waited with it: TensorFlow takes seconds, on a cold disk
    # more than the keeper waits for an attempt to begin; and a worker that has touched it can't fork.
    from training import auto, device, fitting, publishing, selection, shrinking
    from training.speedrun.fitting import Speedrun

    dataset, replicas = _opened(job, ctx)
    name = device.prepare(ctx.settings)

    def ordinary(recipe: Recipe) -> fitting.Training:
        return fitting.begin(dataset, recipe, job.seed, ctx)

    chosen: tuple[str, ...] = ()
    if job.recipe == "auto":
        job, chosen = auto.decide(job, dataset, ctx, replicas, ordinary, time.monotonic() - began)
    counts = recipes.kept(np.bincount(dataset.labels("train")), job.leave_out)
    recipe = dataclasses.replace(resolve(job, int(counts.sum()), replicas), chosen=chosen)
    if job.leave_out:
        if recipe.network != "speedrun":
            check_augmentation(recipe.augmentation, dataset.spec.size)  # now, and not when the proxy has trained
        whole = dataset
        dataset = selection.select(whole, job, ctx, replicas, lambda recipe, of_proxy: fitting.begin(
            whole, recipe, job.seed, of_proxy))
    recipe = shrinking.shrunk(recipe, ctx.work)
    training: publishing.Trained
    with shrinking.halving(recipe, ctx.work, replicas):
        match recipe.network:
            case "speedrun":
                training = Speedrun(dataset, recipe, job.seed, ctx)
            case _:
                training = ordinary(recipe)
        training.fit()
    summary: dict[str, Any] = publishing.publish_model(training, job, ctx, name)["summary"]
    return summary


def tune(job: TuneJob, ctx: Attempt) -> dict[str, Any]:
    """Try recipes on the job's Dataset and publish the best trial as models/<model_id>; returns its summary.

    Raises as `train`, and
        Refused: no trial came to its end.
    """
    from training import device, fitting, publishing, tuning

    tuning.check(job)
    dataset, replicas = _opened(job, ctx)
    name = device.prepare(ctx.settings)
    search = tuning.Search(job, dataset, ctx, replicas,
                           lambda recipe, of_trial: fitting.begin(dataset, recipe, job.seed, of_trial))
    search.run()
    training = search.training()
    training.fit()
    summary: dict[str, Any] = publishing.publish_model(training, job, ctx, name, search.rows())["summary"]
    return summary


def _opened(job: TrainJob | TuneJob, ctx: Attempt) -> tuple[Dataset, int]:
    """The job's Dataset, and how many GPUs share a batch. Raises Refused where there is nothing to learn from."""
    dataset = Dataset(ctx.root, job.dataset_id)
    images = {split: len(dataset.labels(split)) for split in ("train", "validation")}
    if not all(images.values()):
        raise Refused(f"dataset {dataset.id} has {images['train']} training and {images['validation']} validation "
                      "images: training needs some of both", "no_images")
    return dataset, ctx.settings.gpus_per_training if ctx.settings.device == "gpu" else 1
