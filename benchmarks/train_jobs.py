"""A recipe's trainings as jobs, one after the other with a seed each: accuracy, with views too, and seconds.

    ./run bench train_jobs --data DATA --recipe accurate --seeds 0,1,2
    ./run bench train_jobs --data DATA --recipe accurate --seeds 0 --kill    and one killed and taken up again
    ./run bench train_jobs --data DATA --recipe small --seeds 0 --tune 12    a search of so many trials instead
    ./run bench train_jobs --data DATA --recipe accurate --anchor PATH/airbench96_faster.py --anchor-python PYTHON
    ./run bench train_jobs --data DATA --device cpu --recipe small --images 2000 --epochs 1       a dry run

DATA is a folder with train/<class>/<images>, decoded once and kept in --arrays, of whose images --validation are held
out: accuracy is of these, by the Model as published (`one view`) and by the mean over six views of each image.
Each job has a process of its own, as a worker's; what XLA compiled for the first is kept on the volume for the next.
The anchor, fetched by you from github.com/KellerJordan/cifar10-airbench, runs unmodified but for a first run of two
epochs, in which it compiles: on the same images and in turns with the jobs, a run for each, timed by itself.
`seconds` are of the whole job, TensorFlow's import in it; `first epoch` has the compiling; `epochs` are all of them.
"""

import argparse
import json
import math
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np
from train import Anchor, deviation, splits

