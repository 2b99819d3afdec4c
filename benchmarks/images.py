"""Builds services' images with DEVICE=gpu, all but TensorRT, and imports their packages there; no GPU is needed.

    ./run bench images optimization inference

What was seen is kept in docs/benchmarks/images.json and told by docs/hardware.md.
"""

import argparse
import json
import subprocess
import time

from hardware import DOCS, LIST_VERSIONS, SHOWN, versions_of, write_docs

IMPORTS = {"preprocessing": "cudf, cupy, pyarrow, preprocessing.jobs", "training": "tensorflow, keras, training.jobs",
           "optimization": "tensorflow, onnxruntime, ai_edge_litert, cuda.bindings.runtime, optimization.release",
           "inference": "onnxruntime, ai_edge_litert, cuda.bindings.runtime, inference.app"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("services", nargs="+", choices=list(SHOWN), metavar="SERVICE")
    record = DOCS / "benchmarks" / "images.json"
    for service in parser.parse_args().services:
        tag = f"lanner-{service}:gpu"
        docker("build", "--file", "services/Dockerfile", "--target", "service", "--build-arg", f"SERVICE={service}",
               "--build-arg", "DEVICE=gpu", "--tag", tag, ".")
        run = ("run", "--rm", "--network", "none", tag, "python", "-c")
        docker(*run, f"import {IMPORTS[service]}")
        found = json.loads(docker(*run, LIST_VERSIONS))
        images = json.loads(record.read_text()) if record.exists() else {}
        images[service] = {"date": time.strftime("%Y-%m-%d"), "versions": versions_of(service, found)}
        record.write_text(json.dumps({name: images[name] for name in SHOWN if name in images}, indent=1) + "\n")
        write_docs()
        print(service, images[service], flush=True)


def docker(*args: str) -> str:
    """What a docker command prints; the error of one that fails goes to the terminal."""
    return subprocess.run(["docker", *args], cwd=DOCS.parent, check=True, stdout=subprocess.PIPE, text=True).stdout


if __name__ == "__main__":
    main()
