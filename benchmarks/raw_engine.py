"""Loops over TensorRT without the runner, and the runner beside them: what a GPU could do, and what is left of it.

    python raw_engine.py ROOT MODEL VARIANT [BATCH]       a published Variant's, at batch 1 and at BATCH; JSON
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from shared.runtimes import ENGINES, cuda
from shared.runtimes.plan import here, path_of, read
from shared.runtimes.tensorrt import TensorRTSession, deserialize, tensors

BATCHES_A_RUN = 32
ROUNDS = 7
Loop = Callable[[], object]


class Raw:
    """A loop over TensorRT without the runner: a stream, a context, its tensors on the GPU and page-locked."""

    def __init__(self, engine: Any, batch: int):
        (images,), (scores,) = tensors(engine)
        shape, classes = (batch, *tuple(engine.get_tensor_shape(images))[1:]), engine.get_tensor_shape(scores)[1]
        self.up, self.down = int(np.prod(shape)), 4 * batch * classes
        self.stream, self.context = cuda.Stream(), engine.create_execution_context()
        self.images, self.scores = cuda.Memory(self.up), cuda.Memory(self.down)
        self.host_images, self.host_scores = cuda.Pinned(shape, np.uint8), cuda.Pinned((batch, classes), np.float32)
        self.context.set_optimization_profile_async(0, self.stream.number)  # a second context has none by itself
        self.stream.wait()
        self.context.set_input_shape(images, shape)
        self.context.set_tensor_address(images, self.images.pointer)
        self.context.set_tensor_address(scores, self.scores.pointer)
        self.compute()
        self.stream.wait()
        with cuda.capture(self.stream) as graphs:
            self.compute()
        self.graph = graphs[0]

    def compute(self) -> None:
        self.context.execute_async_v3(self.stream.number)

    def copies(self) -> None:
        self.stream.upload(self.images.pointer, self.host_images.pointer, self.up)
        self.compute()
        self.stream.download(self.host_scores.pointer, self.scores.pointer, self.down)

    def launch(self) -> None:
        self.stream.launch(self.graph)


def latency(plan: Path, session: Any, rounds: int, calls: int = 400) -> dict[str, float]:
    """Microseconds a call at batch 1."""
    raw = Raw(deserialize(plan, read(plan, here())[1]), 1)
    image = np.zeros_like(raw.host_images.array)

    def waited(start: Loop) -> Loop:
        def once() -> None:
            start()
            raw.stream.wait()
        return once

    loops = {"enqueue": waited(raw.compute), "graph": waited(raw.launch), "copies": waited(raw.copies),
             "runner": lambda: session.run(image)}
    return {name: 1e6 * seconds for name, seconds in in_turns(loops, rounds, calls).items()}


def throughput(plan: Path, session: Any, batch: int, rounds: int) -> dict[str, float]:
    """Images/s at a size of batch, BATCHES_A_RUN of them a run; `pinned` and `plain` give them to the runner as one."""
    engine = deserialize(plan, read(plan, here())[1])
    lanes = [Raw(engine, batch), Raw(engine, batch)]
    pinned = session.pinned(BATCHES_A_RUN * batch)
    pinned[:] = np.random.default_rng(0).integers(0, 256, pinned.shape, np.uint8)
    plain = pinned.copy()

    def over(step: Callable[[Raw], None], chosen: list[Raw]) -> Loop:
        def run() -> None:
            for number in range(BATCHES_A_RUN):
                step(chosen[number % len(chosen)])
            for lane in chosen:
                lane.stream.wait()
        return run

    def singly(images: np.ndarray) -> Loop:
        return lambda: [session.run(images[i:i + batch]) for i in range(0, len(images), batch)]

    loops = {"compute": over(Raw.compute, lanes[:1]), "compute graph": over(Raw.launch, lanes[:1]),
             "copies": over(Raw.copies, lanes), "pinned": lambda: session.run(pinned),
             "plain": lambda: session.run(plain), "pinned, one batch": singly(pinned),
             "plain, one batch": singly(plain)}
    images = BATCHES_A_RUN * batch
    return {name: images / seconds for name, seconds in in_turns(loops, rounds, 5).items()}


def in_turns(loops: dict[str, Loop], rounds: int, calls: int) -> dict[str, float]:
    """Seconds a call: each round's mean, the rounds in turns, their median."""
    times: dict[str, list[float]] = {name: [] for name in loops}
    for loop in loops.values():
        loop()
    for number in range(rounds):
        for name in list(loops)[:: 1 if number % 2 == 0 else -1]:
            began = time.perf_counter()
            for _ in range(calls):
                loops[name]()
            times[name].append((time.perf_counter() - began) / calls)
    return {name: median(seconds) for name, seconds in times.items()}


def main(root: Path, model: str, variant: str, batch: int = 256) -> None:
    onnx = root / "variants" / model / variant / "model.onnx"
    plan = path_of(root / ENGINES, onnx, here())
    session = TensorRTSession(plan)
    print(json.dumps({"batch 1, us": latency(plan, session, ROUNDS), "batch": batch,
                      "images/s": throughput(plan, session, batch, ROUNDS)}), flush=True)
    session.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:4], *map(int, sys.argv[4:]))
