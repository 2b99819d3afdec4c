"""The pipeline through real workers and a real Redis on a GPU host, each part timed; a table last, JSON beside it.

    ./run bench gpu --data FOLDER --optimize             every worker with this Python; the JSON is gpu.json, or --out
    ./run bench gpu --data FOLDER --docs                 and docs/hardware.md and docs/benchmarks/gpu.md are written
    ./run bench gpu --docs-from gpu.json                 those alone, from the JSON of a run elsewhere
    ./run bench gpu --data FOLDER --shell training=". env/activate"     a worker in a shell that this prepares
    ./run bench gpu --data FOLDER --device cpu --epochs 1               a dry run

It prepares the folder on the GPU and on the CPU and compares the bytes, trains each recipe, and exports the last one.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from hardware import LIST_VERSIONS, pipeline, versions_of, write_docs
from redis import Redis, RedisError

from shared import gpu
from shared.artifacts import open_artifact, read_json
from shared.jobs import Job, OptimizeJob, PreprocessJob, TrainJob, new_id
from shared.ledger import TERMINAL, Ledger
from shared.queue import deliver

PORT = 6399


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a folder of images, one folder a class")
    parser.add_argument("--device", default="gpu", choices=["gpu", "cpu"])
    parser.add_argument("--redis", default="redis-server", help="the server's program")
    parser.add_argument("--shell", action="append", default=[], metavar="SERVICE=COMMANDS")
    parser.add_argument("--recipes", default="seed-cnn,small")
    parser.add_argument("--epochs", type=int, default=0, help="of each recipe; 0 for its own number")
    parser.add_argument("--optimize", action="store_true", help="export and measure the last model too")
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    parser.add_argument("--docs", action="store_true", help="write the documents after the run")
    parser.add_argument("--docs-from", type=Path, metavar="JSON", help="write the documents from an earlier run's JSON")
    args = parser.parse_args()
    if args.docs_from:
        write_docs(run=args.docs_from)
        return
    if not args.data:
        parser.error("--data or --docs-from is needed")
    shells = dict(s.split("=", 1) for s in args.shell)
    result = {"date": time.strftime("%Y-%m-%d"), "command": command(args), "cores": len(os.sched_getaffinity(0)),
              "gpus": [vars(g) for g in gpu.find()] if args.device == "gpu" else [], "versions": {}, "rows": []}
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), args, shells)
        for row in bench.run():  # written after each part: one that ends the run leaves those before it
            result["versions"] = bench.versions
            result["rows"].append(row)
            args.out.write_text(json.dumps(result, indent=1) + "\n")
    print("\n" + pipeline(result), flush=True)
    if args.docs:
        write_docs(run=args.out)
    sys.exit(any(row["failed"] for row in result["rows"]))


def command(args: argparse.Namespace) -> str:
    """What to type to run this again, on whatever folder and with whatever Pythons."""
    said = ["./run bench gpu --data FOLDER", *(f"--shell {s.partition('=')[0]}=COMMANDS" for s in args.shell),
            f"--recipes {args.recipes}", *([f"--epochs {args.epochs}"] if args.epochs else []),
            *([f"--device {args.device}"] if args.device != "gpu" else []), *(["--optimize"] if args.optimize else [])]
    return " ".join(said)


class Bench:
    """One run: its Redis, its artifacts, one worker at a time."""

    def __init__(self, folder: Path, args: argparse.Namespace, shells: dict[str, str]):
        self.folder, self.args, self.shells = folder, args, shells
        self.versions: dict[str, dict[str, str]] = {}  # service -> package -> version
        self.root = folder / "artifacts"
        self.root.mkdir()
        self.ledger = Ledger(self.root, Redis(port=PORT))

    def run(self) -> Iterator[dict[str, object]]:
        redis = subprocess.Popen([self.args.redis, "--port", str(PORT), "--save", "", "--dir", self.folder],
                                 stdout=subprocess.DEVNULL)
        try:
            self.wait_for_redis()
            datasets = {}
            for device in dict.fromkeys([self.args.device, "cpu"]):
                job = PreprocessJob(dataset_id=new_id("d"), name="images", source=f"import:{self.args.data.name}")
                with self.worker("preprocessing", device):
                    row = self.take(job, f"preprocess on {device}")
                if not row["failed"]:
                    datasets[device] = job.dataset_id
                yield row
            if len(datasets) == 2:
                yield self.compare(*datasets.values())
            dataset_id = list(datasets.values())[-1]
            with self.worker("training", self.args.device):
                for recipe in self.args.recipes.split(","):
                    train = TrainJob(model_id=new_id("m"), dataset_id=dataset_id, name="images", recipe=recipe,
                                     epochs=self.args.epochs)
                    yield self.take(train, f"train {recipe} on {self.args.device}")
            if self.args.optimize:
                with self.worker("optimization", self.args.device):
                    yield self.take(OptimizeJob(model_id=train.model_id, name="images"), "optimize")
        finally:
            redis.terminate()
            redis.wait()

    def wait_for_redis(self) -> None:
        for _ in range(100):
            try:
                self.ledger.redis.ping()
                return
            except RedisError:
                time.sleep(0.1)
        raise SystemExit(f"{self.args.redis} did not answer on port {PORT} within 10 s")

    @contextmanager
    def worker(self, service: str, device: str) -> Iterator[None]:
        settings = {"ARTIFACTS": str(self.root), "IMPORTS": str(self.args.data.parent.resolve()), "DEVICE": device,
                    "REDIS_URL": f"redis://127.0.0.1:{PORT}/0", "TF_CPP_MIN_LOG_LEVEL": "2"}
        start = f"{self.shells.get(service, 'true')}; exec {'python3' if service in self.shells else sys.executable}"
        if service not in self.versions:
            listed = subprocess.run(["bash", "-c", f'{start} -c "$0"', LIST_VERSIONS], check=True, capture_output=True,
                                    text=True).stdout
            self.versions[service] = versions_of(service, json.loads(listed.splitlines()[-1]))
        process = subprocess.Popen(["bash", "-c", f"{start} -m shared.worker {service}"],
                                   env={**os.environ, **settings})
        self.process = process
        try:
            yield
        finally:
            process.terminate()
            process.wait(60)

    def take(self, job: Job, part: str) -> dict[str, object]:
        """Accept and deliver a job, as the API does, and wait for its end; seconds are those of its attempt."""
        request, _ = self.ledger.accept(new_id("j"), job)
        deliver(self.ledger, request)
        began, told = time.monotonic(), ""
        while self.ledger.state(request.id) not in TERMINAL:
            if self.process.poll() is not None:
                raise SystemExit(f"{part}: the worker ended with status {self.process.returncode}, see above")
            view = self.ledger.view(request.id)
            if view["attempts"] and view["attempts"][-1].get("outcome") == "error":
                print(view["attempts"][-1]["message"], flush=True)
                return {"part": part, "seconds": 0.0, "what": view["attempts"][-1]["message"], "failed": True}
            progress = view["progress"] or {}
            line = f"  {part}: {progress.get('stage')} {progress.get('percent')} % {progress.get('metrics')}"
            if line != told and time.monotonic() - began > 5:
                told, began = line, time.monotonic()
                print(line, flush=True)
            time.sleep(0.02)
        view = self.ledger.view(request.id)
        last = view["attempts"][-1]
        seconds = _seconds(last["ended_at"]) - _seconds(last["started_at"])
        row: dict[str, object] = {"part": part, "seconds": seconds, "failed": view["state"] != "succeeded",
                                  "what": str(view["error"] or self.describe(job))}
        if isinstance(job, TrainJob) and not row["failed"]:
            row["history"] = read_json(self.root / job.target / "history.json")
        if isinstance(job, OptimizeJob) and not row["failed"]:
            row["card"] = read_json(self.root / "cards" / f"{job.model_id}.json")
        return row

    def describe(self, job: Job) -> str:
        match job:
            case PreprocessJob():
                images = open_artifact(self.root, job.target, hashes=False)["summary"]["images"]
                return ", ".join(f"{split} {count:,}" for split, count in images.items()) + " images"
            case TrainJob():
                epochs = read_json(self.root / job.target / "history.json")
                each = sorted(e["seconds"] for e in epochs[1:]) or [epochs[0]["seconds"]]
                best = max(e["validation_accuracy"] for e in epochs)
                return (f"{100 * best:.2f} % validation accuracy; first epoch {epochs[0]['seconds']:.1f} s, "
                        f"then {each[len(each) // 2]:.2f} s (median of {len(each)})")
            case _:
                return "built, measured, judged"

    def compare(self, one: str, other: str) -> dict[str, object]:
        """Whether two Datasets have the same bytes in every file."""
        files = [open_artifact(self.root, f"datasets/{d}")["files"] for d in (one, other)]
        unlike = [name for name in files[0] if files[0][name] != files[1].get(name)]
        return {"part": "the same bytes on both", "seconds": 0.0, "failed": bool(unlike),
                "what": f"differ: {unlike}" if unlike else f"yes, all {len(files[0])} files"}


def _seconds(stamp: str) -> float:
    return datetime.fromisoformat(stamp).timestamp()


if __name__ == "__main__":
    main()
