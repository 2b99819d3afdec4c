"""One Variant: exported, reloaded from disk, compared with Keras on the golden batch, published."""

import shutil
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import keras
import numpy as np
import onnx
import onnxruntime
import tensorflow as tf
import tf2onnx
from rq.timeouts import JobTimeoutException

from optimization.export import export
from shared.artifacts import Manifest, open_artifact, publish, stage
from shared.errors import Damaged, NotFound
from shared.runtimes import ENGINES, FILES, TOLERANCE, Session, check_golden, compare_golden, load, run_in_chunks
from shared.settings import Settings, batches

PROFILE = batches(Settings())  # the least, the usual and the largest batch of a TensorRT engine, by default


def tools() -> dict[str, str]:
    """Versions of what exports and runs Variants here; of TensorRT where an engine was built or opened."""
    found = {"tensorflow": tf.__version__, "keras": keras.__version__, "tf2onnx": tf2onnx.version.version,
             "onnx": onnx.__version__, "onnxruntime": onnxruntime.__version__,
             "ai-edge-litert": version("ai-edge-litert")}
    if "tensorrt" in sys.modules:
        found["tensorrt"] = sys.modules["tensorrt"].__version__
    return found


@dataclass(frozen=True)
class Source:
    """What Variants are made from: a published Model and a sample of the images that trained it."""

    id: str
    manifest: Manifest
    model: keras.Model
    golden_images: np.ndarray  # uint8 [<=256, size, size, 3]
    golden_scores: np.ndarray  # float32 [<=256, classes], Keras's
    calibration: np.ndarray  # uint8 [M, size, size, 3]
    validation: np.ndarray | None = None  # uint8 [V, size, size, 3]


def build(root: Path, job_id: str, source: Source, variant: str, profile: tuple[int, int, int] = PROFILE,
          progress: Callable[[str, int, int], None] = lambda phase, step, of: None, refit: bool = False) -> Manifest:
    """Publish a Variant, or find it published. Returns its manifest.

    Of a TensorRT Variant the engine for this host is built too, wherever there is none that fits: `profile` is the
    least, the usual and the largest of its batches, and `progress` hears of each phase; refit: as that of
    `engine.ensure`.

    Raises:
        Unfit: a TensorRT Variant, without TensorRT or a GPU.
        Damaged: a converter failed, the file can't be loaded, or an fp32 or fp16 file answers the golden batch
            otherwise than Keras.
    """
    target = f"variants/{source.id}/{variant}"
    format, precision = variant.split("-")

    def with_engine(folder: Path, check: Callable[[Session], None]) -> int:
        """The bytes of what serves: the file of the Variant, or its engine for this host, built if need be."""
        path = folder / FILES[format]
        if format == "tensorrt":
            from optimization.engine import ensure

            path, _ = ensure(root / ENGINES, path, precision, profile, check, progress, refit)
        return path.stat().st_size

    try:
        manifest = open_artifact(root, target)
        with_engine(root / target, lambda session: check_golden(root / target, precision, session))
        return manifest
    except NotFound:
        pass
    staging = stage(root, job_id)
    try:
        notes = convert(source, format, precision, staging / FILES[format])
        size = with_engine(staging, lambda session: compare_with_keras(source, precision, session, variant))
        agreement = record_golden(root, staging, format, precision, source, variant)
        return publish(root, staging, target, {
            "name": source.manifest["name"], "variant": variant, "format": format, "precision": precision,
            "parents": {"model": source.id, "dataset": source.manifest["parents"]["dataset"]},
            "spec": source.manifest["spec"], "tolerance": TOLERANCE[precision],
            "calibration_images": len(source.calibration) if precision == "int8" else 0,
            "measured": {"bytes": size, "golden": agreement}, **notes,
            "tools": tools(),
            "summary": {"variant": variant, "bytes": size}})
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def convert(source: Source, format: str, precision: str, path: Path) -> dict[str, Any]:
    """Export, with whatever a converter raises told as Damaged: another format of the same model may still work."""
    try:
        return export(source.model, format, precision, source.calibration, path, source.validation)
    except (OSError, MemoryError, JobTimeoutException):
        raise
    except Exception as e:  # converters raise what they like
        raise Damaged(f"{format}-{precision} can't be exported: {type(e).__name__}: {e}", "export_failed") from e


def compare_with_keras(source: Source, precision: str, session: Session, what: str) -> np.ndarray:
    """The golden batch's scores. Raises Damaged when an fp32 or fp16 Session gives others than Keras.

    int8 is compared and not refused here: what it loses is the gate's to judge, on far more images.
    """
    scores = run_in_chunks(session, source.golden_images)
    if precision != "int8":
        compare_golden(source.golden_scores, scores, precision, what)
    return scores


def record_golden(root: Path, staging: Path, format: str, precision: str, source: Source,
                  what: str) -> dict[str, float]:
    """Run the golden batch through the Session that will serve, hold it against Keras, write golden.npz."""
    with closing(load(staging, format, engines=root / ENGINES)) as session:
        scores = compare_with_keras(source, precision, session, what)
    np.savez(staging / "golden.npz", images=source.golden_images, probabilities=scores)
    return agreement(source.golden_scores, scores)


def agreement(expected: np.ndarray, got: np.ndarray) -> dict[str, float]:
    """How near two float32 [N, K] are: the share of equal argmaxes 0..1, the largest and the mean difference."""
    difference = np.abs(expected - got)
    return {"images": len(got), "agreement": float((expected.argmax(1) == got.argmax(1)).mean()),
            "max_difference": float(difference.max()), "mean_difference": float(difference.mean())}
