"""The part `endpoint` of `./run bench gpu`: what the API answers a second, beside loops over the engine it serves from.

Tensors of BATCH images to /v2, and single images as most clients send them, by wrk in a closed loop, both on the host.
"""

import json
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from serving import binary, load
from serving_gpu import IMAGE, PREDICT, Api

BATCH = 256
TENSOR_CONNECTIONS, IMAGE_CONNECTIONS = (1, 2, 4, 8, 16), (1, 16, 64, 256)
TOP = Path(__file__).parent
Row = dict[str, Any]


def engine(root: Path, shell: str, model: str, variant: str) -> Row:
    """raw_engine.py's figures, in the Python of the service that `shell` prepares; nothing else asks the GPU."""
    command = f"{shell}; exec python3 {TOP}/raw_engine.py {root} {model} {variant} {BATCH}"
    done = subprocess.run(["bash", "-c", command], check=True, capture_output=True, text=True)
    found: Row = json.loads(done.stdout.splitlines()[-1])
    return found


def endpoint(api: Api, root: Path, shell: str, size: int, image: bytes, seconds: float) -> Iterator[Row]:
    """Rows of the production version of `images`, which takes `size` pixels a side."""
    alias = api.ask("GET", "/v1/models/images")["aliases"]["production"]
    variant = alias["variant"]
    raw: Row = {}
    if variant.startswith("tensorrt-"):
        raw = engine(root, shell, alias["model"], variant)
        rates, single = raw["images/s"], raw["batch 1, us"]
        yield {"part": f"engine {variant}", "seconds": 0.0, "failed": False, "engine": raw, "what":
               f"batches of {BATCH}: computed {rates['compute']:,.0f} images/s, with copies {rates['copies']:,.0f}, "
               f"the runner {rates['pinned']:,.0f}, a batch a call {rates['pinned, one batch']:,.0f}, that from plain "
               f"memory {rates['plain, one batch']:,.0f}; one image {single['copies']:.0f} us with copies, the runner "
               f"{single['runner']:.0f}"}
    best = raw["images/s"]["copies"] if raw else 0.0
    with tempfile.TemporaryDirectory() as folder:
        images = np.random.default_rng(0).integers(0, 256, (BATCH, size, size, 3), np.uint8)
        tensor = {"name": "images", "datatype": "UINT8", "shape": list(images.shape),
                  "parameters": {"binary_data_size": images.nbytes}}
        asked = {"tensors": ("/v2/models/images/infer", *binary(tensor, images.tobytes()), TENSOR_CONNECTIONS, BATCH),
                 "single image": (PREDICT, image, IMAGE, IMAGE_CONNECTIONS, 1)}
        for what, (path, content, headers, connections, count) in asked.items():
            file = Path(folder) / "body"
            file.write_bytes(content)
            for number in connections:
                load(api.port, path, file, headers, number, 1, None)
                seen = load(api.port, path, file, headers, number, max(1, round(seconds)), None)
                rate = seen["per_s"] * count
                share = f", {rate / best:.2f} of the engine with copies" if count > 1 and best else ""
                yield {"part": f"{what}, {number} connections", "seconds": seconds, "failed": bool(seen["bad"]),
                       "load": seen | {"images_per_s": rate}, "what":
                       f"{variant}: {rate:,.0f} images/s{share}; p50 {seen['p50_us'] / 1000:.2f} ms, p99 "
                       f"{seen['p99_us'] / 1000:.2f} ms, {seen['bad']} bad"}
