"""TensorRT on a GPU host: engines built cold and again, their answers, and the runner against a loop over TensorRT.

    ./run bench tensorrt_gpu [--network small|seed-cnn|cifarnet] [--precisions fp32,fp16,int8] [--out x.json]
    ./run bench tensorrt_gpu --dry-run            no GPU: train, export, calibrate, compare the ONNX files

The network is trained for a moment on coloured noise. `cold` builds an engine with an empty timing cache, `again`
builds that of another training of the same network with the cache that the first left. `as Keras` is the engine's share
of Keras's labels on 1,024 images. The runner and the loops take turns; figures are medians of the rounds.

At batch 1: `enqueue` is execute_async_v3 on data that is on the GPU and a wait, `graph` the same as a CUDA graph,
`copies` enqueue with the image sent up and the scores fetched; `runner` is TensorRTSession.run on an ordinary array.
At the largest batch, over 32 batches: `compute` is execute_async_v3 again and again on data that is on the GPU,
`copies` two streams from page-locked memory; `pinned` is one TensorRTSession.run on a page-locked array, `plain` on an
ordinary one. Exit status 1: an engine failed, or one of the checks on planted faults.
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
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np

from optimization.build import PROFILE, agreement, tools
from optimization.export import export
from optimization.reference import use_cpu
from shared import gpu
from shared.datasets import Spec
from shared.runtimes import load, run_in_chunks
from training import networks
from training.recipes import RECIPES

ROOT = Path(__file__).resolve().parents[1]
SPEC = Spec(32, tuple("abcdefghij"), (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
LATENCY_GOAL_US, RATE_GOAL, REBUILD_GOAL = 15, 0.95, 0.1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="small", choices=[*RECIPES, "cifarnet"])
    parser.add_argument("--precisions", default="fp32,fp16,int8")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=60, help="of training, batches of 128")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ".")) / "tensorrt_gpu.json")
    args = parser.parse_args()
    use_cpu(len(os.sched_getaffinity(0)))
    result: dict[str, Any] = {"command": sys.argv, "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                              "gpus": [asdict(g) for g in gpu.find()], "cores": len(os.sched_getaffinity(0)),
                              "network": args.network, "rounds": args.rounds, "rows": []}
    if not args.dry_run:
        from shared.runtimes.plan import here

        result["host"] = asdict(here())
    result["versions"] = {"python": platform.python_version(), **tools(), **bindings()}
    print(json.dumps({key: result[key] for key in ("gpus", "cores", "versions")}), flush=True)
    images, labels = coloured(4096, 0)
    first, second = (trained(args.network, images, labels, seed, args.steps) for seed in (0, 1))
    with tempfile.TemporaryDirectory() as temp:
        for precision in args.precisions.split(","):
            row: dict[str, Any] = {"precision": precision}
            result["rows"].append(row)
            try:
                take(row, Path(temp), precision, first, second, args)
            except Exception as e:  # one precision's failure must not cost the others' figures
                traceback.print_exc()
                row["failed"] = f"{type(e).__name__}: {e}"
            args.out.write_text(json.dumps(result, indent=1))
    show(result, args.dry_run)
    sys.exit(any("failed" in row or set(row.get("checks", {}).values()) - {"OK"} for row in result["rows"]))


def bindings() -> dict[str, str]:
    try:
        return {"cuda-bindings": version("cuda-bindings")}
    except PackageNotFoundError:
        return {}


def coloured(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Ten tints under noise: uint8 [N, 32, 32, 3] and int32 [N]."""
    rng = np.random.default_rng(seed)
    labels = (np.arange(count) % 10).astype(np.int32)
    tints = np.random.default_rng(9).uniform(-50, 50, (10, 3))[labels]
    images = 128 + tints[:, None, None] * np.linspace(0.5, 1, 32)[:, None] + rng.normal(0, 40, (count, 32, 32, 3))
    return np.clip(images, 0, 255).astype(np.uint8), labels


def trained(name: str, images: np.ndarray, labels: np.ndarray, seed: int, steps: int) -> keras.Model:
    keras.utils.set_random_seed(seed)
    model = cifarnet() if name == "cifarnet" else networks.build(RECIPES[name], SPEC)
    model.compile(keras.optimizers.Adam(1e-3), "sparse_categorical_crossentropy")
    chosen = np.resize(np.random.default_rng(seed).permutation(len(images)), 128 * steps)
    model.fit(images[chosen].astype(np.float32), labels[chosen], batch_size=128, verbose=0)
    return model


def cifarnet() -> keras.Model:
    """The shape of airbench's CifarNet (0.24 GFLOP an image), with SiLU."""
    layers = keras.layers
    image = keras.Input((32, 32, 3))
    x = layers.Rescaling(1 / 64, -2.0)(image)
    x = layers.Activation("silu")(layers.Conv2D(24, 2)(x))
    for width in (64, 256, 256):
        for number in range(2):
            x = layers.Conv2D(width, 3, padding="same", use_bias=False)(x)
            x = layers.MaxPooling2D()(x) if number == 0 else x
            x = layers.Activation("silu")(layers.BatchNormalization(momentum=0.8)(x))
    x = layers.Flatten()(layers.MaxPooling2D(3)(x))
    return keras.Model(image, layers.Softmax()(layers.Dense(10)(x)))


