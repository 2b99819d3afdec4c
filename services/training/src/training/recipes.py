"""Recipes: named hyper-parameters of a training, each with the result it is known for."""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from shared.errors import Refused
from shared.jobs import TrainJob


@dataclass(frozen=True)
class Recipe:
    """Hyper-parameters of one training. Rates are per step, fractions are of the whole training."""

    name: str
    known_result: str
    network: str  # plain, compact, residual, speedrun or mobilenet-v2: networks.build
    optimizer: str  # adam or sgd (Nesterov momentum 0.9): steps.new_optimizer; muon: speedrun.program
    learning_rate: float  # the highest of the schedule
    # constant, falling: linear to zero, triangle: linear up to the highest rate, linear down to zero, or thawing:
    # the highest while frozen, then from a tenth of it linear to zero
    schedule: str
    warmup: float = 0.0
    weight_decay: float = 0.0  # decoupled, on kernels alone
    label_smoothing: float = 0.0
    epochs: int = 5
    batch_size: int = 64
    root_rate: bool = False  # a batch of another size learns at the rate times the root of that proportion
    least_steps: int = 300  # more epochs on a dataset too small for so many
    early_stopping: int = 0  # epochs without a better validation accuracy, 0 for never
    augmentation: dict[str, Any] = field(default_factory=dict)
    class_weights: str = ""  # balanced, or none
    # What a step leaves of the average of the weights, which is then validated and published: steps.Average; 0 for none
    average: float = 0.0
    leave_out: float = 0.0  # of the training images: training.selection
    frozen: float = 0.0  # of the epochs, in which the last layer alone learns
    chosen: tuple[str, ...] = ()  # why, in sentences, where `auto` chose these values

    @property
    def frozen_epochs(self) -> int:
        return math.ceil(self.frozen * self.epochs)


UNKNOWN = "none measured yet"

SEED_CNN = Recipe(
    name="seed-cnn",
    known_result="55.33 % validation accuracy on CIFAR-10 after 5 epochs",
    network="plain",
    optimizer="adam",
    learning_rate=1e-3,
    schedule="constant",
    epochs=5,
    batch_size=64,
    augmentation={"rotation_range": 15, "width_shift_range": 0.1, "height_shift_range": 0.1, "horizontal_flip": True},
)
"""The plain CNN that the idea of this project started from. Known result: 55.33 % validation accuracy on CIFAR-10.

That is the figure it came with. Measured as `small` is below: 56.4 % after one epoch and 166 CPU seconds, at best
70.0 %, 832 CPU seconds for all five epochs.
"""

SMALL = Recipe(
    name="small",
    known_result="79.5 % validation accuracy on CIFAR-10 after 8 epochs, 70 % after 3 to 4",
    network="compact",
    optimizer="sgd",
    learning_rate=0.1,
    schedule="triangle",
    warmup=0.2,
    weight_decay=5e-3,
    label_smoothing=0.1,
    epochs=8,
    batch_size=64,
    augmentation={"width_shift_range": 0.0625, "height_shift_range": 0.0625, "horizontal_flip": True},
)
"""For CPUs of two cores. Known result: 79.5 % validation accuracy on CIFAR-10.

Measured by benchmarks/train_small.py on 40,000 training images recompressed as JPEG (about 3 points harder than the
lossless ones), AMD EPYC with AVX2: past 55.33 % after 38 CPU seconds, past 70 % after 151, done after 306; on two idle
cores about half of that by the clock.
"""

SPEEDRUN = Recipe(
    name="speedrun",
    known_result="88.9 % validation accuracy on CIFAR-10 after 8 epochs, 0.12 s each on an H100",
    network="speedrun",
    optimizer="muon",
    learning_rate=0.24,
    schedule="falling",
    label_smoothing=0.2,
    epochs=8,
    batch_size=2000,
    least_steps=160,
    augmentation={"width_shift_range": 0.0625, "height_shift_range": 0.0625, "horizontal_flip": True},
)
"""For one GPU: a whole training in seconds, after airbench94_muon (github.com/KellerJordan/cifar10-airbench).

Known result: three trainings as jobs on an H100, 40,000 training images recompressed as JPEG; nearly all of such a job
is XLA's compiling, 63 to 68 s, unless it is kept from an earlier one (compiled.py). docs/benchmarks/train.md.
"""