SPAWN = multiprocessing.get_context("spawn")
JOB_LIMIT_S = 3600
DATASET = "d-benchmark"
DRIVE_96 = """
hyp = anchor.hyp
proxy, model, frozen = (anchor.make_net(hyp[name]) for name in ("proxy", "net", "net"))
proxy[0].bias.requires_grad = frozen[0].bias.requires_grad = False
models = [torch.compile(net, mode="max-autotune") for net in (proxy, model, frozen)]
epochs = hyp["opt"]["train_epochs"]
for line in sys.stdin:
    hyp["opt"]["train_epochs"] = 2.0 if line == "warmup\\n" else epochs
    anchor.main(line.strip(), hyp, *models)
    print(json.dumps({"seconds": last["total_time_seconds"], "views": last["tta_val_acc"],
                      "one view": last["val_acc"]}), flush=True)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--arrays", type=Path, default=Path("/tmp/lanner-bench-train"), help="keeps decoded images")
    parser.add_argument("--validation", type=int, default=5000, help="training images that are held out")
    parser.add_argument("--images", type=int, default=0, help="train on so many, 0 for all")
    parser.add_argument("--recipe", default="accurate")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--epochs", type=int, default=0, help="0: as the recipe says")
    parser.add_argument("--leave-out", type=float, default=0.0, help="share of the training images, by a proxy")
    parser.add_argument("--device", default="gpu", choices=["gpu", "cpu"])
    parser.add_argument("--kill", action="store_true", help="the first seed once more, killed at its first checkpoint")
    parser.add_argument("--tune", type=int, default=0, metavar="TRIALS", help="each job a search of so many trials")
    parser.add_argument("--anchor", type=Path, help="airbench96_faster.py")
    parser.add_argument("--anchor-python", default="python3")
    parser.add_argument("--artifacts", type=Path, metavar="DIR", help="kept after the run, compiled programs in it")
    parser.add_argument("--seconds", type=float, default=540, help="no further job is begun after so many")
    parser.add_argument("--out", type=Path, default=Path("train_jobs.json"))
    args = parser.parse_args()
    args.test = False
    began = time.monotonic()
    result: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"), "command": " ".join(["./run bench train_jobs", *sys.argv[1:]]),
        "recipe": args.recipe, "cores": len(os.sched_getaffinity(0)), "rows": []}
    with tempfile.TemporaryDirectory() as folder:
        root = args.artifacts or Path(folder)
        dataset, counts = publish_dataset(root, args)
        result["images"] = counts
        anchor = started_anchor(args, result) if args.anchor else None
        seeds = [int(seed) for seed in args.seeds.split(",")]
        jobs = [(f"seed {seed}", seed, False) for seed in seeds]
        jobs += [(f"seed {seeds[0]}, killed", seeds[0], True)] if args.kill else []
        for name, seed, kill in jobs:
            if time.monotonic() - began > args.seconds:
                print(f"{name} is not begun: {args.seconds:.0f} s are over", flush=True)
                continue
            row = {"name": name, **run(root, dataset, args, seed, name.replace(", ", "-").replace(" ", "-"), kill)}
            result["rows"].append(row)
            if anchor:
                result["anchor"].append(anchor.run(seed))
            args.out.write_text(json.dumps(result, indent=1) + "\n")
            print(line(row), flush=True)
            if anchor:
                print("the anchor:", result["anchor"][-1], flush=True)
    print(summary([row for row in result["rows"] if not row["killed at"]]))


def started_anchor(args: argparse.Namespace, result: dict[str, Any]) -> Anchor:
    """Compiled, and told of in the result."""
    train, held, _ = splits(args)
    anchor = Anchor(args, train, held, DRIVE_96)
    result |= {"anchor is": anchor.about, "anchor compile": anchor.warm_up(), "anchor": []}
    print(f"anchor: compiled and run once in {result['anchor compile']:.1f} s", flush=True)
    return anchor


def publish_dataset(root: Path, args: argparse.Namespace) -> tuple[str, dict[str, int]]:
    """The Dataset of the images, its id and how many each split has; nothing is left out as a duplicate."""
    from shared.artifacts import open_artifact, publish, stage
    from shared.datasets import Spec

    train, held, labels = splits(args)
    counts = {"train": len(train[0]), "validation": len(held[0])}
    if (root / "datasets" / DATASET).exists():
        held_before = open_artifact(root, f"datasets/{DATASET}", hashes=False)["summary"]
        if held_before != counts:
            raise SystemExit(f"{root} holds {held_before} images, this run has {counts}: give another --artifacts")
        return DATASET, counts
    staging = stage(root, "benchmark")
    for split, (images, classes) in (("train", train), ("validation", held)):
        np.save(staging / f"{split}.npy", images)
        np.save(staging / f"{split}.labels.npy", classes.astype(np.int32))
    mean, std = ((getattr(train[0][:10_000], f)((0, 1, 2)) / 255).tolist() for f in ("mean", "std"))
    spec = Spec(train[0].shape[1], tuple(labels), tuple(mean), tuple(std))
    publish(root, staging, f"datasets/{DATASET}", {"spec": spec.to_json(), "summary": counts})
    return DATASET, counts


def run(root: Path, dataset: str, args: argparse.Namespace, seed: int, name: str, kill: bool) -> dict[str, Any]:
    """One job to its end in a process of its own; with `kill` in two, the first killed once there is a checkpoint."""
    from shared.artifacts import open_artifact, read_json

    job = {"model_id": f"m-{name}", "dataset_id": dataset, "name": "benchmark", "recipe": args.recipe,
           "epochs": args.epochs, "seed": seed, "trials": args.tune, "leave_out": args.leave_out}
    if (root / "models" / str(job["model_id"])).exists():
        raise SystemExit(f"{root} holds a training with {name} already: give another --artifacts or --seeds")
    began = time.perf_counter()
    killed_at = kill_at_checkpoint(root, job, args.device) if kill else 0
    process = start(root, job, args.device)
    process.join(JOB_LIMIT_S)
    process.kill()  # where it is not over
    process.join()
    if process.exitcode != 0:
        raise SystemExit(f"the training with {name} ended with {process.exitcode}: its message is above")
    seconds = time.perf_counter() - began
    manifest = open_artifact(root, f"models/{job['model_id']}", hashes=False)
    history = read_json(root / "models" / str(job["model_id"]) / "history.json")
    trials = read_json(root / "models" / str(job["model_id"]) / "trials.json") if args.tune else []
    later = [epoch["seconds"] for epoch in history[1:]] or [history[0]["seconds"]]
    return {"seconds": seconds, "one view": manifest["metrics"]["validation_accuracy"],
            "views": manifest["metrics"].get("views_accuracy"), "first epoch": history[0]["seconds"],
            "an epoch": statistics.median(later), "epochs": sum(epoch["seconds"] for epoch in history),
            "number of epochs": len(history), "precision": manifest["precision"], "device": manifest["device"],
            "killed at": killed_at, "peak MiB": read_json(root / f"{job['model_id']}.json")["peak MiB"],
            "history": history, "trials": trials}


def start(root: Path, job: dict[str, Any], device: str) -> Any:
    process = SPAWN.Process(target=_train, args=(root, job, device))
    process.start()
    return process


def kill_at_checkpoint(root: Path, job: dict[str, Any], device: str) -> int:
    """SIGKILL to the job's process when a checkpoint is there; the step it is of."""
    from training import checkpoints

    process = start(root, job, device)
    work = root / "work" / _job_id(job)
    while process.is_alive():
        if found := checkpoints.found(work):
            process.kill()
            process.join()
            return int(found[0].name.removeprefix("ckpt-"))
        time.sleep(0.05)
    raise SystemExit(f"the training ended with {process.exitcode} before it wrote a checkpoint: give it more --epochs")


