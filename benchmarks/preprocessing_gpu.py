"""Preprocessing on the GPU: every op held to the CPU path, then CuPy and cuDF measured against NumPy and pandas.

    python benchmarks/preprocessing_gpu.py [--out result.json] [--rounds 3] [--seconds 300] [--dry-run]

Both sides run the same code of services/preprocessing on the same data from host memory: transfers to the GPU and
results back on the host are in the times. Rounds are interleaved, figures are medians, one call of each is made before,
untimed. Where an op's cost is proportional to the images, the CPU runs a part of them and its time is scaled up: such a
figure is marked `~`. Images are drawn from a pool of random ones, gone through as often as needed. `sums` and `look`
are the two halves of `pixels`, which is what a job does. `resize` is held against `shared.images.resize`, image by
image. --dry-run goes through everything with NumPy and pandas on both sides and tiny counts. Exit status 1: an op
differed.
"""

import argparse
import importlib.util
import json
import os
import platform
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any

import numpy as np
import pandas
import pyarrow

from preprocessing import device
from preprocessing.inspection import batch_of, channel_sums
from preprocessing.quality import look, near_pairs
from preprocessing.resample import resample
from preprocessing.rows import Rows
from preprocessing.table import Arranged, arrange
from preprocessing.write import write_index
from shared.images import resize

ROOT = Path(__file__).resolve().parents[1]
COUNTS = (1_000, 10_000, 100_000, 1_000_000)
GOAL = 10  # times the CPU path, of all ops on 1 M images and rows together
POOL = 65_536  # images of 32 x 32 in the pool, 201 MB
PART = 20_000  # images that a CPU runs of an op whose cost is proportional to them
LABELS = tuple(f"class-{i}" for i in range(10))
TOGETHER = ("pixels", "near pairs", "table")


