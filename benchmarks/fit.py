"""Seconds an epoch: our steps against a plain `model.fit` of the same network, batch and images, in turns.

    ./run bench fit [--device gpu|cpu] [--images 40000] [--rounds 5] [--batch 0] [--out fit.json]
    ./run bench fit --fed [--size 64]            beside it images sent from the host, as if larger than the GPU
    ./run bench fit --explore [--seconds 480]    other ways to run the steps beside it, until the time is spent
    ./run bench fit --profile                    what the GPU did in an epoch: kernels a step, their time, the longest

`model.fit` as keras.io's guide "Training & evaluation with the built-in methods" shows it: NumPy arrays, shuffled, no
augmentation, float32, jit_compile as Keras chooses. Ours augments as its recipe says and computes in what a training on
this device would (MIXED_PRECISION=auto). Images are random: an epoch's time does not depend on them. The first epoch of
each (tracing, compiling) is told apart; no validation in either.
"""

import argparse
import dataclasses
import json
import math
import os
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import tensorflow as tf

from shared.datasets import Spec
from shared.settings import Settings
from training import device, networks
from training.fitting import AHEAD, FED_CALL
from training.recipes import RECIPES, Recipe
from training.steps import Average, Run, Step, fed, new_optimizer, new_step, resident

SPEC = Spec(32, tuple("abcdefghij"), (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))  # of --size pixels a side
AIM = 0.5
Epoch = Callable[[], object]


@dataclasses.dataclass(frozen=True)
class Way:
    """How steps are run. program: `resident` as a training on a GPU does, `known` the same with the number of steps
    compiled in, `looped` a program a step in a TensorFlow loop, `fed` from the host as on a CPU."""

    program: str = "resident"
    xla: bool = True
    precision: str = ""  # as this device's trainings
    steps: int = 0  # a call, 0 for an epoch
    batch: int = 0  # as the recipe, or --batch
    ahead: int = AHEAD  # batches that `fed` reads ahead on a GPU
    mapped: bool = False  # `fed` reads a file that is mapped into memory, as a Dataset's is
    reshaped: bool = False  # pools as the largest over axes of a reshaped map, whose gradient XLA need not scatter


FED = {
    "fed": Way("fed", mapped=True),
    "fed, nothing ahead": Way("fed", mapped=True, ahead=0),
    "fed from memory": Way("fed"),
}
EXPLORED = {
    "float32": Way(precision="float32"),
    "200 steps a call": Way(steps=200),
    "50 steps a call": Way(steps=50),
    "steps compiled in": Way("known"),
    "a program a step": Way("looped"),
    "pools reshaped": Way(reshaped=True),
    "without XLA": Way(xla=False),
    "batch 256": Way(batch=256),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="gpu", choices=["gpu", "cpu"])
    parser.add_argument("--images", type=int, default=40_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--recipes", default=",".join(RECIPES))
    parser.add_argument("--batch", type=int, default=0, help="0: as the recipe says")
    parser.add_argument("--size", type=int, default=32, help="pixels a side")
    parser.add_argument("--fed", action="store_true")
    parser.add_argument("--explore", action="store_true")
    parser.add_argument("--seconds", type=float, default=480, help="no further way is begun after so many")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("fit.json"))
    args = parser.parse_args()
    settings = Settings(device=args.device)
    device.prepare(settings)
    tf.config.experimental.enable_tensor_float_32_execution(True)  # TensorFlow's default, which `model.fit` would have
    keras.utils.set_random_seed(0)
    began = time.monotonic()
    bench = Bench(args, device.precision(settings))
    own = Way() if args.device == "gpu" else Way("fed", xla=False)
    result: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"), "tensorflow": tf.__version__, "keras": keras.__version__,
        "device": args.device, "precision": bench.precision, "images": args.images, "size": args.size,
        "xla_flags": os.environ.get("XLA_FLAGS", ""), "rows": []}
    recipes = args.recipes.split(",")
    for number, name in enumerate(recipes, 1):
        ways = {"lanner": own, **(FED if args.fed else {}), **(EXPLORED if args.explore else {})}
        rows = bench.compare(RECIPES[name], ways, until=began + args.seconds * number / len(recipes))
        result["rows"] += rows
        args.out.write_text(json.dumps(result, indent=1) + "\n")
        for row in rows:
            print(line(row), *row.get("profile", []), sep="\n    ", flush=True)
    print("\n" + HEAD)
    for row in result["rows"]:
        print(line(row))
    ratios = {row["recipe"]: row.get("ratio", math.inf) for row in result["rows"] if row["way"] == "lanner"}
    missed = [name for name, ratio in ratios.items() if ratio > AIM]
    print(f"aim: at most {AIM} of model.fit: " + (f"missed by {', '.join(missed)}" if missed else "met"))


