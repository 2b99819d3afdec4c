"""The recipe `auto`: recipe, batch, epochs, augmentation and class weights from the dataset, the device and a budget.

`choose` and `fitted` only reckon; `measure` takes the time of a few steps; `decide` puts them together, once a job.
Every choice comes with the sentence that a user reads in the Model's recipe and on its card.
"""

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

from shared.artifacts import read_json, write_json
from shared.attempt import Attempt
from shared.datasets import Dataset
from shared.intervals import wilson
from shared.jobs import TrainJob
from training import device
from training.fitting import Training
from training.recipes import RECIPES, Recipe, kept, resolve

# `accurate` was measured on one GPU, at so many pixels a side, where it took 6.5 GiB beside the images.
RUN_AT, ROOM = 32, 12 << 30
MANY = 10_000  # training images from which on it is worth its minutes: judged, not measured
PATIENT_S = 180  # of a budget for `accurate`: of CIFAR-10 it took 117 to 121 s on an H100, 38 to 42 of them to compile
FEW = 100  # images a class, under which augmentation is strong
UNEVEN = 3  # times the smallest class that the largest has, from which on classes are weighed
WIDE = 0.05  # half a 95 % interval of the validation accuracy that is worth a word
STRONG = {"horizontal_flip": True, "width_shift_range": 0.1, "height_shift_range": 0.1, "rotation_range": 15,
          "zoom_range": 0.2, "cutout": 0.25}
PROBE_S = 2.0  # of steps, after the first
SHARE = 0.9  # of the budget; the rest is for checkpoints, the last validation and publishing
MOST = 4  # times the usual epochs that a budget may ask for
DECISION = "auto.json"

Said = tuple[dict[str, Any], tuple[str, ...]]  # fields of the job, and why


@dataclass(frozen=True)
class Facts:
    """What a choice is made from. counts: training images by class; size: pixels a side; memory: bytes of each GPU."""

    counts: tuple[int, ...]
    validation: int
    size: int
    device: str
    replicas: int = 1
    memory: int = 0

    @property
    def images(self) -> int:
        return sum(self.counts)


@dataclass(frozen=True)
class Pace:
    """Seconds of a training's first call, which compiles, of a step after that, and of a validation."""

    first: float
    step: float
    validation: float


