"""Dataset -> Model: what the queue `training` runs."""

from typing import Any

from shared.attempt import Attempt, attempt
from shared.datasets import Dataset
from shared.errors import Refused
from shared.jobs import TrainJob
from training.recipes import resolve


def run(job_id: str) -> dict[str, Any]:
    return attempt(job_id, train)


def train(job: TrainJob, ctx: Attempt) -> dict[str, Any]:
    """Train the job's recipe on its Dataset and publish models/<model_id>; returns the manifest's summary.

    Raises:
        Refused: an unknown recipe or augmentation, a value that can't work on this Dataset, no GPU under DEVICE=gpu, or
            a training that diverged.
        Stopped, Cancelled: asked to, with a checkpoint in ctx.work.
    """
    # Imported here, under the run lock: TensorFlow takes seconds, on a cold disk more than the keeper waits for an
    # attempt to begin; and a worker that has touched it can't fork.
    from training import augmentation, device, fitting, publishing
    from training.speedrun.fitting import Speedrun

    dataset = Dataset(ctx.root, job.dataset_id)
    images = {split: len(dataset.labels(split)) for split in ("train", "validation")}
    if not all(images.values()):
        raise Refused(f"dataset {dataset.id} has {images['train']} training and {images['validation']} validation "
                      "images: training needs some of both", "no_images")
    replicas = ctx.settings.gpus_per_training if ctx.settings.device == "gpu" else 1
    recipe = resolve(job, images["train"], replicas)
    name = device.prepare(ctx.settings)
    training: publishing.Trained
    match recipe.network:
        case "speedrun":
            training = Speedrun(dataset, recipe, job.seed, ctx)
        case _:
            augmentation.check(recipe.augmentation, dataset.spec.size)
            training = fitting.Training(dataset, recipe, job.seed, ctx, device.precision(ctx.settings),
                                        device.strategy())
    training.fit()
    summary: dict[str, Any] = publishing.publish_model(training, job, ctx, name)["summary"]
    return summary