ACCURATE = Recipe(
    name="accurate",
    known_result="93.9 % validation accuracy on CIFAR-10 after 80 epochs, 0.84 s each on an H100",
    network="residual",
    optimizer="sgd",
    learning_rate=0.4,
    schedule="triangle",
    warmup=0.1,
    weight_decay=1e-2,
    label_smoothing=0.1,
    epochs=80,
    batch_size=512,
    root_rate=True,
    least_steps=1000,
    augmentation={"width_shift_range": 0.125, "height_shift_range": 0.125, "horizontal_flip": True, "cutout": 0.375},
    average=0.995,
)
"""For GPUs: the highest accuracy in minutes.

Known result: the mean of three trainings as jobs on an H100, 45,000 training images recompressed as JPEG (about 3
points harder than the lossless ones), 5,000 held out; 94.1 % with views; 117 to 121 s a job, of which 38 to 42 are
XLA's compiling. docs/benchmarks/train.md.
"""

TRANSFER = Recipe(
    name="transfer",
    known_result=UNKNOWN,
    network="mobilenet-v2",
    optimizer="adam",
    learning_rate=1e-3,
    schedule="thawing",
    label_smoothing=0.1,
    epochs=10,
    batch_size=32,
    augmentation={"width_shift_range": 0.1, "height_shift_range": 0.1, "zoom_range": 0.1, "horizontal_flip": True},
    frozen=0.3,
)
"""For few photographs: a network that knows ImageNet learns their classes, first its last layer, then all of it."""

RECIPES = {recipe.name: recipe for recipe in (SEED_CNN, SMALL, SPEEDRUN, ACCURATE, TRANSFER)}
THAWED = 0.1  # times the highest rate, once all of a network learns
STEPS_A_EPOCH = 16


def resolve(job: TrainJob, images: int, replicas: int = 1) -> Recipe:
    """The recipe of a job over `images` training images, the job's own values in place of the recipe's.

    What the job leaves open is fitted to a small dataset: batches small enough for 16 steps an epoch, and epochs enough
    for the recipe's least number of steps. A batch that does not divide by `replicas`, the GPUs, is made smaller until
    it does.

    Raises:
        Refused: the recipe is unknown, or the batch is larger than the training split or smaller than the replicas.
    """
    recipe = RECIPES.get(job.recipe)
    if recipe is None:
        raise Refused(f"recipe {job.recipe!r} is unknown: expected one of {', '.join(RECIPES)}, or auto",
                      "unknown_recipe")
    if job.batch_size > images:
        raise Refused(f"batch_size is {job.batch_size}, but the training split has {images} images: "
                      "ask for a smaller batch, or 0 to let the recipe choose", "bad_batch_size")
    batch = job.batch_size or min(recipe.batch_size, images, max(8, images // STEPS_A_EPOCH))
    if batch < replicas:
        raise Refused(f"a batch of {batch} can't be shared by {replicas} GPUs: ask for a batch_size of at least "
                      f"{replicas}, or set GPUS_PER_TRAINING lower", "bad_batch_size")
    batch -= batch % replicas
    epochs = job.epochs or max(recipe.epochs, -(-recipe.least_steps // (images // batch)))
    rate = recipe.learning_rate * (math.sqrt(batch / recipe.batch_size) if recipe.root_rate else 1)
    return dataclasses.replace(
        recipe, batch_size=batch, epochs=epochs, learning_rate=job.learning_rate or rate,
        augmentation=job.augmentation or recipe.augmentation,
        early_stopping=job.early_stopping or recipe.early_stopping,
        class_weights=job.class_weights or recipe.class_weights, leave_out=job.leave_out)


def kept(counts: np.ndarray, leave_out: float) -> np.ndarray:
    """Images of each class that a training learns from, int [K], of those that there are."""
    return counts - (leave_out * counts).astype(int)


def learning_rate(recipe: Recipe, step: int, of: int) -> float:
    """The rate of step `step` (from 0) of `of`."""
    match recipe.schedule:
        case "constant":
            return recipe.learning_rate
        case "falling":
            return recipe.learning_rate * (1 - step / of)
        case "triangle":
            rising = max(1.0, recipe.warmup * of)
            return recipe.learning_rate * min((step + 1) / rising, (of - step) / max(1.0, of - rising))
        case "thawing":
            frozen = of * recipe.frozen_epochs // recipe.epochs
            return recipe.learning_rate * (1 if step < frozen else THAWED * (of - step) / (of - frozen))
        case other:
            raise ValueError(f"schedule {other!r} of recipe {recipe.name} is unknown: "
                             "expected constant, falling, triangle or thawing")
