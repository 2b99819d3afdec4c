"""Upload to prediction through the real API, workers and Redis on a GPU host, each part timed; a table, JSON beside it.

    ./run bench gpu --data FOLDER                        every service with this Python; the JSON is gpu.json, or --out
    ./run bench gpu --data FOLDER --docs                 and docs/hardware.md and docs/benchmarks/gpu.md are written
    ./run bench gpu --docs-from gpu.json                 those alone, from the JSON of a run elsewhere
    ./run bench gpu --data FOLDER --shell training=". env/activate"     a service in a shell that this prepares
    ./run bench gpu --data FOLDER --artifacts DIR --parts serve          go on with what an earlier call left in DIR
    ./run bench gpu --data FOLDER --device cpu --epochs 1 --seconds 3    a dry run

Parts: `upload` sends the folder; `preprocess` makes a Dataset of it on the GPU and on the CPU and compares the bytes;
`train` trains each recipe; `optimize` exports, measures and judges the last model; `serve` predicts over HTTP;
`pipeline` asks for all of that in one request, all workers running, and is timed until the new version answers;
`endpoint` asks by wrk as fast as it answers, beside loops over the engine; `several`, where it is asked for, trains and
serves on all GPUs of a host that has more than one;
`beside` predicts alone and beside a training that takes the same GPU, 16 requests at once by wrk, without
SERVING_P99_MS and with it (--target-ms, by default twice what the p99 was alone, and then just that). Rows of parts
that are not run are kept from --out where --artifacts is given.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

from endpoint_gpu import endpoint
from hardware import LIST_VERSIONS, SHOWN, pipeline, versions_of, write_docs
from redis import Redis, RedisError
from serving_gpu import (
    Api,
    beside_training,
    first_answer,
    predictions,
    row_of,
    stages_of,
    submit_to_served,
    took,
    under_load,
    upload,
    variants,
)
from several_gpu import several

from shared import gpu
from shared.artifacts import open_artifact, read_json

PORT, API_PORT = 6399, 8399
PARTS = ("upload", "preprocess", "train", "optimize", "pipeline", "serve", "endpoint", "beside")
SERVICES = ("preprocessing", "training", "optimization")
Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a folder of images, one folder a class")
    parser.add_argument("--device", default="gpu", choices=["gpu", "cpu"])
    parser.add_argument("--redis", default="redis-server", help="the server's program")
    parser.add_argument("--shell", action="append", default=[], metavar="SERVICE=COMMANDS")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--artifacts", type=Path, metavar="DIR", help="kept after the run, for other parts")
    parser.add_argument("--recipes", default="seed-cnn,small")
    parser.add_argument("--epochs", type=int, default=0, help="of each recipe; 0 for its own number")
    parser.add_argument("--seed", type=int, default=0, help="of the training that `pipeline` asks for; with the one "
                                                            "before it is the same network, whose engine is there")
    parser.add_argument("--variants", default="", help="that optimize makes, as onnx-fp32,tensorrt-fp16; all, if empty")
    parser.add_argument("--requests", type=int, default=500, help="of each variant, one after the other")
    parser.add_argument("--seconds", type=float, default=15, help="of predictions, alone and beside a training")
    parser.add_argument("--idle", type=float, default=0, help="seconds that workers wait before `pipeline` asks")
    parser.add_argument("--target-ms", type=int, default=0, help="SERVING_P99_MS; 0: twice what it is alone, and that")
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    parser.add_argument("--docs", action="store_true", help="write the documents after the run")
    parser.add_argument("--docs-from", type=Path, metavar="JSON", help="write the documents from an earlier run's JSON")
    args = parser.parse_args()
    if args.docs_from:
        write_docs(run=args.docs_from)
        return
    if not args.data:
        parser.error("--data or --docs-from is needed")
    if unknown := set(args.parts.split(",")) - {*PARTS, "several"}:
        parser.error(f"--parts {', '.join(sorted(unknown))} is unknown: expected some of {','.join(PARTS)},several")
    result = {"date": time.strftime("%Y-%m-%d"), "command": command(args), "cores": len(os.sched_getaffinity(0)),
              "gpus": [vars(g) for g in gpu.find()] if args.device == "gpu" else [], "versions": {}, "rows": []}
    if args.artifacts and args.out.exists():
        before = json.loads(args.out.read_text())
        result |= {"versions": before["versions"], "rows": before["rows"]}
        if not before["command"].endswith(result["command"]):
            result["command"] = f"{before['command']} && {result['command']}"
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), args)
        for row in bench.run():  # written after each part: one that ends the run leaves those before it
            print(f"{row['part']}: {row['seconds']:.1f} s, {row['what']}", flush=True)
            result["versions"] |= bench.versions
            result["rows"] = [r for r in result["rows"] if r["part"] != row["part"]] + [row]
            args.out.write_text(json.dumps(result, indent=1) + "\n")
    print("\n" + pipeline(result), flush=True)
    if args.docs:
        write_docs(run=args.out)
    sys.exit(any(row["failed"] for row in result["rows"]))


def command(args: argparse.Namespace) -> str:
    """What to type to run this again, on whatever folder and with whatever Pythons."""
    said = ["./run bench gpu --data FOLDER", *(f"--shell {s.partition('=')[0]}=COMMANDS" for s in args.shell),
            *(["--artifacts DIR"] if args.artifacts else []), f"--parts {args.parts}"]
    for name, usual in (("recipes", ""), ("epochs", 0), ("variants", ""), ("target-ms", 0), ("seconds", 15.0),
                        ("requests", 500), ("idle", 0.0), ("seed", 0), ("device", "gpu")):
        value = getattr(args, name.replace("-", "_"))
        said += [f"--{name} {value}"] if value != usual else []
    return " ".join(said)


class Bench:
    """One run: its Redis, its artifacts, its API, one worker at a time."""

    def __init__(self, folder: Path, args: argparse.Namespace):
        self.folder, self.args, self.device = folder, args, args.device
        self.shells = dict(s.split("=", 1) for s in args.shell)
        self.parts = args.parts.split(",")
        self.versions: dict[str, dict[str, str]] = {}  # service -> package -> version
        self.root = (args.artifacts or folder / "artifacts").resolve()
        self.root.mkdir(parents=True, exist_ok=True)
        self.api = Api(API_PORT)
        self.processes: dict[int, tuple[str, subprocess.Popen[bytes]]] = {}  # by pid

    def run(self) -> Iterator[Row]:
        redis = subprocess.Popen([self.args.redis, "--port", str(PORT), "--save", "", "--dir", self.folder],
                                 stdout=subprocess.DEVNULL)
        try:
            self.wait_for_redis()
            with self.service("inference", self.device, "inference"):
                self.wait_for_api()
                if "upload" in self.parts:
                    yield upload(self.api, self.args.data, self.folder / f"{self.args.data.name}.tar")
                for part in (self.preprocess, self.train, self.optimize, self.pipeline):
                    if part.__name__ in self.parts:
                        yield from part()
            if "serve" in self.parts:
                with self.service("inference", self.device, "inference"):
                    yield from self.serve(self.images())
            if "endpoint" in self.parts:
                with self.service("inference", self.device, "inference"):
                    self.answers(images := self.images())
                    size = read_json(self.root / "datasets" / self.newest("datasets") / "manifest.json")["spec"]["size"]
                    yield from endpoint(self.api, self.root, self.shells.get("inference", "true"), size, images[0],
                                        self.args.seconds)
            if "several" in self.parts:
                yield from several(self, max(2, len(gpu.find())), self.images())
            if "beside" in self.parts:
                yield from self.beside(self.images())
        finally:
            redis.terminate()
            redis.wait()

    def preprocess(self) -> Iterator[Row]:
        made = []
        for device in dict.fromkeys([self.device, "cpu"]):
            with self.worker("preprocessing", device):
                row = self.take({"kind": "preprocess", "source": "upload:images", "name": "images"},
                                f"preprocess on {device}")
            made += [] if row["failed"] else [row["made"]]
            yield row
        if len(made) == 2:
            yield self.compare(*made)

    def train(self) -> Iterator[Row]:
        with self.worker("training", self.device):
            for recipe in self.args.recipes.split(","):
                row = self.take({"kind": "train", "dataset_id": self.newest("datasets"), "name": "images",
                                 "recipe": recipe, "epochs": self.args.epochs}, f"train {recipe} on {self.device}")
                if not row["failed"]:
                    row["history"] = read_json(self.root / "models" / row["made"] / "history.json")
                yield row

    def optimize(self) -> Iterator[Row]:
        model_id = self.newest("models")
        some = {"variants": self.args.variants.split(",")} if self.args.variants else {}
        with self.worker("optimization", self.device):
            row = self.take({"kind": "optimize", "model_id": model_id, "name": "images", **some}, "optimize")
        if not row["failed"]:
            row["card"] = read_json(self.root / "cards" / f"{model_id}.json")
        yield row

    def pipeline(self) -> Iterator[Row]:
        """Submit to served: from one request, all workers waiting, to a prediction by the new version."""
        body = {"source": "upload:images", "name": "images",
                "train": {"recipe": self.args.recipes.split(",")[0], "epochs": self.args.epochs,
                          "seed": self.args.seed},
                "optimize": {"variants": self.args.variants.split(",")} if self.args.variants else {}}
        with ExitStack() as stack:
            stack.enter_context(self.service("keeper", self.device, "shared.keeper", LOG_LEVEL="WARNING"))
            for service in SERVICES:
                stack.enter_context(self.worker(service, self.device))
            with Redis(port=PORT) as redis:
                while not all(redis.scard(f"rq:workers:{service}") for service in SERVICES):
                    self.check()
                    time.sleep(0.05)
            time.sleep(self.args.idle)
            row = submit_to_served(self.api, body, self.images()[0], self.check)
        if not row["failed"]:
            row["card"] = read_json(self.root / "cards" / f"{row['made']}.json")
        yield row

    def images(self) -> list[bytes]:
        """About a thousand of the folder's, from all over it."""
        files = sorted(path for path in self.args.data.rglob("*") if path.is_file())
        return [path.read_bytes() for path in files[::max(1, len(files) // 1000)]]

    def serve(self, images: list[bytes]) -> Iterator[Row]:
        """Predictions of each variant of the device."""
        yield first_answer(self.api, images, self.check)
        for name, query in {"production": "", **variants(self.api, self.device)}.items():
            yield row_of(f"predict {name}", predictions(self.api, images, query, lambda n: n < self.args.requests))

    def beside(self, images: list[bytes]) -> Iterator[Row]:
        """Predictions alone, and beside trainings."""
        with self.service("inference", self.device, "inference"):
            self.answers(images)
            under_load(self.api, images[0], 1)
            alone = under_load(self.api, images[0], self.args.seconds)
            yield row_of("serve alone", alone)
            with self.worker("training", self.device):
                yield self.serve_beside(images[0], "")
        usual = (math.ceil(2 * alone["p99_ms"]), math.ceil(alone["p99_ms"]))
        for target in [self.args.target_ms] if self.args.target_ms else dict.fromkeys(usual):
            with self.service("inference", self.device, "inference", SERVING_P99_MS=str(target)):
                self.answers(images)
                with self.worker("training", self.device, SERVING_P99_MS=str(target)):
                    yield self.serve_beside(images[0], f", SERVING_P99_MS={target}")

    def answers(self, images: list[bytes]) -> None:
        if (row := first_answer(self.api, images, self.check))["failed"]:
            raise SystemExit(row["what"])

    def serve_beside(self, image: bytes, more: str) -> Row:
        found, told = beside_training(self.api, image, self.newest("datasets"), self.args.seconds, self.check)
        return row_of(f"serve beside a training{more}", found, told)

    def newest(self, kind: str) -> str:
        """The id of what was published last."""
        found = sorted((self.root / kind).glob("[!.]*"), key=lambda path: path.stat().st_mtime)
        if not found:
            raise SystemExit(f"{self.root / kind} is empty: run the part that fills it first")
        return found[-1].name

    def wait_for_redis(self) -> None:
        for _ in range(100):
            try:
                Redis(port=PORT).ping()
                return
            except RedisError:
                time.sleep(0.1)
        raise SystemExit(f"{self.args.redis} did not answer on port {PORT} within 10 s")

    def wait_for_api(self) -> None:
        for _ in range(600):
            self.check()
            try:
                self.api.ask("GET", "/livez")
                return
            except OSError:
                time.sleep(0.1)
        raise SystemExit(f"the API did not answer on port {API_PORT} within 60 s")

    def check(self) -> None:
        """Raise SystemExit when a process has ended that should run."""
        for name, process in [*self.processes.values()]:
            if process.poll() is not None:
                raise SystemExit(f"{name} ended with status {process.returncode}, see above")

    def worker(self, service: str, device: str, **settings: str) -> AbstractContextManager[None]:
        return self.service(service, device, f"shared.worker {service}", LOG_LEVEL="WARNING", **settings)

    @contextmanager
    def service(self, name: str, device: str, module: str, **more: str) -> Iterator[None]:
        settings = {"ARTIFACTS": str(self.root), "DEVICE": device, "REDIS_URL": f"redis://127.0.0.1:{PORT}/0",
                    "PORT": str(API_PORT), "TF_CPP_MIN_LOG_LEVEL": "2", **more}
        shell = self.shells.get(name) or (self.shells.get("inference") if name == "keeper" else None)
        start = f"{shell or 'true'}; exec {'python3' if shell else sys.executable}"
        if name in SHOWN and name not in self.versions:
            listed = subprocess.run(["bash", "-c", f'{start} -c "$0"', LIST_VERSIONS], check=True, capture_output=True,
                                    text=True).stdout
            self.versions[name] = versions_of(name, json.loads(listed.splitlines()[-1]))
        process = subprocess.Popen(["bash", "-c", f"{start} -m {module}"], env={**os.environ, **settings})
        self.processes[process.pid] = name, process
        try:
            yield
        finally:
            del self.processes[process.pid]
            process.terminate()
            process.wait(60)

    def take(self, body: Row, part: str) -> Row:
        """Have the API accept a job and wait for its end; seconds are its attempt's, `made` is what it publishes."""
        view = self.api.ask("POST", "/v1/jobs", body)
        told, line = time.monotonic(), ""
        stages: dict[str, float] = {}
        seen = time.monotonic()
        while not view["ended_at"]:
            self.check()
            time.sleep(0.05)
            view = self.api.ask("GET", f"/v1/jobs/{view['id']}")
            now_at = time.monotonic()
            if stage := (view["progress"] or {}).get("stage"):
                stages[stage] = stages.get(stage, 0.0) + now_at - seen
            seen = now_at
            if view["attempts"] and view["attempts"][-1].get("outcome") == "error":
                return {"part": part, "seconds": 0.0, "what": view["attempts"][-1]["message"], "failed": True}
            progress = view["progress"] or {}
            now = f"  {part}: {progress.get('stage')} {progress.get('percent')} % {progress.get('metrics')}"
            if now != line and time.monotonic() - told > 5:
                told, line = time.monotonic(), now
                print(line, flush=True)
        failed = view["state"] != "succeeded"
        made = view["job"].get({"preprocess": "dataset_id", "train": "model_id"}.get(body["kind"], ""), "")
        what = view["error"]["message"] if failed else f"{self.describe(body['kind'], made)}; {stages_of(stages)}"
        return {"part": part, "seconds": took(view), "failed": failed, "what": what, "made": made, "stages": stages}

    def describe(self, kind: str, made: str) -> str:
        match kind:
            case "preprocess":
                images = open_artifact(self.root, f"datasets/{made}", hashes=False)["summary"]["images"]
                return ", ".join(f"{split} {count:,}" for split, count in images.items()) + " images"
            case "train":
                epochs = read_json(self.root / "models" / made / "history.json")
                each = sorted(e["seconds"] for e in epochs[1:]) or [epochs[0]["seconds"]]
                best = max(e["validation_accuracy"] for e in epochs)
                return (f"{100 * best:.2f} % validation accuracy; first epoch {epochs[0]['seconds']:.1f} s, "
                        f"then {each[len(each) // 2]:.2f} s (median of {len(each)})")
            case _:
                return "built, measured, judged"

    def compare(self, one: str, other: str) -> Row:
        """Whether two Datasets have the same bytes in every file."""
        files = [open_artifact(self.root, f"datasets/{d}")["files"] for d in (one, other)]
        unlike = [name for name in files[0] if files[0][name] != files[1].get(name)]
        return {"part": "the same bytes on both", "seconds": 0.0, "failed": bool(unlike),
                "what": f"differ: {unlike}" if unlike else f"yes, all {len(files[0])} files"}


if __name__ == "__main__":
    main()