HEAD = f"{'recipe':10} {'':18} {'batch':>5} {'first s':>8} {'epoch s':>8} {'ms a step':>9} {'ratio':>6}"


def line(row: dict[str, Any]) -> str:
    """A row of the table under HEAD."""
    if "error" in row:
        return f"{row['recipe']:10} {row['way']:18} failed: {row['error']}"
    return (f"{row['recipe']:10} {row['way']:18} {row['batch']:5} {row['first']:8.1f} {row['median']:8.3f} "
            f"{row['ms_a_step']:9.3f} {row['ratio']:6.2f}")


class Bench:
    """The images, and one recipe's ways after another over them."""

    def __init__(self, args: argparse.Namespace, precision: str):
        rng = np.random.default_rng(0)
        self.args, self.precision = args, precision
        self.spec = dataclasses.replace(SPEC, size=args.size)
        self.images = rng.integers(0, 256, (args.images, args.size, args.size, 3), np.uint8)
        self.labels = rng.integers(0, 10, args.images).astype(np.int32)

    def compare(self, recipe: Recipe, ways: dict[str, Way], until: float) -> list[dict[str, Any]]:
        """A row each for model.fit and each way, epochs in turns; ways not begun in time are left out."""
        batch = self.args.batch or recipe.batch_size
        sides: dict[str, Epoch] = {"model.fit": self.plain(recipe, batch)}
        batches, first = {"model.fit": batch}, {"model.fit": timed(sides["model.fit"])}
        rows = []
        for name, way in ways.items():
            if time.monotonic() > until and name != "lanner":
                continue
            try:
                batches[name] = min(way.batch or batch, len(self.images))
                epoch = self.ours(dataclasses.replace(recipe, batch_size=batches[name]), way)
                first[name] = timed(epoch)
                sides[name] = epoch
                print(f"{recipe.name}, {name}: first epoch {first[name]:.1f} s", flush=True)
            except Exception as e:  # one way that fails is a line of the result, not its end
                rows.append({"recipe": recipe.name, "way": name, "error": f"{type(e).__name__}: {e}"[:2000]})
        times: dict[str, list[float]] = {name: [] for name in sides}
        for number in range(self.args.rounds):
            for name in list(sides)[:: 1 if number % 2 == 0 else -1]:
                times[name].append(timed(sides[name]))
        middle = {name: statistics.median(t) for name, t in times.items()}
        rows += [{"recipe": recipe.name, "way": name, "batch": batches[name], "first": first[name],
                  "epochs": times[name], "median": middle[name], "ratio": middle[name] / middle["model.fit"],
                  "ms_a_step": 1000 * middle[name] / (len(self.images) // batches[name])} for name in sides]
        if self.args.profile:
            for row in (row for row in rows if row["way"] in sides):
                row["profile"] = profiled(sides[row["way"]], len(self.images) // row["batch"])
        return rows

    def plain(self, recipe: Recipe, batch: int) -> Epoch:
        """One epoch of model.fit."""
        model = networks.build(recipe, self.spec)
        model.compile(new_optimizer(recipe, model), "sparse_categorical_crossentropy", metrics=["accuracy"])
        pixels = self.images.astype(np.float32)
        return lambda: model.fit(pixels, self.labels, batch_size=batch, epochs=1, verbose=0)

    def mapped(self) -> np.ndarray:
        """The images in a file, which the page cache holds if it can, and which is gone with this process."""
        with tempfile.TemporaryFile() as file:
            np.save(file, self.images)
            file.flush()
            path = f"/proc/self/fd/{file.fileno()}"
            array: np.ndarray = np.load(path, mmap_mode="r")
        return array

    def ours(self, recipe: Recipe, way: Way) -> Epoch:
        """One epoch as training.fitting runs it, in another way."""
        pool = ReshapedPool if way.reshaped else keras.layers.MaxPooling2D
        with mock.patch.object(networks.layers, "MaxPooling2D", pool):
            model = networks.build(recipe, self.spec, way.precision or self.precision,
                                   fused=self.args.device == "cpu" and recipe.network in networks.FUSIBLE)
        average = Average(model, recipe.average) if recipe.average else None
        totals = tf.Variable(tf.zeros([2], tf.float64))
        xla, batch = way.xla and self.args.device == "gpu", recipe.batch_size
        step = new_step(model, new_optimizer(recipe, model), recipe, self.spec, 0, totals, xla,
                        average=average)
        steps = len(self.images) // batch
        gpu_fed = way.program == "fed" and self.args.device == "gpu"
        a_call = min(way.steps or (FED_CALL if gpu_fed else steps), steps)
        match way.program:
            case "resident":
                run = resident(step, self.images, self.labels, a_call, xla)
            case "known":
                run = known(step, self.images, self.labels, xla)
            case "looped":
                run = resident(tf.function(step, jit_compile=xla), self.images, self.labels, a_call)
            case _:
                run = fed(step, self.mapped() if way.mapped else self.images, self.labels, xla,
                          way.ahead if gpu_fed else 0)

        def epoch() -> None:
            order = np.random.default_rng(0).permutation(len(self.images))[:steps * batch].reshape(steps, batch)
            for at in range(0, steps, a_call):
                chosen = order[at:at + a_call]
                run(chosen, np.full(len(chosen), recipe.learning_rate, np.float32), at)
            totals.numpy()

        return epoch


class ReshapedPool(keras.layers.Layer):
    """MaxPooling2D of 2 x 2."""

    def call(self, x: tf.Tensor) -> tf.Tensor:
        _, tall, wide, channels = x.shape
        even = x[:, :tall // 2 * 2, :wide // 2 * 2]
        return tf.reduce_max(tf.reshape(even, [-1, tall // 2, 2, wide // 2, 2, channels]), [2, 4])


def known(step: Step, images: np.ndarray, labels: np.ndarray, xla: bool) -> Run:
    """`resident` with a program for each number of steps: a GPU need not tell the host whether to go on."""
    pixels, classes = tf.constant(images), tf.constant(labels)

    @tf.function(jit_compile=xla)
    def program(chosen: tf.Tensor, rates: tf.Tensor, first: tf.Tensor) -> tf.Tensor:
        def body(i: tf.Tensor, loss: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            return i + 1, step(tf.gather(pixels, chosen[i]), tf.gather(classes, chosen[i]), rates[i], first + i)

        return tf.while_loop(lambda i, _: i < chosen.shape[0], body, (tf.constant(0), tf.constant(0.0)))[1]

    return lambda chosen, rates, first: [program(tf.constant(chosen, tf.int32), tf.constant(rates), tf.constant(first))]


def timed(epoch: Epoch) -> float:
    began = time.perf_counter()
    epoch()
    return time.perf_counter() - began


def profiled(epoch: Epoch, steps: int) -> list[str]:
    """Lines about what a GPU did in one epoch, from TensorFlow's profiler; what it costs is in no other figure."""
    from tensorflow.tsl.profiler.protobuf import xplane_pb2

    with tempfile.TemporaryDirectory() as folder:
        tf.profiler.experimental.start(folder)
        seconds = timed(epoch)
        tf.profiler.experimental.stop()
        counts: Counter[str] = Counter()
        spent: Counter[str] = Counter()
        for path in Path(folder).rglob("*.xplane.pb"):
            space = xplane_pb2.XSpace.FromString(path.read_bytes())
            for plane in (p for p in space.planes if p.name.startswith("/device:GPU")):
                for event in (e for line in plane.lines if line.name.startswith("Stream") for e in line.events):
                    name = plane.event_metadata[event.metadata_id].name
                    counts[name] += 1
                    spent[name] += event.duration_ps
    busy = sum(spent.values()) / 1e9 / steps
    lines = [f"{sum(counts.values()) / steps:.1f} kernels and copies a step, {busy:.3f} ms of "
             f"{1000 * seconds / steps:.3f} ms a step while it was looked at"]
    return lines + [f"{ps / 1e9 / steps:.4f} ms  {counts[name] / steps:.1f} x  {name[:80]}"
                    for name, ps in spent.most_common(12)]


if __name__ == "__main__":
    main()
