"""The part `several` of `./run bench gpu`: what a host of several GPUs does with all of them.

A training on one, trainings at once, each on a GPU of its own, one training on all; then the API with a process on each
GPU, and with two. `memory`: the most MiB of each GPU that nvidia-smi showed.
"""

import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from endpoint_gpu import endpoint

from shared import gpu
from shared.artifacts import read_json

if TYPE_CHECKING:
    from gpu import Bench

EVERY_S = 0.3  # nvidia-smi is asked
Row = dict[str, Any]


@contextmanager
def memory() -> Iterator[list[int]]:
    """A list that has, when the block is over, the most MiB in use of each GPU meanwhile; empty without one."""
    most: list[int] = []
    over = threading.Event()

    def look() -> None:
        while not over.wait(EVERY_S):
            if len(used := _used()) == len(most or used):  # a GPU in trouble is left out
                most[:] = [max(pair) for pair in zip(most or used, used, strict=True)]

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield most
    finally:
        over.set()
        thread.join()


def _used() -> list[int]:
    try:
        text = subprocess.run(["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"], check=False,
                              capture_output=True, text=True).stdout
    except OSError:
        return []
    return [int(line) for line in text.splitlines() if line.strip().isdigit()]


def with_memory(row: Row, most: list[int]) -> Row:
    told = f"; most MiB of each GPU in use: {', '.join(f'{mib:,}' for mib in most)}" if most else ""
    return row | {"memory": most, "what": row["what"] + told}


def several(bench: "Bench", count: int, images: list[bytes]) -> Iterator[Row]:
    """Rows of what `count` GPUs do; the dataset and the production version are those made last."""
    if bench.device == "gpu" and count > len(gpu.find()):
        raise SystemExit(f"the part several needs {count} GPUs, and {len(gpu.find())} can be seen")
    yield from trainings(bench, count)
    root, device = bench.root, bench.device
    size = read_json(root / "datasets" / bench.newest("datasets") / "manifest.json")["spec"]["size"]
    for processes in (count, 2 * count):
        with bench.service("inference", device, "inference", HTTP_PROCESSES=str(processes)):
            bench.answers(images)
            for row in _watched(endpoint(bench.api, root, bench.shells.get("inference", "true"), size, images[0],
                                         bench.args.seconds)):
                yield row | {"part": f"HTTP_PROCESSES={processes}: {row['part']}"}


def trainings(bench: "Bench", count: int) -> Iterator[Row]:
    """One alone, as many at once as there are GPUs, and one on all."""
    recipe = bench.args.recipes.split(",")[0]
    body = {"kind": "train", "dataset_id": bench.newest("datasets"), "name": "several", "recipe": recipe,
            "epochs": bench.args.epochs}
    with bench.service("inference", bench.device, "inference"):
        bench.wait_for_api()
        with bench.worker("training", bench.device):
            with memory() as most:
                row = bench.take(body, f"train {recipe}, one alone")
            yield with_memory(row, most)
        with ExitStack() as stack, ThreadPoolExecutor(count) as pool:
            for _ in range(count):
                stack.enter_context(bench.worker("training", bench.device))
            with memory() as most:
                rows = list(pool.map(lambda number: bench.take(body | {"seed": number},
                                                               f"train {recipe}, {number} of {count} at once"),
                                     range(1, count + 1)))
            yield from (with_memory(row, most) for row in rows)
        with bench.worker("training", bench.device, GPUS_PER_TRAINING=str(count)):
            with memory() as most:
                row = bench.take(body, f"train {recipe}, one on {count}")
            yield with_memory(row, most)


def _watched(rows: Iterator[Row]) -> Iterator[Row]:
    while True:
        with memory() as most:
            row = next(rows, None)
        if row is None:
            return
        yield with_memory(row, most)
