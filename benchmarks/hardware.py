"""docs/hardware.md and the pipeline's part of docs/benchmarks/gpu.md, rendered from what was recorded beside them.

In docs/benchmarks: gpu.json is the last run of `./run bench gpu` on a GPU, several.json that of its part `several`,
tensorrt.json that of benchmarks/tensorrt_gpu.py, images.json what `./run bench images` built.
"""

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[1] / "docs"
BEGIN, END = "<!-- written by benchmarks/gpu.py -->", "<!-- end of what is written -->"
BEGIN_SEVERAL = "<!-- written by benchmarks/gpu.py, of several GPUs -->"
SHOWN = {"preprocessing": ("cudf", "cupy", "pandas", "numpy", "pyarrow"), "training": ("tensorflow", "keras"),
         "optimization": ("onnxruntime", "tensorrt", "ai-edge-litert", "tensorflow", "keras", "cuda-bindings"),
         "inference": ("onnxruntime", "tensorrt", "ai-edge-litert", "numpy", "cuda-bindings", "flask", "granian",
                       "uvloop")}
# Run in the Python of a service: its version and those of all packages there, as JSON.
LIST_VERSIONS = ("import importlib.metadata as m, json, platform as p; print(json.dumps({'python': p.python_version(),"
                 " **{d.name.lower().replace('_', '-'): d.version for d in m.distributions()}}))")

INTRODUCTION = """# What ran where

Written by `./run bench gpu` and `./run bench images` from what they saw, not by hand.

*ran*: on such hardware, with the result in [benchmarks/](benchmarks/gpu.md). *built*: the image builds, all but
TensorRT, and its packages import; no GPU was there. *checked only*: written and tested as far as a host without a GPU
can, never run on one. `device` in a prediction and in a card's rows says what computed: where a host has no GPU that is
the CPU, and for LiteRT everywhere.

| part | state |
|---|---|
"""

Result = Mapping[str, Any]


def versions_of(service: str, found: Mapping[str, str]) -> dict[str, str]:
    """Of all versions, those that matter to a service's figures: Python's and those of SHOWN, in its order."""
    chosen = {"python": found["python"]}
    for package in SHOWN[service]:
        chosen |= {name: found[name] for name in sorted(found)
                   if re.fullmatch(rf"{package}(-(cpu|gpu|cu\d+|cuda\d+x))?", name)}
    return chosen


def write_docs(docs: Path = DOCS, run: Path | None = None) -> None:
    """Render both pages anew; `run` is a JSON file of a run on a GPU, which becomes the recorded one."""
    if run:
        found = json.loads(run.read_text())
        if not found["gpus"]:
            raise SystemExit(f"{run} is of a host without a GPU: it says nothing of what ran on one")
        parts = {part for some in re.findall(r"--parts (\S+)", found["command"]) for part in some.split(",")}
        if "several" in parts and len(parts) > 1:
            raise SystemExit(f"{run} has the part several among others: run it alone, it is recorded by itself")
        record = docs / "benchmarks" / ("several.json" if "several" in parts else "gpu.json")
        if run.resolve() != record.resolve():
            shutil.copyfile(run, record)
    result, several, images, engines = (json.loads((docs / "benchmarks" / f"{name}.json").read_text())
                                        for name in ("gpu", "several", "images", "tensorrt"))
    page = docs / "benchmarks" / "gpu.md"
    text = page.read_text()
    for begin, of in ((BEGIN, result), (BEGIN_SEVERAL, several)):
        before, _, rest = text.partition(begin)
        text = f"{before}{begin}\n{pipeline(of)}{END}{rest.partition(END)[2]}"
    page.write_text(text)
    (docs / "hardware.md").write_text(hardware(result, images, engines, several))


def pipeline(result: Result) -> str:
    """Markdown: machine, versions, command, and a table of every part, those that failed as well."""
    versions = "; ".join(f"{service}: {_list(found)}" for service, found in result["versions"].items())
    lines = [f"{result['date']}, {machine(result)}. {versions}.", "", f"`{result['command']}`", "",
             "| part | seconds | |", "|---|---|---|"]
    lines += [f"| {row['part']} | {'failed' if row['failed'] else format(row['seconds'], '.1f')} | {row['what']} |"
              for row in result["rows"]]
    measured = [v for v in variants(result) if v["state"] == "measured"]
    if measured:
        batches = list(measured[0]["images_per_s"])
        rates = "".join(f" images/s at {batch} |" for batch in batches)
        lines += ["", f"| variant | device | accuracy | p50 ms |{rates}", "|---" * (4 + len(batches)) + "|"]
        lines += [f"| {v['variant']} | {v.get('device', 'cpu')} | {100 * v['accuracy']:.2f} % | "
                  f"{v['latency_ms']['p50']:.2f} |" + "".join(f" {v['images_per_s'][b]:,.0f} |" for b in batches)
                  for v in measured]
    return "\n".join(lines) + "\n"