def choose(job: TrainJob, facts: Facts) -> Said:
    """Values for what `job` leaves open, epochs aside unless no budget is given, and a sentence for each.

    Raises:
        Refused: a value that the job gives itself can't work, as `recipes.resolve`.
    """
    present = [count for count in facts.counts if count]
    usual, least, most = int(median(present)), min(present), max(present)
    name, reason = _of_recipe(job, facts, usual)
    why = [reason]
    fields: dict[str, Any] = {"recipe": name}
    if not job.augmentation and usual < FEW:
        fields["augmentation"] = STRONG
        why.append(f"strong augmentation ({', '.join(STRONG)}): a class has {usual} images (the median), under {FEW}; "
                   "recipe transfer is meant for so few, where its weights are at hand, and is not measured yet")
    elif not job.augmentation:
        why.append(f"the recipe's own augmentation: a class has {usual} images (the median), {FEW} or more")
    if not job.class_weights and most >= UNEVEN * least:
        fields["class_weights"] = "balanced"
        why.append(f"balanced classes: the largest has {most} images, the smallest {least}")
    recipe = resolve(dataclasses.replace(job, **fields), facts.images, facts.replicas)
    if not job.batch_size:
        fields["batch_size"] = recipe.batch_size
        why.append(_of_batch(recipe, facts))
    if not job.epochs and not job.budget_s:
        fields["epochs"] = recipe.epochs
        steps = recipe.epochs * (facts.images // recipe.batch_size)
        why.append(f"{_epochs(recipe.epochs)}, {steps} steps of {facts.size} x {facts.size} pixels: " +
                   ("as many as the recipe is known for" if recipe.epochs == RECIPES[recipe.name].epochs
                    else f"{facts.images} images are few, and it takes {recipe.least_steps} steps at least"))
    low, high = wilson(facts.validation // 2, facts.validation)
    if (high - low) / 2 > WIDE:
        end = "" if recipe.early_stopping else ", and the last epoch is published instead of the luckiest"
        why.append(f"mind that {facts.validation} validation images are few: an accuracy from them is right to "
                   f"{50 * (high - low):.0f} points or so{end}")
    return fields, tuple(why)


def _of_recipe(job: TrainJob, facts: Facts, usual: int) -> tuple[str, str]:
    """usual: images of a class, the median."""
    if facts.device == "cpu":
        return "small", "recipe small: the best proven one on a CPU"
    against = {
        f"{facts.images} images are fewer than {MANY}": facts.images < MANY,
        f"a class has {usual} images (the median), under {FEW}": usual < FEW,
        f"a budget of {job.budget_s:g} s is less than {PATIENT_S}": 0 < job.budget_s < PATIENT_S,
        f"it was not run at {facts.size} pixels, only at {RUN_AT}": facts.size != RUN_AT,
        f"it was not run on {facts.replicas} GPUs, only on one": facts.replicas > 1,
        f"{facts.memory >> 30} GiB of the GPU are less than {ROOM >> 30}": facts.memory < ROOM,
    }
    if reasons := [text for text, holds in against.items() if holds]:
        return "small", f"recipe small, and not accurate, which is better on a GPU where it fits: {'; '.join(reasons)}"
    return "accurate", (f"recipe accurate: a GPU of {ROOM >> 30} GiB or more, {facts.images} images of {RUN_AT} "
                        f"pixels, {MANY} or more, and a budget of {PATIENT_S} s or more, or none; it was measured on "
                        "CIFAR-10, and how many images it takes was judged")


def _of_batch(recipe: Recipe, facts: Facts) -> str:
    known = RECIPES[recipe.name].batch_size
    if recipe.batch_size == known:
        return f"batches of {known}: what the recipe's learning rate is known to suit"
    if recipe.batch_size > known - facts.replicas:
        return f"batches of {recipe.batch_size}: the recipe's {known}, shared evenly by {facts.replicas} GPUs"
    return f"batches of {recipe.batch_size}: {facts.images} images are few, and an epoch should have several steps"


def _epochs(count: int) -> str:
    return "1 epoch" if count == 1 else f"{count} epochs"


def fitted(budget_s: float, spent_s: float, pace: Pace, steps_an_epoch: int, usual: int) -> tuple[int, str]:
    """How many epochs the rest of a budget has room for, 1 to MOST times the usual, and why so many."""
    an_epoch = steps_an_epoch * pace.step + pace.validation
    left = SHARE * budget_s - spent_s - pace.first - pace.validation
    fit = int(left / an_epoch)
    epochs = max(1, min(fit, MOST * usual))
    measured = (f"{1000 * pace.step:.3g} ms a step measured here, {an_epoch:.3g} s an epoch, "
                f"{max(left, 0):.3g} s left of the budget of {budget_s:g} s")
    if fit < 1:
        return epochs, f"1 epoch, which will take longer than the budget: {measured}"
    if fit > epochs:
        return epochs, (f"{_epochs(epochs)}, {MOST} times the recipe's, though the budget has room for more: "
                        f"{measured}")
    return epochs, f"{_epochs(epochs)}: {measured}"


def measure(training: Training, most_s: float = PROBE_S) -> Pace:
    """The pace of a throw-away training, which is worth nothing after that. Reads random images, as training does."""
    run, count = training.new_run(), 1
    count = min(training.steps_a_call, training.steps_an_epoch)
    rows = np.random.default_rng(0)

    def call() -> float:
        chosen = np.stack([rows.integers(0, len(training.images), training.recipe.batch_size) for _ in range(count)])
        began = time.monotonic()
        float(run(chosen, np.zeros(count, np.float32), 0)[-1])  # read, since a GPU answers before it is done
        return time.monotonic() - began

    first, seconds, end = call(), [call()], time.monotonic() + most_s
    while time.monotonic() < end or len(seconds) < 3:
        seconds.append(call())
    images = training.dataset.images("validation")
    part = images[:2048]
    training.predict(part[:1])
    began = time.monotonic()
    training.predict(part)
    return Pace(first, median(seconds) / count, (time.monotonic() - began) * len(images) / len(part))


def decide(job: TrainJob, dataset: Dataset, ctx: Attempt, replicas: int, begin: Callable[[Recipe], Training],
           spent_s: float) -> tuple[TrainJob, tuple[str, ...]]:
    """The job with its values chosen, and why. An attempt after the first takes what the first has decided.

    begin: makes a training by a recipe, for the probe; spent_s: of the budget, before this call.
    """
    path = ctx.work / DECISION
    if path.exists():
        decision = read_json(path)
        return dataclasses.replace(job, **decision["fields"]), tuple(decision["why"])
    began = time.monotonic()
    counts = kept(np.bincount(dataset.labels("train"), minlength=len(dataset.spec.labels)), job.leave_out)
    facts = Facts(tuple(counts.tolist()), len(dataset.labels("validation")), dataset.spec.size, ctx.settings.device,
                  replicas, device.memory_bytes(ctx.settings) if ctx.settings.device == "gpu" else 0)
    fields, why = choose(job, facts)
    chosen = dataclasses.replace(job, **fields)
    if job.budget_s:
        ctx.report("measure the pace", 0, 1)
        recipe = resolve(chosen, facts.images, replicas)
        pace = measure(begin(recipe))
        fields["epochs"], reason = fitted(job.budget_s, spent_s + time.monotonic() - began, pace,
                                          facts.images // recipe.batch_size, recipe.epochs)
        chosen, why = dataclasses.replace(chosen, epochs=fields["epochs"]), (*why, reason)
    write_json(path, {"fields": fields, "why": why})
    ctx.report("choose", 1, 1, recipe=chosen.recipe, epochs=chosen.epochs, batch_size=chosen.batch_size,
               why="; ".join(why))
    return chosen, why
