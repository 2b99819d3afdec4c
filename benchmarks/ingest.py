"""Ingest against Keras: images/s of a folder read, decoded, resized and hashed, side by side in one run.

    python benchmarks/ingest.py [--rounds 5] [--images FOLDER] [--only cifar,photo,large,memory]

Ours is measured twice: until the pixels are written (listed, decoded, hashed, written), and with everything published
(splits, statistics, index, SHA-256 of every file, fsync). Keras is `keras.utils.image_dataset_from_directory`, its
folder listed and every batch read once, in its default of bilinear without antialiasing. Ours runs as a job does, in a
fork of a process that has its modules imported; Keras is imported, too. Rounds are interleaved,
figures are medians and ratios of medians; one round of each is run before, untimed. What was published is deleted
before the next turn, untimed: what waits to be written to the disk would slow others. Peak memory is the resident set
of the preparing process and its decoders together, sampled every 5 ms, in a fresh process for each count of images.
"""

import argparse
import io
import json
import multiprocessing
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import psutil
from PIL import Image
from redis import Redis

from preprocessing.decode import decode_all
from preprocessing.jobs import collect_seldom, prepare
from preprocessing.layouts import read_layout
from shared.attempt import Attempt
from shared.jobs import PreprocessJob, new_id
from shared.ledger import Ledger
from shared.settings import load
from shared.tree import scan

# name: images, width, height, JPEG quality, size, goal of decode + hash + write, goal with everything published
CASES: dict[str, tuple[int, int, int, int, int, float, float]] = {
    "cifar": (50_000, 32, 32, 75, 32, 2.0, 1.4),
    "photo": (2_000, 500, 375, 90, 224, 1.0, 0.0),
    "large": (200, 2000, 1500, 90, 224, 1.5, 0.0),
}
CLASSES = 10


