"""What `optimization.layout` gains: images/s of a recipe's variants as Keras exports them and as they are published.

    ./run bench layout [--recipes small,seed-cnn] [--rounds 15] [--sizes 32,96] [--docs]

One thread of each runtime on one core, random weights, batches of 1 and 64; medians of rounds in turns. The answers of
both forms are compared first: onnx-fp32 to the last bit, int8 within its tolerance.
"""

import argparse
import os
import tempfile
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path
from statistics import median

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
import keras
import numpy as np

from optimization import export
from shared.datasets import Spec
from shared.fitted import cpu_name
from shared.runtimes import FILES, TOLERANCE, Session, load
from training.networks import build
from training.recipes import RECIPES

VARIANTS = (("onnx", "fp32"), ("onnx", "int8"), ("litert", "int8"))
BATCHES = (1, 64)
SECONDS = 0.05  # of one measurement
DOCS = Path(__file__).parents[1] / "docs/benchmarks/layout.md"


def sessions(model: keras.Model, form: str, precision: str, images: np.ndarray, folder: Path) -> dict[str, Session]:
    """As Keras exports it, and as it is published."""
    exported, published = folder / "exported", folder / "published"
    for place in (exported, published):
        place.mkdir()
    match form, precision:
        case "onnx", "fp32":
            export.to_onnx(model, exported / FILES[form])
        case "onnx", _:
            export.to_onnx(model, folder / "exact.onnx")
            export.quantize_onnx(folder / "exact.onnx", images, exported / FILES[form])
        case _:
            export.to_litert(model, precision, images, exported / FILES[form])
    export.export(model, form, precision, images, published / FILES[form])
    return {place.name: load(place, form) for place in (exported, published)}


def check(found: dict[str, Session], form: str, precision: str, images: np.ndarray) -> None:
    before, after = (found[way].run(images) for way in ("exported", "published"))
    exact = (form, precision) == ("onnx", "fp32")
    if np.abs(before - after).max() > (0.0 if exact else TOLERANCE[precision]):
        raise SystemExit(f"{form}-{precision}: answers differ by {np.abs(before - after).max():.2g}")


def rates(found: dict[str, Session], images: np.ndarray, rounds: int) -> dict[str, float]:
    """images/s, medians of rounds in turns."""
    seen: dict[str, list[float]] = {way: [] for way in found}
    for number in range(rounds):
        for way in found if number % 2 == 0 else reversed(found):
            runs, began = 0, time.perf_counter()
            while (took := time.perf_counter() - began) < SECONDS:
                found[way].run(images)
                runs += 1
            seen[way].append(runs * len(images) / took)
    return {way: median(values) for way, values in seen.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", type=lambda text: text.split(","), default=["small", "seed-cnn"])
    parser.add_argument("--sizes", type=lambda text: [int(size) for size in text.split(",")], default=[32, 96])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--docs", action="store_true", help=f"write docs/benchmarks/{DOCS.name}")
    args = parser.parse_args()
    cores = os.cpu_count()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])
    lines = ["| recipe | size | variant | batch | exported, images/s | published, images/s | ratio |",
             "|---|---|---|---|---|---|---|"]
    for recipe in args.recipes:
        for size in args.sizes:
            keras.utils.set_random_seed(0)
            model = build(RECIPES[recipe], Spec(size, tuple("abcdefghij"), (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)))
            images = np.random.default_rng(0).integers(0, 256, (max(BATCHES), size, size, 3), np.uint8)
            for form, precision in VARIANTS:
                with tempfile.TemporaryDirectory() as folder:
                    found = sessions(model, form, precision, images, Path(folder))
                    check(found, form, precision, images)
                    for batch in BATCHES:
                        seen = rates(found, images[:batch], args.rounds)
                        lines.append(f"| {recipe} | {size} | {form}-{precision} | {batch} | {seen['exported']:,.0f} | "
                                     f"{seen['published']:,.0f} | {seen['published'] / seen['exported']:.2f} |")
                        print(lines[-1], flush=True)
    command = f"./run bench layout --recipes {','.join(args.recipes)} --sizes {','.join(map(str, args.sizes))} " \
              f"--rounds {args.rounds}"
    told = ", ".join(f"{name} {version(name)}" for name in ("onnxruntime", "ai-edge-litert", "keras", "tensorflow-cpu"))
    page = "\n".join(["# The layout of what is exported", "",
                      f"`{command} --docs`, {date.today()}, {cpu_name()}, one core of {cores}. {told}. "
                      "Random weights; medians of rounds in turns, one thread.", "",
                      "*exported*: as Keras writes it. *published*: laid out anew (`optimization/layout.py`): ONNX "
                      "scales pixels a colour at a time, and gives the same answers to the last bit, in int8 in one "
                      "node and within its tolerance; LiteRT's int8 scales them by a convolution.", "",
                      *lines, ""])
    print(page)
    if args.docs:
        DOCS.write_text(page)


if __name__ == "__main__":
    main()
