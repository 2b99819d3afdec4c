"""Recipe `small` on a CPU: its step beside PyTorch's, and how soon it knows 70 % beside `model.fit`.

    ./run bench small --anchor-python PYTHON [--rounds 15] [--threads 2] [--batch 64]
    ./run bench small --data DATASET [--mark 0.7] [--ways small layers generator]

PYTHON has a CPU build of PyTorch (benchmarks/small_torch.py runs in it). Both sides get the same network, first
weights, images of random pixels, batches, threads and update; that the losses of the first steps agree is checked.
Rounds of --steps steps are taken in turns. With augmentation both move and flip images by the same gathers. Ours is
there once more with Keras' own batch normalisation, which trainings on a CPU do without.

DATASET is a published Dataset's folder. `layers` is `model.fit` of the network and optimizer of `seed-cnn` with its
augmentation as Keras' preprocessing layers in a tf.data pipeline, `generator` the same by ImageDataGenerator, which
Keras keeps for old code. Each way ends with the first epoch past --mark. CPU seconds are of all threads, validation
included, the start of TensorFlow not.
"""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np

AIM_STEP, AIM_ACCURACY = 1.0, 0.5
AGREE = 0.01  # relative, of the losses of the first steps
SIZE, CLASSES = 32, 10
Side = Callable[[np.ndarray, float, bool], tuple[list[float], float]]  # batches, rate, augmented: losses, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--anchor-python", default="")
    parser.add_argument("--anchor-ways", nargs="+", default=["eager", "compiled"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=40, help="of a round")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--mark", type=float, default=0.70)
    parser.add_argument("--epochs", type=int, default=12, help="at most, of model.fit")
    parser.add_argument("--ways", nargs="+", default=["small", "layers"], choices=["small", "layers", "generator"])
    parser.add_argument("--out", type=Path, default=Path("small.json"))
    parser.add_argument("--one", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(to_accuracy(args)))
        return
    if not args.anchor_python and args.data is None:
        parser.error("give --anchor-python for the step, --data for the accuracy, or both")
    result: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "cpu": cpu(), "cores": len(os.sched_getaffinity(0))}
    if args.data:  # first: TensorFlow in this process would leave threads
        result["accuracy"] = [alone(args, way) for way in args.ways]
        tell_accuracy(args, result["accuracy"])
    if args.anchor_python:
        result |= steps(args)
    args.out.write_text(json.dumps(result, indent=1) + "\n")


def cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown")


# The step


def steps(args: argparse.Namespace) -> dict[str, Any]:
    """Times of rounds in turns, by side and with or without augmentation; the table is printed."""
    import tensorflow as tf

    with tempfile.TemporaryDirectory() as folder:
        ours, start = begun(args, True)
        unfused, _ = begun(args, False)
        np.savez(Path(folder) / "start.npz", **start)
        anchors = {f"torch {way}": Anchor(args.anchor_python, folder, args.threads, way) for way in args.anchor_ways}
        sides: dict[str, Side] = {"lanner": ours,
                                  "lanner unfused": unfused}
        sides |= {name: anchor.run for name, anchor in anchors.items()}
        order = np.random.default_rng(1)
        total = len(start["images"])

        def batches(count: int) -> np.ndarray:
            return np.stack([order.permutation(total)[:args.batch] for _ in range(count)])

        first = batches(5)
        losses = {name: side(first, 0.02, False)[0] for name, side in sides.items()}
        for name, found in losses.items():
            if not np.allclose(found, losses["lanner"], rtol=AGREE):
                raise SystemExit(f"{name} is another network: losses {found}, of ours {losses['lanner']}")
        for augment in (True, False):
            for side in sides.values():
                side(batches(10), 0.02, augment)  # warm
        times: dict[str, list[float]] = {f"{name}, {kind}": [] for kind in ("augmented", "plain") for name in sides}
        for number in range(args.rounds):
            chosen = batches(args.steps)
            for kind in ("augmented", "plain"):
                for name in list(sides)[:: 1 if number % 2 == 0 else -1]:
                    seconds = sides[name](chosen, 0.02, kind == "augmented")[1]
                    times[f"{name}, {kind}"].append(1000 * seconds / args.steps)
        versions = {"tensorflow": tf.__version__, "torch": next(iter(anchors.values())).about["torch"]}
        for anchor in anchors.values():
            anchor.close()
    tell_steps(args, times, versions)
    return {"versions": versions, "ms_a_step": times, "batch": args.batch, "threads": args.threads,
            "first losses": losses}