@dataclass
class Op:
    """cpu, gpu: run the op once on so many images. part: what the CPU runs at most, its time then scaled up."""

    name: str
    cpu: Callable[[int], Any]
    gpu: Callable[[int], Any]
    counts: tuple[int, ...]
    part: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ".")) / "preprocessing_gpu.json")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=300, help="no new round is begun after them")
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args()
    name = "cpu" if args.dry_run else "gpu"
    xp, frames = device.choose(name)
    result: dict[str, Any] = {"command": sys.argv, "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                              "host": describe(xp, frames), "parity": parity(xp, frames, name)}
    args.out.write_text(json.dumps(result, indent=1))
    until = time.monotonic() + args.seconds
    counts = (200, 1000) if args.dry_run else COUNTS
    result["measured"] = []
    for op in ops(xp, frames, counts, 1000 if args.dry_run else POOL, 30 if args.dry_run else 2000):
        for count in op.counts:
            try:
                result["measured"].append(measure(op, count, args.rounds, until))
            except Exception as e:  # one op's failure must not cost the others' figures
                traceback.print_exc()
                result["measured"].append({"op": op.name, "images": count, "failed": f"{type(e).__name__}: {e}"})
            args.out.write_text(json.dumps(result, indent=1))
    result["together"] = together(result["measured"], counts)
    args.out.write_text(json.dumps(result, indent=1))
    show(result)
    sys.exit(any(verdict != "OK" for verdict in result["parity"].values()))


def describe(xp: ModuleType, frames: ModuleType) -> dict[str, Any]:
    found = {"python": platform.python_version(), "cpus": os.cpu_count(), "numpy": np.__version__,
             "pandas": pandas.__version__, "pyarrow": pyarrow.__version__,
             "cykooz-resizer": version("cykooz-resizer")}
    if xp is not np:
        runtime = xp.cuda.runtime
        name = runtime.getDeviceProperties(0)["name"]
        found |= {"gpu": name.decode() if isinstance(name, bytes) else name, "cupy": xp.__version__,
                  "cudf": frames.__version__, "driver_cuda": runtime.driverGetVersion(),
                  "runtime_cuda": runtime.runtimeGetVersion()}
    print(json.dumps(found), flush=True)
    return found


def parity(xp: ModuleType, frames: ModuleType, name: str) -> dict[str, str]:
    """Each check's verdict; a failure is printed with its traceback and the next one runs."""
    spec = importlib.util.spec_from_file_location("parity", ROOT / "tests" / "preprocessing" / "parity.py")
    assert spec is not None
    assert spec.loader is not None
    checks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(checks)
    verdicts = {}
    for check in checks.CHECKS:
        began = time.perf_counter()
        try:
            check(xp, frames, name)
            verdicts[check.__name__] = "OK"
        except Exception as e:  # whatever it is, it is this op's verdict
            traceback.print_exc()
            verdicts[check.__name__] = f"FAIL {type(e).__name__}: {e}"[:500]
        print(f"{verdicts[check.__name__][:4]:5} {check.__name__} ({time.perf_counter() - began:.1f} s)", flush=True)
    return verdicts


def ops(xp: ModuleType, frames: ModuleType, counts: tuple[int, ...], pool_size: int, photos: int) -> Iterator[Op]:
    rng = np.random.default_rng(0)
    pool = rng.integers(0, 256, (pool_size, 32, 32, 3), dtype=np.uint8)
    for name, steps in (("sums", [channel_sums]), ("look", [look]), ("pixels", [channel_sums, look])):
        yield Op(name, partial(over, np, steps, pool), partial(over, xp, steps, pool), counts, PART)
    hashes = rng.integers(0, 2**32, (counts[-1], 4), dtype=np.uint32)
    hashes[1::100] = hashes[:-1:100][:len(hashes[1::100])] ^ np.uint32(4)
    yield Op("near pairs", lambda n: near_pairs(np, hashes[:n]), lambda n: near_pairs(xp, hashes[:n]), counts,
             counts[-1])
    tables = {n: made_rows(rng, n) for n in counts}
    arranged = {n: arrange(pandas, tables[n], LABELS, 0.1, 0.1) for n in counts}
    yield Op("table", lambda n: arrange(pandas, tables[n], LABELS, 0.1, 0.1),
             lambda n: arrange(frames, tables[n], LABELS, 0.1, 0.1), counts, counts[-1])
    with tempfile.TemporaryDirectory() as temp:
        folder = Path(temp)
        yield Op("index", lambda n: write_index(folder, arranged[n], tables[n], LABELS),
                 lambda n: written_by(frames, folder / "other.parquet", arranged[n], tables[n]), counts, counts[-1])
    pictures = rng.integers(0, 256, (photos, 375, 500, 3), dtype=np.uint8)
    yield Op("resize", lambda n: one_by_one(pictures[:n]), lambda n: resized(xp, pictures[:n]), (photos,),
             max(photos // 10, 1))


def over(xp: ModuleType, steps: list[Callable[[ModuleType, Any], Any]], pool: np.ndarray, count: int) -> None:
    """Take each batch to `xp` once and run the steps on it, as a job does."""
    done, step = 0, batch_of(xp, 32)
    while done < count:
        first = done % len(pool)
        chunk = xp.asarray(pool[first:first + min(step, count - done)])
        for run in steps:
            run(xp, chunk)
        done += len(chunk)


def made_rows(rng: np.random.Generator, n: int) -> Rows:
    """One image in a hundred is a copy of another."""
    contents = rng.permutation(n)
    contents[::100] = contents[n // 2]
    digests = rng.bytes(32 * n).hex()
    rows = Rows([f"{i:07}.jpg" for i in range(n)], (contents % 10).astype(np.int32), np.zeros(n, np.int8))
    rows.sha256 = [digests[64 * c:64 * c + 64] for c in contents.tolist()]
    rows.keys[:] = rng.integers(0, 2**63, n, dtype=np.uint64)[contents]
    rows.widths[:] = rows.heights[:] = 32
    return rows


def written_by(frames: ModuleType, path: Path, arranged: Arranged, rows: Rows) -> None:
    """The index by the frames' own Parquet writer: what is given up for a file of the same bytes on both paths."""
    sources = np.concatenate(list(arranged.sources.values()))
    table = frames.DataFrame({"path": rows.paths, "sha256": rows.sha256, "width": rows.widths, "height": rows.heights,
                              "label": rows.labels})
    table.take(sources).to_parquet(path, index=False)


def one_by_one(images: np.ndarray) -> None:
    for image in images:
        resize(image, 224)


def resized(xp: ModuleType, images: np.ndarray) -> None:
    out = resample(xp, images, 224)
    if xp is not np:
        out.get()


def measure(op: Op, count: int, rounds: int, until: float) -> dict[str, Any]:
    """Seconds of both sides on `count` images: of each round, and their medians."""
    part = min(count, op.part)
    seconds: dict[str, list[float]] = {"cpu": [], "gpu": []}
    op.gpu(count)
    op.cpu(min(part, 1000))
    for round_ in range(rounds):
        if round_ and time.monotonic() > until:
            break
        for side, run, n in (("cpu", op.cpu, part), ("gpu", op.gpu, count)):
            began = time.perf_counter()
            run(n)
            seconds[side].append((time.perf_counter() - began) * count / n)
    cpu, gpu = (median(seconds[side]) for side in ("cpu", "gpu"))
    print(f"{op.name:11} {count:9,}  cpu {cpu:9.4f} s  gpu {gpu:9.4f} s  {cpu / gpu:8.2f}", flush=True)
    return {"op": op.name, "images": count, "cpu_s": cpu, "gpu_s": gpu, "ratio": cpu / gpu, "cpu_ran": part,
            "rounds": seconds}


def together(measured: list[dict[str, Any]], counts: tuple[int, ...]) -> list[dict[str, Any]]:
    """All ops of the GPU path on so many images together; only where each was measured."""
    sums = []
    for count in counts:
        these = [m for m in measured if m["images"] == count and m["op"] in TOGETHER and "ratio" in m]
        if len(these) == len(TOGETHER):
            cpu, gpu = (sum(m[side] for m in these) for side in ("cpu_s", "gpu_s"))
            sums.append({"op": "together", "images": count, "cpu_s": cpu, "gpu_s": gpu, "ratio": cpu / gpu,
                         "cpu_ran": min(m["cpu_ran"] for m in these)})
    return sums


def show(result: dict[str, Any]) -> None:
    print("\nparity")
    for check, verdict in result["parity"].items():
        print(f"  {check:28} {verdict[:90]}")
    print(f"\n{'op':11} {'images':>9} {'CPU s':>11} {'GPU s':>10} {'ratio':>8}")
    for m in [*result["measured"], *result["together"]]:
        if "failed" in m:
            print(f"{m['op']:11} {m['images']:9,} {m['failed'][:90]}")
            continue
        scaled = "~" if m["cpu_ran"] < m["images"] else " "
        print(f"{m['op']:11} {m['images']:9,} {scaled}{m['cpu_s']:10.4f} {m['gpu_s']:10.4f} {m['ratio']:8.2f}")
    print("index: the CPU column is Arrow, which writes it on both paths; the GPU column is cuDF's own writer")
    for m in result["together"]:
        if m is result["together"][-1]:
            verdict = "met" if m["ratio"] >= GOAL else "MISSED"
            print(f"goal at {m['images']:,} together: {GOAL} times the CPU path, measured {m['ratio']:.1f}: {verdict}")
    pays = [m["images"] for m in result["together"] if m["ratio"] > 1]
    print(f"the GPU pays from {pays[0]:,} images on" if pays else "the GPU pays at none of these counts")


if __name__ == "__main__":
    main()
