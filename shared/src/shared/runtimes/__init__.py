"""A loaded Variant that answers `run(batch)`. Optimization measures the same code that inference serves."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from shared.artifacts import Manifest, open_artifact, sha256
from shared.errors import Damaged

# A TensorRT Variant is the ONNX file its engines are built from; the engines of each kind of GPU are in ENGINES.
FILES = {"onnx": "model.onnx", "litert": "model.tflite", "tensorrt": "model.onnx"}
ENGINES = "engines"
MAX_BATCH = 64  # images that run at once on a CPU: more are no faster, and what comes meanwhile waits longer
# Largest difference of a probability from the recorded one at load, per precision; int8 also needs 99 % equal argmax.
FEW = 8  # images of a golden batch that are run together where somebody else waits for the processor
TOLERANCE = {"fp32": 1e-3, "fp16": 1e-2, "int8": 5e-2}


class Begun(Protocol):
    """A batch that a Session has begun."""

    def is_over(self) -> bool: ...

    def scores(self) -> np.ndarray:
        """float32 [N, classes] probabilities; waits until it is over. Raises what the runtime does."""
        ...


@dataclass
class Over(Begun):
    """One that was over at once."""

    found: np.ndarray

    def is_over(self) -> bool:
        return True

    def scores(self) -> np.ndarray:
        return self.found


class Session(Protocol):
    """One loaded Variant. Not thread-safe: one caller at a time.

    device: what computes, cpu or the GPU's name. own_thread: always the same thread is to call it. batches: sizes that
    are set up at their first run; the largest is how many images had best run at once. ahead: how many batches may be
    under way at one time.
    """

    device: str
    own_thread: bool = False
    batches: Sequence[int] = (1, MAX_BATCH)
    ahead: int = 1

    def run(self, batch: np.ndarray) -> np.ndarray:
        """uint8 [N, size, size, 3] RGB -> float32 [N, classes] probabilities, N >= 1; nothing is under way."""
        ...

    def begin(self, parts: Sequence[np.ndarray]) -> Begun:
        """`run` for the images of several requests as one batch, batches[-1] at most, which stay as they are until it
        is over. Who has begun as many as `ahead` takes the scores of the first before the next.
        """
        return Over(self.run(parts[0] if len(parts) == 1 else np.concatenate(parts)))

    def room(self, size: int) -> memoryview:
        """Bytes for images that are still to come, where they are best read from; any thread may ask."""
        return np.empty(size, np.uint8).data

    def close(self) -> None: ...


def open_session(root: Path, model_id: str, variant: str, threads: int = 1,
                 device: str = "cpu", between: Callable[[], None] | None = None) -> tuple[Session, Manifest]:
    """Load a published Variant: hashes checked, then its golden batch. `device` is what DEVICE says, cpu or gpu.

    between: called after each few images of the golden batch, so that other work gets its turn.

    Raises:
        NotFound: it is not published.
        Damaged: its bytes, or its answers to the golden batch, are not those that were published.
        Unfit: a TensorRT Variant has no engine for this host.
        Refused: `device` is gpu and ONNX Runtime can't compute on one here.
    """
    target = f"variants/{model_id}/{variant}"
    manifest = open_artifact(root, target)
    session = load(root / target, manifest["format"], threads, root / ENGINES, device)
    try:
        check_golden(root / target, manifest["precision"], session, between)
    except BaseException:
        session.close()
        raise
    return session, manifest


def load(folder: Path, format: str, threads: int = 1, engines: Path = Path(ENGINES), device: str = "cpu") -> Session:
    """The Session of a Variant's file in `folder`; the one place that picks a runtime.

    `device` is ONNX Runtime's choice alone: LiteRT computes on the CPU, TensorRT on the GPU.
    """
    match format:
        case "onnx":
            from shared.runtimes.onnx import OnnxSession

            return OnnxSession(folder / FILES["onnx"], threads, device)
        case "litert":
            from shared.runtimes.litert import LiteRTSession

            return LiteRTSession(folder / FILES["litert"], threads)
        case "tensorrt":
            from shared.runtimes.plan import here, path_of

            onnx = folder / FILES["tensorrt"]
            plan = path_of(engines, onnx, here())
            from shared.runtimes.tensorrt import TensorRTSession

            return TensorRTSession(plan, sha256(onnx))
        case _:
            raise Damaged(f"variant format {format!r} is unknown: expected one of {', '.join(FILES)}")


def check_golden(folder: Path, precision: str, session: Session, between: Callable[[], None] | None = None) -> None:
    """Run the golden batch that travels with a Variant and compare with the scores it gave when it was published.

    golden.npz: images uint8 [256, S, S, 3] (fewer in a small dataset), probabilities float32 [256, K].

    Raises:
        Damaged: a probability is off by more than TOLERANCE, or, at int8, fewer than 99 % of the argmaxes agree.
    """
    with np.load(folder / "golden.npz", allow_pickle=False) as golden:
        images, expected = golden["images"], golden["probabilities"]
    scores = run_in_chunks(session, images, FEW, between) if between else run_in_chunks(session, images)
    compare_golden(expected, scores, precision, folder.name)


def run_in_chunks(session: Session, images: np.ndarray, size: int = 32,
                  between: Callable[[], None] | None = None) -> np.ndarray:
    """`session.run` over many images, `size` at a time, so that memory does not grow with their number.

    between: called after each.
    """
    scores = []
    for start in range(0, len(images), size):
        scores.append(session.run(np.ascontiguousarray(images[start:start + size])))
        if between:
            between()
    return np.concatenate(scores)


def compare_golden(expected: np.ndarray, got: np.ndarray, precision: str, what: str) -> None:
    """Raise Damaged unless `got` is `expected` within the precision's tolerance; both float32 [N, K]."""
    if got.shape != expected.shape or not np.isfinite(got).all():
        raise Damaged(f"{what}: the golden batch gave {got.shape}, finite {bool(np.isfinite(got).all())}; "
                      f"expected {expected.shape} finite probabilities")
    worst = float(np.abs(got - expected).max())
    agree = float((got.argmax(1) == expected.argmax(1)).mean())
    if worst > TOLERANCE[precision] or (precision == "int8" and agree < 0.99):
        raise Damaged(f"{what}: the golden batch is off by {worst:.2g} (allowed {TOLERANCE[precision]:g}) with "
                      f"{100 * agree:.1f} % of the labels equal; rebuild this variant from its model")


Tensor = tuple[str, Sequence[object]]  # dtype and shape; a dimension that is no positive number is dynamic


def check_signature(path: Path, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> int:
    """The image size of a model file, in pixels a side.

    Raises:
        Damaged: it is not uint8 [N, size, size, 3] -> float32 [N, classes], N dynamic.
    """
    match list(inputs), list(outputs):
        case [("uint8", [n, int(height), int(width), 3])], [("float32", [_, _])] if height == width and not _fixed(n):
            return height
    raise Damaged(f"{path.parent.name}/{path.name} maps {list(inputs)} to {list(outputs)}, "
                  "expected one uint8 [N, size, size, 3] to one float32 [N, classes]; export it anew")


def _fixed(dimension: object) -> bool:
    return isinstance(dimension, int) and dimension > 0


def check_batch(batch: np.ndarray, size: int) -> None:
    """Raise ValueError unless `batch` is uint8 [N, size, size, 3] with N >= 1."""
    if batch.dtype != np.uint8 or batch.shape[1:] != (size, size, 3) or len(batch) < 1:
        raise ValueError(f"a batch of {batch.dtype}{list(batch.shape)} came, "
                         f"expected uint8 [N, {size}, {size}, 3] with N >= 1")
