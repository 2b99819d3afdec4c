"""A loaded Variant that answers `run(batch)`. Optimization measures the same code that inference serves."""

from pathlib import Path
from typing import Protocol

import numpy as np

from shared.artifacts import Manifest, open_artifact
from shared.errors import Damaged

FILES = {"onnx": "model.onnx", "litert": "model.tflite", "tensorrt": "model.plan"}
# Largest difference of a probability from the recorded one at load, per precision; int8 also needs 99 % equal argmax.
TOLERANCE = {"fp32": 1e-3, "fp16": 1e-2, "int8": 5e-2}


class Session(Protocol):
    """One loaded Variant. Not thread-safe: one caller at a time."""

    def run(self, batch: np.ndarray) -> np.ndarray:
        """uint8 [N, size, size, 3] RGB -> float32 [N, classes] probabilities, N >= 1."""
        ...

    def close(self) -> None: ...


def open_session(root: Path, model_id: str, variant: str, threads: int = 1) -> tuple[Session, Manifest]:
    """Load a published Variant: hashes checked, then its golden batch.

    Raises:
        NotFound: it is not published.
        Damaged: its bytes, or its answers to the golden batch, are not those that were published.
    """
    target = f"variants/{model_id}/{variant}"
    manifest = open_artifact(root, target)
    session = load(root / target, manifest["format"], threads)
    try:
        check_golden(root / target, manifest["precision"], session)
    except BaseException:
        session.close()
        raise
    return session, manifest


def load(folder: Path, format: str, threads: int = 1) -> Session:
    """The Session of a Variant's file in `folder`; the one place that picks a runtime."""
    path = folder / FILES[format]
    match format:
        case "onnx":
            from shared.runtimes.onnx import OnnxSession

            return OnnxSession(path, threads)
        case "litert":
            from shared.runtimes.litert import LiteRTSession

            return LiteRTSession(path, threads)
        case _:
            raise Damaged(f"variant format {format!r} is unknown: expected one of {', '.join(FILES)}")


def check_golden(folder: Path, precision: str, session: Session) -> None:
    """Run the golden batch that travels with a Variant and compare with the scores it gave when it was published.

    golden.npz: images uint8 [256, S, S, 3] (fewer in a small dataset), probabilities float32 [256, K].

    Raises:
        Damaged: a probability is off by more than TOLERANCE, or, at int8, fewer than 99 % of the argmaxes agree.
    """
    with np.load(folder / "golden.npz", allow_pickle=False) as golden:
        images, expected = golden["images"], golden["probabilities"]
    got = session.run(images)
    compare_golden(expected, got, precision, folder.name)


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