def begun(args: argparse.Namespace, fused: bool) -> tuple[Side, dict[str, np.ndarray]]:
    """Our steps as a training on a CPU runs them, or not `fused`: with Keras' batch normalisation. What all begin with.
    """
    import keras
    import tensorflow as tf

    from shared.datasets import Spec
    from shared.settings import Settings
    from training import device, networks
    from training.recipes import SMALL
    from training.steps import fed, new_optimizer, new_step

    device.prepare(Settings(device="cpu", cpu_threads=args.threads))
    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (4096, SIZE, SIZE, 3), np.uint8)
    labels = rng.integers(0, CLASSES, len(images)).astype(np.int32)
    spec = Spec(SIZE, tuple(map(str, range(CLASSES))), (0.5, 0.45, 0.4), (0.25, 0.24, 0.26))
    model = networks.build(SMALL, spec, fused=fused)
    weights = {f"w{i}": array for i, array in enumerate(model.get_weights())}
    optimizer, totals = new_optimizer(SMALL, model), tf.Variable(tf.zeros([2], tf.float64))
    recipe = dataclasses.replace(SMALL, batch_size=args.batch)
    recipes = {True: recipe, False: dataclasses.replace(recipe, augmentation={})}
    runs = {augment: fed(new_step(model, optimizer, recipe, spec, 0, totals), images, labels)
            for augment, recipe in recipes.items()}
    done = 0

    def run(chosen: np.ndarray, rate: float, augment: bool) -> tuple[list[float], float]:
        nonlocal done
        began = time.perf_counter()
        losses = runs[augment](chosen, np.full(len(chosen), rate, np.float32), done)
        told = [float(loss) for loss in losses]
        done += len(chosen)
        return told, time.perf_counter() - began

    return run, {"images": images, "labels": labels.astype(np.int64), "mean": np.array(spec.mean),
                 "std": np.array(spec.std), **weights}


class Anchor:
    """PyTorch's side, in a process of its own."""

    def __init__(self, python: str, folder: str, threads: int, way: str):
        program = Path(__file__).with_name("small_torch.py")
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        self._process = subprocess.Popen([python, program, folder, str(threads), way], text=True, env=environment,
                                         stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.about = self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"PyTorch's side ended with status {self._process.wait()}: what it said is above")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def run(self, chosen: np.ndarray, rate: float, augment: bool) -> tuple[list[float], float]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"chosen": chosen.tolist(), "rate": rate, "augment": augment}) + "\n")
        self._process.stdin.flush()
        answer = self._read()
        return answer["losses"], answer["seconds"]

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)


def tell_steps(args: argparse.Namespace, times: dict[str, list[float]], versions: dict[str, str]) -> None:
    print(f"{cpu()}, {args.threads} threads, batch {args.batch}, {versions}; medians of {args.rounds} rounds")
    print(f"{'':28} {'ms a step':>9} {'lanner / it':>11}")
    middle = {name: statistics.median(found) for name, found in times.items()}
    for name, ms in middle.items():
        ratio = middle[f"lanner, {name.split(', ')[1]}"] / ms
        print(f"{name:28} {ms:9.2f} {ratio:11.2f}")
    best = min(ms for name, ms in middle.items() if name.startswith("torch") and name.endswith("augmented"))
    ratio = middle["lanner, augmented"] / best
    print(f"aim: at most {AIM_STEP} of PyTorch's best: {ratio:.2f}, " + ("met" if ratio <= AIM_STEP else "missed"))


# The accuracy


def alone(args: argparse.Namespace, way: str) -> dict[str, Any]:
    """One way in a process of its own: TensorFlow's threads can be set once."""
    command = [sys.executable, __file__, "--data", args.data, "--mark", str(args.mark), "--threads", str(args.threads),
               "--epochs", str(args.epochs), "--one", way]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row


def to_accuracy(args: argparse.Namespace) -> dict[str, Any]:
    """{way, epochs: [{seconds, cpu_seconds, validation_accuracy}] with sums so far}, to the first past the mark."""
    epochs: list[dict[str, float]] = []

    def told(seconds: float, cpu_seconds: float, accuracy: float) -> bool:
        epochs.append({"seconds": seconds, "cpu_seconds": cpu_seconds, "validation_accuracy": accuracy})
        print(f"{args.one} epoch {len(epochs)}: {accuracy:.4f}, {seconds:.1f} s, {cpu_seconds:.1f} CPU s",
              file=sys.stderr, flush=True)
        return accuracy > args.mark

    (ours if args.one == "small" else theirs)(args, told)
    return {"way": args.one, "epochs": epochs}


class Enough(Exception):
    """The mark is passed."""


