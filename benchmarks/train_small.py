"""Time to accuracy of the recipes on a published Dataset: a table, and JSON beside it.

    python benchmarks/train_small.py --artifacts DIR --dataset d-20260101-abcdef01 --out train_small.json

Training alone is timed, from the first step to the end of the epoch that passed the mark, validation included; not the
start of TensorFlow. CPU seconds are of all threads: on a busy machine they say more than the clock.
"""

import argparse
import json
import multiprocessing
import os
import tempfile
from pathlib import Path
from typing import Any

from train_jobs import new_attempt

MARKS = (0.5533, 0.70, 0.75)  # what the seed reached, the aim of small, and more


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--artifacts", type=Path, required=True, help="root of a volume that holds the Dataset")
    parser.add_argument("--dataset", required=True, help="its id")
    parser.add_argument("--recipes", nargs="+", default=["small", "seed-cnn"])
    parser.add_argument("--epochs", type=int, default=0, help="0: as the recipe says")
    parser.add_argument("--threads", type=int, default=0, help="0: one a core")
    parser.add_argument("--out", type=Path, default=Path("train_small.json"))
    args = parser.parse_args()
    rows = []
    print(f"{'recipe':<10} {'epoch':>5} {'images':>9} {'accuracy':>8} {'seconds':>8} {'CPU s':>8}")
    for recipe in args.recipes:
        # A process each: TensorFlow's threads can't be set twice.
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            history, batch = pool.apply(_train, (args.artifacts, args.dataset, recipe, args.epochs, args.threads))
        row = _row(recipe, history, batch)
        rows.append(row)
        for entry in row["epochs"]:
            print(f"{recipe:<10} {entry['epoch']:>5} {entry['images']:>9} {entry['validation_accuracy']:>8.4f} "
                  f"{entry['seconds']:>8.1f} {entry['cpu_seconds']:>8.1f}")
        for mark, at in row["passed"].items():
            print(f"{recipe:<10} past {100 * float(mark):.2f} %: "
                  + (f"{at['seconds']:.1f} s, {at['cpu_seconds']:.1f} CPU s" if at else "never"), flush=True)
    result = {"cores": len(os.sched_getaffinity(0)), "dataset": args.dataset, "rows": rows}
    args.out.write_text(json.dumps(result, indent=1))


def _train(artifacts: Path, dataset: str, recipe: str, epochs: int, threads: int) -> tuple[list[dict[str, Any]], int]:
    """Train in a scratch volume that only sees the Dataset; returns the history and the batch size."""
    from shared.artifacts import open_artifact, read_json
    from shared.jobs import TrainJob
    from training.jobs import train

    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        (root / "datasets").symlink_to((artifacts / "datasets").resolve())
        job = TrainJob("m-benchmark", dataset, "benchmark", recipe, epochs=epochs)
        train(job, new_attempt(root, "j-benchmark", job, device="cpu", cpu_threads=threads))
        model = "models/m-benchmark"
        return read_json(root / model / "history.json"), open_artifact(root, model)["recipe"]["batch_size"]


def _row(recipe: str, history: list[dict[str, Any]], batch: int) -> dict[str, Any]:
    """Sums over the epochs so far, and the first epoch past each mark."""
    epochs, seconds, cpu_seconds = [], 0.0, 0.0
    for entry in history:
        seconds, cpu_seconds = seconds + entry["seconds"], cpu_seconds + entry["cpu_seconds"]
        epochs.append({"epoch": entry["epoch"], "images": entry["step"] * batch, "seconds": seconds,
                       "cpu_seconds": cpu_seconds, "validation_accuracy": entry["validation_accuracy"]})
    passed = {str(mark): next((e for e in epochs if e["validation_accuracy"] > mark), None) for mark in MARKS}
    return {"recipe": recipe, "epochs": epochs, "passed": passed}


if __name__ == "__main__":
    main()