class Quiet(Attempt):
    """An attempt that tells nobody: a live view is not what is measured."""

    def report(self, stage: str, step: float, of: float, **metrics: float | str) -> None:
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=Path, help="a folder of class folders of 32 x 32 JPEGs, instead of made ones")
    parser.add_argument("--only", default="cifar,photo,large,memory")
    parser.add_argument("--peak", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as temp:
        if args.peak:
            print(peak_memory(args.peak, Path(temp)))
            return
        results = {}
        for name in args.only.split(","):
            folder = Path(temp) / name
            if name == "memory":
                results[name] = compare_memory(Path(temp))
                continue
            count, width, height, quality, size, *goals = CASES[name]
            if name == "cifar" and args.images:
                folder = args.images
            else:
                make_images(folder, count, width, height, quality)
            results[name] = compare(name, folder, size, args.rounds, Path(temp), *goals)
        print(json.dumps(results))


def make_images(folder: Path, count: int, width: int, height: int, quality: int) -> None:
    """JPEGs, 4:2:0, of smooth shapes with the grain of a sensor, in CLASSES folders."""
    rng = np.random.default_rng(0)
    grain = rng.normal(0, 4, (height, width, 3))
    for i in range(count):
        shapes = rng.integers(0, 256, (max(height // 24, 4), max(width // 24, 4), 3), dtype=np.uint8)
        smooth = np.asarray(Image.fromarray(shapes).resize((width, height), Image.Resampling.BICUBIC), np.float32)
        noisy = np.clip(smooth + np.roll(grain, rng.integers(0, height), 0), 0, 255).astype(np.uint8)
        out = io.BytesIO()
        Image.fromarray(noisy).save(out, "JPEG", quality=quality)
        path = folder / f"class-{i % CLASSES}" / f"{i:06}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(out.getvalue())


def compare(name: str, folder: Path, size: int, rounds: int, temp: Path, goal: float,
            goal_whole: float) -> dict[str, Any]:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    import keras

    def by_keras() -> float:
        began = cpu_seconds()
        batches = keras.utils.image_dataset_from_directory(
            folder, image_size=(size, size), batch_size=128, shuffle=False, verbose=False)
        for _ in batches:
            pass
        return cpu_seconds() - began

    count = sum(1 for _ in folder.rglob("*.jpg"))
    ways: dict[str, Callable[[], float]] = {
        "keras": by_keras, "written": partial(in_a_fork, written, temp, folder, size),
        "published": partial(in_a_fork, published, temp, folder, size)}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    cpu: dict[str, list[float]] = {way: [] for way in ways}
    for round_ in range(rounds + 1):
        for way, run in ways.items():
            began = time.perf_counter()
            spent = run()
            if round_:
                seconds[way].append(time.perf_counter() - began)
                cpu[way].append(spent)
            shutil.rmtree(temp / "artifacts", ignore_errors=True)
    speed = {way: count / median(taken) for way, taken in seconds.items()}
    spent_on = {way: median(taken) / count * 1e6 for way, taken in cpu.items()}
    for way, wanted in (("written", goal), ("published", goal_whole)):
        ratio = speed[way] / speed["keras"]
        verdict = f"goal {wanted:g}: {'met' if ratio >= wanted else 'MISSED'}" if wanted else "no goal"
        print(f"{name:6} {count:6} images to {size:3}  keras {speed['keras']:7.0f}/s  {way:9} {speed[way]:7.0f}/s  "
              f"ratio {ratio:.2f} ({verdict}); CPU time an image {spent_on['keras']:.0f} and {spent_on[way]:.0f} us",
              flush=True)
    return {"images": count, "seconds": seconds, "cpu_seconds": cpu}


def in_a_fork(work: Callable[[Path, Path, int], None], *args: Any) -> float:
    """Do it as a worker does a job, in a fork of a process that has everything imported; returns its CPU seconds."""
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload(["preprocessing.jobs", "psutil"])  # as a worker does; what this file imports with it
    result, send = forks.Pipe(duplex=False)
    process = forks.Process(target=forked, args=(work, args, send))
    process.start()
    spent: float = result.recv()
    process.join()
    return spent


def forked(work: Callable[[Path, Path, int], None], args: tuple[Path, Path, int], send: Connection) -> None:
    collect_seldom()
    work(*args)
    send.send(cpu_seconds())


def written(temp: Path, folder: Path, size: int) -> None:
    _, ctx = attempt(temp, folder, size)
    tree = scan(str(folder), str(folder))
    with tempfile.TemporaryFile(dir=ctx.work) as pixels:
        decode_all(tree, read_layout(tree), size, 0, pixels.fileno(), ctx)


def published(temp: Path, folder: Path, size: int) -> None:
    prepare(*attempt(temp, folder, size))


def cpu_seconds() -> float:
    """CPU time of this process and of its ended children."""
    return sum(used.ru_utime + used.ru_stime
               for used in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)))


def attempt(temp: Path, folder: Path, size: int) -> tuple[PreprocessJob, Attempt]:
    settings = load({"DEVICE": "cpu", "ARTIFACTS": str(temp / "artifacts"), "IMPORTS": str(folder.parent)})
    ledger = Ledger(settings.artifacts, Redis(port=1, socket_connect_timeout=0.01, retry=None))
    job_id, job = new_id("j"), PreprocessJob(new_id("d"), "bench", f"import:{folder.name}", size)
    ledger.accept(job_id, job)
    ctx = Quiet(job_id, settings, ledger)
    ctx.work.mkdir(parents=True)
    return job, ctx


def compare_memory(temp: Path) -> dict[str, int]:
    peaks = {}
    for count in (5_000, 20_000):
        folder = temp / f"memory-{count}"
        make_images(folder, count, 64, 64, 75)
        out = subprocess.run([sys.executable, __file__, "--peak", folder], capture_output=True, check=True, text=True)
        peaks[str(count)] = int(out.stdout)
    ratio = peaks["20000"] / peaks["5000"]
    print(f"memory peak {peaks['5000'] >> 20} MiB at 5,000 images, {peaks['20000'] >> 20} MiB at 20,000: ratio "
          f"{ratio:.2f} (goal at most 1.1: {'met' if ratio <= 1.1 else 'MISSED'})", flush=True)
    return peaks


def peak_memory(folder: Path, temp: Path) -> int:
    """Bytes resident in this process and its children at once, at most, while the folder is prepared."""
    me, peak, over = psutil.Process(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not over.wait(0.005):
            resident = 0
            for process in (me, *me.children()):
                with suppress(psutil.NoSuchProcess):
                    resident += process.memory_info().rss
            peak = max(peak, resident)

    watcher = threading.Thread(target=watch)
    watcher.start()
    prepare(*attempt(temp, folder, 64))
    over.set()
    watcher.join()
    return peak


if __name__ == "__main__":
    main()