def ours(args: argparse.Namespace, told: Callable[[float, float, float], bool]) -> None:
    """A whole training by the recipe, whose schedule is that of its eight epochs, left when it passes the mark."""
    from redis import Redis

    from shared.attempt import Attempt
    from shared.datasets import Dataset
    from shared.jobs import TrainJob
    from shared.ledger import Ledger
    from shared.settings import Settings
    from training import device, fitting
    from training.recipes import resolve

    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        (root / "datasets").mkdir()
        (root / "datasets" / args.data.name).symlink_to(args.data.resolve())
        job = TrainJob("m-benchmark", args.data.name, "benchmark", "small")
        ledger = Ledger(root, Redis.from_url("redis://127.0.0.1:1/0"))  # nobody listens there: no live view
        ledger.accept("j-benchmark", job)
        ctx = Attempt("j-benchmark", Settings(device="cpu", artifacts=root, cpu_threads=args.threads), ledger)
        ctx.work.mkdir(parents=True)
        device.prepare(ctx.settings)
        dataset = Dataset(root, job.dataset_id)
        training = fitting.begin(dataset, resolve(job, len(dataset.labels("train"))), job.seed, ctx)

        def after() -> None:
            sums = [sum(entry[name] for entry in training.history) for name in ("seconds", "cpu_seconds")]
            if told(*sums, training.history[-1]["validation_accuracy"]):
                raise Enough

        training.after_epoch = after
        try:
            training.fit()
        except Enough:
            return


def theirs(args: argparse.Namespace, told: Callable[[float, float, float], bool]) -> None:
    """model.fit of the seed-cnn network, Adam at 1e-3, batches of 64, with the recipe's augmentation."""
    import keras
    import tensorflow as tf

    from shared.datasets import Dataset
    from training import networks
    from training.recipes import SEED_CNN

    tf.config.threading.set_intra_op_parallelism_threads(args.threads)
    keras.utils.set_random_seed(0)
    dataset = Dataset(args.data.resolve().parents[1], args.data.name)
    images, labels = dataset.images("train"), dataset.labels("train")
    held = np.array(dataset.images("validation")), dataset.labels("validation")
    model = networks.build(SEED_CNN, dataset.spec)
    optimizer = keras.optimizers.Adam(SEED_CNN.learning_rate)
    model.compile(optimizer, "sparse_categorical_crossentropy", metrics=["accuracy"])
    batch, options = SEED_CNN.batch_size, SEED_CNN.augmentation
    source: Any
    if args.one == "generator":
        from keras.src.legacy.preprocessing.image import ImageDataGenerator

        source = ImageDataGenerator(**options).flow(np.array(images), labels, batch_size=batch, seed=0)
    else:
        moves = keras.Sequential([
            keras.layers.RandomFlip("horizontal"),
            keras.layers.RandomRotation(options["rotation_range"] / 360, fill_mode="nearest"),
            keras.layers.RandomTranslation(options["height_shift_range"], options["width_shift_range"],
                                           fill_mode="nearest")])
        source = (tf.data.Dataset.from_tensor_slices((np.array(images), labels))
                  .shuffle(len(images), seed=0).batch(batch)
                  .map(lambda x, y: (moves(tf.cast(x, tf.float32), training=True), y), tf.data.AUTOTUNE)
                  .prefetch(tf.data.AUTOTUNE))
    began = time.monotonic(), time.process_time()

    def after(_: int, logs: dict[str, float]) -> None:
        if told(time.monotonic() - began[0], time.process_time() - began[1], logs["val_accuracy"]):
            model.stop_training = True

    model.fit(source, epochs=args.epochs, validation_data=held, verbose=0,
              callbacks=[keras.callbacks.LambdaCallback(on_epoch_end=after)])


def tell_accuracy(args: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    print(f"{cpu()}, {args.threads} threads; once; to the first epoch past {100 * args.mark:g} %")
    print(f"{'':10} {'epochs':>6} {'accuracy':>8} {'seconds':>8} {'CPU s':>8}")
    passed = {}
    for row in rows:
        last = row["epochs"][-1]
        print(f"{row['way']:10} {len(row['epochs']):6} {last['validation_accuracy']:8.4f} {last['seconds']:8.1f} "
              f"{last['cpu_seconds']:8.1f}")
        if last["validation_accuracy"] > args.mark:
            passed[row["way"]] = last["cpu_seconds"]
    anchors = [seconds for way, seconds in passed.items() if way != "small"]
    if "small" in passed and anchors:
        ratio = passed["small"] / min(anchors)
        print(f"aim: at most {AIM_ACCURACY} of model.fit's CPU seconds: {ratio:.2f}, "
              + ("met" if ratio <= AIM_ACCURACY else "missed"))
    elif "small" in passed and len(rows) > 1:
        print("model.fit did not pass the mark in its epochs: no ratio")


if __name__ == "__main__":
    main()