def take(row: dict[str, Any], temp: Path, precision: str, first: keras.Model, second: keras.Model,
         args: argparse.Namespace) -> None:
    """Everything of one precision, told as it comes."""
    calibration, validation = coloured(256, 1)[0], coloured(1024, 2)[0]
    files = []
    for number, model in enumerate((first, second)):
        folder = temp / f"{precision}-{number}"
        folder.mkdir()
        began = time.perf_counter()
        row |= export(model, "tensorrt", precision, calibration, folder / "model.onnx", validation)
        row["export_s"] = time.perf_counter() - began
        files.append(folder / "model.onnx")
    expected = first.predict(validation.astype(np.float32), batch_size=256, verbose=0)
    with_onnx = load(files[0].parent, "onnx")
    row["onnx"] = agreement(expected, run_in_chunks(with_onnx, validation, 64))
    with_onnx.close()
    print(precision, json.dumps(row), flush=True)
    if args.dry_run:
        return
    from raw_engine import latency, throughput

    from optimization.engine import ensure
    from shared.runtimes.tensorrt import TensorRTSession

    plans = []
    for name, onnx in zip(("cold", "again"), files, strict=True):
        began = time.perf_counter()
        path, _ = ensure(temp / f"engines-{precision}", onnx, precision, PROFILE, lambda session: None)
        row[f"{name}_s"] = time.perf_counter() - began
        plans.append(path)
        print(f"{precision} {name} build {row[f'{name}_s']:.1f} s, {path.stat().st_size:,} bytes", flush=True)
    row["bytes"] = plans[0].stat().st_size
    began = time.perf_counter()
    session = TensorRTSession(plans[0])
    row["open_s"] = time.perf_counter() - began
    row["engine"] = agreement(expected, run_in_chunks(session, validation, 64))
    row["checks"] = checked(temp, files[0], plans[0], precision, session)
    row["batch 1"] = latency(plans[0], session, args.rounds)
    print(precision, json.dumps(row["batch 1"]), flush=True)
    row["largest batch"] = throughput(plans[0], session, PROFILE[2], args.rounds)
    print(precision, json.dumps(row["largest batch"]), flush=True)
    session.close()


def checked(temp: Path, onnx: Path, plan: Path, precision: str, session: Any) -> dict[str, str]:
    """The checks of tests/optimization/engines.py, planted faults among them, each with its verdict."""
    spec = importlib.util.spec_from_file_location("engines", ROOT / "tests" / "optimization" / "engines.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    verdicts = {}
    for check in module.CHECKS:
        with tempfile.TemporaryDirectory(dir=temp) as folder:
            try:
                check(Path(folder), onnx, plan, precision, session)
                verdicts[check.__name__] = "OK"
            except Exception as e:  # whatever it is, it is this check's verdict
                traceback.print_exc()
                verdicts[check.__name__] = f"FAIL {type(e).__name__}: {e}"[:500]
        print(f"{verdicts[check.__name__][:4]:5} {precision} {check.__name__}", flush=True)
    return verdicts


def show(result: dict[str, Any], dry: bool) -> None:
    rows = [row for row in result["rows"] if "failed" not in row]
    for row in result["rows"]:
        if "failed" in row:
            print(f"{row['precision']}: FAILED {row['failed'][:150]}")
    if dry:
        return
    print(f"\n{result['network']} on {result['host']['gpu']}, TensorRT {result['host']['tensorrt']}")
    print(f"{'':5} {'cold s':>7} {'again s':>8} {'ratio':>6} {'KiB':>7} {'as Keras':>9} {'max diff':>9}")
    for row in rows:
        print(f"{row['precision']:5} {row['cold_s']:7.1f} {row['again_s']:8.1f} {row['again_s'] / row['cold_s']:6.3f} "
              f"{row['bytes'] // 1024:7} {row['engine']['agreement']:9.4f} {row['engine']['max_difference']:9.2g}")
    for title, unit in (("batch 1", "us a call"), ("largest batch", "images/s")):
        print(f"\n{title}, {unit}")
        for row in rows:
            print(f"{row['precision']:5} " + "  ".join(f"{name} {value:,.1f}" for name, value in row[title].items()))
    print()
    for row in rows:
        single, many = row["batch 1"], row["largest batch"]
        goals = {f"rebuild at most {REBUILD_GOAL} of the cold build": row["again_s"] / row["cold_s"] <= REBUILD_GOAL,
                 f"batch 1 within {LATENCY_GOAL_US} us of the loop with copies":
                     single["runner"] - single["copies"] <= LATENCY_GOAL_US,
                 f"batch 1 within {LATENCY_GOAL_US} us of enqueue alone":
                     single["runner"] - single["enqueue"] <= LATENCY_GOAL_US,
                 f"largest batch at least {RATE_GOAL} of the loop with copies":
                     many["pinned"] >= RATE_GOAL * many["copies"],
                 f"largest batch at least {RATE_GOAL} of compute alone": many["pinned"] >= RATE_GOAL * many["compute"]}
        for goal, met in goals.items():
            print(f"{row['precision']:5} {'met   ' if met else 'MISSED'} {goal}")


if __name__ == "__main__":
    main()