def _job_id(job: dict[str, Any]) -> str:
    return f"j-{job['model_id']}"


def new_attempt(root: Path, job_id: str, job: Any, **settings: Any) -> Any:
    """An Attempt at a TrainJob, accepted at its first call, in a volume without a Redis."""
    from redis import Redis

    from shared.attempt import Attempt
    from shared.ledger import Ledger
    from shared.settings import Settings

    ledger = Ledger(root, Redis.from_url("redis://127.0.0.1:1/0"))  # nobody listens there: no live view
    ledger.accept(job_id, job)
    ctx = Attempt(job_id, Settings(artifacts=root, **settings), ledger)
    ctx.work.mkdir(parents=True, exist_ok=True)
    return ctx


def _train(root: Path, job: dict[str, Any], device: str) -> None:
    from shared.artifacts import write_json
    from shared.jobs import TrainJob, TuneJob
    from training.jobs import body
    from training.recipes import RECIPES

    fields = {name: job[name] for name in ("model_id", "dataset_id", "name", "epochs", "seed")}
    asked: TrainJob | TuneJob
    if job["trials"]:
        asked = TuneJob(**fields, trials=job["trials"], recipes=(job["recipe"],))
    else:
        views = {**RECIPES[job["recipe"]].augmentation, "views": True}
        asked = TrainJob(**fields, recipe=job["recipe"], augmentation=views, leave_out=job["leave_out"])
    body(asked, new_attempt(root, _job_id(job), asked, device=device))
    import tensorflow as tf

    peak = tf.config.experimental.get_memory_info("GPU:0")["peak"] >> 20 if device == "gpu" else 0
    write_json(root / f"{job['model_id']}.json", {"peak MiB": peak})


def line(row: dict[str, Any]) -> str:
    killed = f", killed at step {row['killed at']} and taken up again" if row["killed at"] else ""
    views = "" if row["views"] is None else f", with views {100 * row['views']:.2f} %"
    return (f"{row['name']}: {100 * row['one view']:.2f} %{views}; job "
            f"{row['seconds']:.1f} s, {row['number of epochs']} epochs {row['epochs']:.1f} s, first "
            f"{row['first epoch']:.1f} s, then {row['an epoch']:.3f} s each, peak {row['peak MiB']} MiB, "
            f"{row['precision']}{killed}{searched(row['trials'])}")


def searched(trials: list[dict[str, Any]]) -> str:
    """How many trials came to their end, and their accuracies."""
    found = sorted(trial["validation_accuracy"] for trial in trials if trial["state"] == "whole")
    return (f"; {len(trials)} trials, {len(found)} to the end, {100 * found[0]:.2f} to {100 * found[-1]:.2f} %"
            if found else "")


def summary(rows: list[dict[str, Any]]) -> str:
    def of(key: str, scale: float) -> str:
        values = [scale * row[key] for row in rows if row[key] is not None] or [math.nan]
        return f"{statistics.mean(values):.2f} ± {deviation(values):.2f}"

    if not rows:
        return "no job was run to its end"
    return (f"{len(rows)} jobs: one view {of('one view', 100)} %, with views {of('views', 100)} %, "
            f"all epochs {of('epochs', 1)} s")


if __name__ == "__main__":
    main()
