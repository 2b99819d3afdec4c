"""A training too large for the memory: its next attempt takes batches of half the size."""

import dataclasses
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import tensorflow as tf

from shared import disk
from shared.artifacts import read_json, write_json
from shared.errors import LannerError, Refused
from training.recipes import Recipe

LEFT = "batch.json"  # in a job's work folder: the batch that its next attempt takes
LEAST = 8  # images of a batch


def shrunk(recipe: Recipe, work: Path) -> Recipe:
    """The recipe with the batch that attempts which had too little memory have left.

    Its rate falls with the batch, as the root of it with Adam and where the recipe says so, else in proportion: Goyal
    et al., Accurate, Large Minibatch SGD, 2017, section 2.1; Malladi et al., On the SDEs and Scaling Rules for Adaptive
    Gradient Algorithms, NeurIPS 2022.
    """
    batch = _left(work)
    if not 0 < batch < recipe.batch_size:
        return recipe
    share = batch / recipe.batch_size
    rate = recipe.learning_rate * (math.sqrt(share) if recipe.root_rate or recipe.optimizer == "adam" else share)
    says = f"batch {batch}: {recipe.batch_size} images at once need more memory than there was"
    return dataclasses.replace(recipe, batch_size=batch, learning_rate=rate, chosen=(*recipe.chosen, says))


def _left(work: Path) -> int:
    return int(read_json(work / LEFT)["batch_size"]) if (work / LEFT).exists() else 0


@contextmanager
def halving(recipe: Recipe, work: Path, replicas: int) -> Iterator[None]:
    """Have the next attempt take half the batch where this one has too little memory.

    Raises:
        LannerError: (out_of_memory) it had; the job is tried again.
        Refused: (out_of_memory) the batch can't be made smaller, and it was the second time.
    """
    try:
        yield
    except (tf.errors.ResourceExhaustedError, MemoryError) as e:
        if any(said in str(e) for said in disk.SAID):  # TensorFlow calls that so, too
            raise
        half = recipe.batch_size // 2
        half -= half % replicas
        if recipe.network == "speedrun" or half < max(LEAST, replicas):
            if _left(work) != recipe.batch_size:  # others may have had the memory just then
                write_json(work / LEFT, {"batch_size": recipe.batch_size})
                raise LannerError(f"a batch of {recipe.batch_size} images needs more memory than there was just now",
                                  "out_of_memory") from e
            raise Refused(f"a batch of {recipe.batch_size} images needs more memory than there is, and recipe "
                          f"{recipe.name} takes no smaller one: prepare smaller images, or take another recipe",
                          "out_of_memory") from e
        write_json(work / LEFT, {"batch_size": half})
        raise LannerError(f"a batch of {recipe.batch_size} images needs more memory than there is: the next attempt "
                          f"takes {half}", "out_of_memory") from e
