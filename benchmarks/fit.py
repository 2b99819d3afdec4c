"""Seconds an epoch: our steps against a plain `model.fit` of the same network, batch and images, in turns.

    python benchmarks/fit.py [--device gpu|cpu] [--images 40000] [--rounds 3] [--out fit.json]

`model.fit` as keras.io's guide "Training & evaluation with the built-in methods" shows it: NumPy arrays, shuffled, no
augmentation, jit_compile as Keras chooses. Ours augments as its recipe says. Images are random: an epoch's time does
not depend on them. The first epoch of each (tracing, compiling) is told apart; no validation in either.
"""

import argparse
import dataclasses
import json
import statistics
import time

import keras
import numpy as np
import tensorflow as tf

from shared.datasets import Spec
from shared.settings import Settings
from training import device, networks
from training.recipes import RECIPES, Recipe
from training.steps import fed, new_optimizer, new_step, resident

SPEC = Spec(32, tuple("abcdefghij"), (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="gpu", choices=["gpu", "cpu"])
    parser.add_argument("--images", type=int, default=40_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=0, help="0: as the recipe says")
    parser.add_argument("--out", default="fit.json")
    args = parser.parse_args()
    device.prepare(Settings(device=args.device))
    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (args.images, 32, 32, 3), np.uint8)
    labels = rng.integers(0, 10, args.images).astype(np.int32)
    rows = []
    for recipe in RECIPES.values():
        batch = args.batch or recipe.batch_size
        sides = {"model.fit": plain(recipe, images, labels, batch), "lanner": ours(recipe, images, labels, batch, args)}
        first = {name: timed(epoch) for name, epoch in sides.items()}
        times = {name: [] for name in sides}
        for number in range(args.rounds):
            for name in list(sides)[:: 1 if number % 2 == 0 else -1]:
                times[name].append(timed(sides[name]))
        middle = {name: statistics.median(t) for name, t in times.items()}
        ratio = middle["lanner"] / middle["model.fit"]
        rows.append({"recipe": recipe.name, "batch": batch, "first": first, "epochs": times, "ratio": ratio})
        told = "  ".join(f"{name} {middle[name]:.2f} s (first {first[name]:.1f})" for name in sides)
        print(f"{recipe.name:10} batch {batch:4}  {told}  ratio {ratio:.2f}", flush=True)
    result = {"tensorflow": tf.__version__, "keras": keras.__version__, "device": args.device, "rows": rows}
    with open(args.out, "w") as f:
        json.dump(result, f, indent=1)


def timed(epoch) -> float:
    began = time.perf_counter()
    epoch()
    return time.perf_counter() - began


def plain(recipe: Recipe, images: np.ndarray, labels: np.ndarray, batch: int):
    """One epoch of model.fit."""
    model = networks.build(recipe, SPEC)
    model.compile(new_optimizer(recipe, model), "sparse_categorical_crossentropy", metrics=["accuracy"])
    pixels = images.astype(np.float32)
    return lambda: model.fit(pixels, labels, batch_size=batch, epochs=1, verbose=0)


def ours(recipe: Recipe, images: np.ndarray, labels: np.ndarray, batch: int, args: argparse.Namespace):
    """One epoch as training.fitting runs it."""
    recipe = dataclasses.replace(recipe, batch_size=batch)
    model = networks.build(recipe, SPEC)
    gpu = args.device == "gpu"
    totals = tf.Variable(tf.zeros([2], tf.float64))
    step = new_step(model, new_optimizer(recipe, model), recipe, SPEC, 0, totals, xla=gpu)
    steps = len(images) // batch
    run = resident(step, images, labels, steps, xla=True) if gpu else fed(step, images, labels)

    def epoch() -> None:
        order = np.random.default_rng(0).permutation(len(images))[:steps * batch].reshape(steps, batch)
        run(order, np.full(steps, recipe.learning_rate, np.float32), 0)
        totals.numpy()

    return epoch


if __name__ == "__main__":
    main()
