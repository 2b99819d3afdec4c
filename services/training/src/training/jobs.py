"""Dataset -> Model. Imported in the worker's forked child alone: TensorFlow must not run in its parent."""

import os
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from shared.attempt import Attempt, attempt  # noqa: E402  (TensorFlow reads the variable when it is imported)
from shared.datasets import Dataset  # noqa: E402
from shared.errors import Refused  # noqa: E402
from shared.jobs import TrainJob  # noqa: E402
from training import augmentation, device, fitting, publishing  # noqa: E402
from training.recipes import resolve  # noqa: E402


def run(job_id: str) -> dict[str, Any]:
    return attempt(job_id, train)


def train(job: TrainJob, ctx: Attempt) -> dict[str, Any]:
    """Train the job's recipe on its Dataset and publish models/<model_id>; returns the manifest's summary.

    Raises:
        Refused: an unknown recipe or augmentation, a value that can't work on this Dataset, no GPU under DEVICE=gpu, or
            a training that diverged.
        Stopped, Cancelled: asked to, with a checkpoint in ctx.work.
    """
    dataset = Dataset(ctx.root, job.dataset_id)
    images = {split: len(dataset.labels(split)) for split in ("train", "validation")}
    if not all(images.values()):
        raise Refused(f"dataset {dataset.id} has {images['train']} training and {images['validation']} validation "
                      "images: training needs some of both", "no_images")
    recipe = resolve(job, images["train"])
    augmentation.check(recipe.augmentation, dataset.spec.size)
    name = device.prepare(ctx.settings)
    training = fitting.Training(dataset, recipe, job.seed, ctx)
    training.fit()
    summary: dict[str, Any] = publishing.publish_model(training, job, ctx, name)["summary"]
    return summary