def machine(result: Result) -> str:
    """GPUs with their driver, and cores."""
    cards = result["gpus"]
    if not cards:
        return f"no GPU, {result['cores']} CPU cores"
    return f"{len(cards)} x {cards[0]['name']} (driver {cards[0]['driver']}), {result['cores']} CPU cores"


def variants(result: Result) -> list[dict[str, Any]]:
    """The rows of every release card in the result."""
    return [variant for row in result["rows"] for variant in row.get("card", {}).get("rows", [])]


def hardware(result: Result, images: Mapping[str, Any], engines: Result, several: Result) -> str:
    """docs/hardware.md: what the recorded runs saw ran, what `images` has is built, the rest is checked only."""
    on_gpu = [row["part"] for row in result["rows"] if not row["failed"]] if result["gpus"] else []
    formats = {v["format"] for v in variants(result) if v["state"] == "measured" and v.get("device", "cpu") != "cpu"}
    served = [row["serving"] for row in result["rows"] if "serving" in row and not row["failed"]]
    served = [s for s in served if s["device"] != "cpu"] if result["gpus"] else []
    ran = [  # part, whether the run saw it, the service whose versions matter
        ("preprocessing on cuDF and CuPy", "preprocess on gpu" in on_gpu, "preprocessing"),
        ("preprocessing: the CPU path's bytes", {"preprocess on gpu", "the same bytes on both"} <= {*on_gpu},
         "preprocessing"),
        ("training on a GPU", any(p.startswith("train ") and p.endswith(" on gpu") for p in on_gpu), "training"),
        ("a worker's start-up check, a GPU lease of each job", any(part.endswith(" on gpu") for part in on_gpu), ""),
        ("ONNX Runtime on a GPU", bool(on_gpu) and "onnx" in formats, "optimization"),
        ("TensorRT variants through the optimization worker", bool(on_gpu) and "tensorrt" in formats, "optimization"),
        ("serving on a GPU, in the API", bool(served), "inference"),
        ("predictions beside a training on one GPU", any("yielded_s" in s for s in served), "inference"),
    ]
    rows = [("everything with DEVICE=cpu, plain and in Compose", "ran (x86-64, 2 cores; the tests)")]
    for part, seen, service in ran:
        versions = result["versions"].get(service)
        where = f"ran on {machine(result)}, {result['date']}" + (f": {_list(versions)}" if versions else "")
        rows.append((part, where if seen else "checked only"))
    built = [row["precision"] for row in engines["rows"] if set(row.get("checks", {}).values()) == {"OK"}]
    rows.append(("TensorRT engines built, checked and run", f"ran on {machine(engines)}, {engines['when'][:10]}: "
                 f"{', '.join(built)} with TensorRT {engines['host']['tensorrt']}" if built else "checked only"))
    rows += [(f"image with DEVICE=gpu: {service}",
              f"built {images[service]['date']}: {_list(images[service]['versions'])}" if service in images
              else "checked only") for service in SHOWN]
    rows += [(f"several GPUs: {what}", on_several(several, part)) for what, part in
             (("a training on each", "at once"), ("one training on all", "one on "),
              ("processes of the API spread over them", "HTTP_PROCESSES="))]
    rows += [("TensorRT's layer of the images: optimization, inference", "checked only: it needs NVIDIA's own index"),
             ("containers with a GPU reserved", "checked only: the rendered Compose file is tested"),
             ("half the batch after a lack of GPU memory", "checked only: the test plants the lack"),
             ("a GPU that goes out of a worker's sight", "checked only: a stand-in for nvidia-smi shows none")]
    return INTRODUCTION + "".join(f"| {part} | {state} |\n" for part, state in rows)


def on_several(several: Result, part: str) -> str:
    """What rows of a run on several GPUs say, those whose names have `part` in them."""
    found = [row for row in several["rows"] if part in row["part"]]
    if not found or any(row["failed"] for row in found) or len(several["gpus"]) < 2:
        return "checked only"
    versions = several["versions"]["inference" if "HTTP" in part else "training"]
    return f"ran on {machine(several)}, {several['date']}: {_list(versions)}"


def _list(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {number}" for name, number in versions.items())
