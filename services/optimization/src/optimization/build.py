"""One Variant: exported, reloaded from disk, compared with Keras on the golden batch, published."""

import shutil
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

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
from shared.runtimes import FILES, TOLERANCE, compare_golden, load, run_in_chunks


def tools() -> dict[str, str]:
    """Versions of what exports and runs Variants here."""
    return {"tensorflow": tf.__version__, "keras": keras.__version__, "tf2onnx": tf2onnx.version.version,
            "onnx": onnx.__version__, "onnxruntime": onnxruntime.__version__,
            "ai-edge-litert": version("ai-edge-litert")}


@dataclass(frozen=True)
class Source:
    """What Variants are made from: a published Model and a sample of the images that trained it."""

    id: str
    manifest: Manifest
    model: keras.Model
    golden_images: np.ndarray  # uint8 [<=256, size, size, 3]
    golden_scores: np.ndarray  # float32 [<=256, classes], Keras's
    calibration: np.ndarray  # uint8 [M, size, size, 3]


def build(root: Path, job_id: str, source: Source, variant: str) -> Manifest:
    """Publish a Variant, or find it published. Returns its manifest.

    Raises:
        Damaged: a converter failed, the file can't be loaded, or an fp32 or fp16 file answers the golden batch
            otherwise than Keras.
    """
    target = f"variants/{source.id}/{variant}"
    try:
        return open_artifact(root, target)
    except NotFound:
        pass
    staging = stage(root, job_id)
    try:
        format, precision = variant.split("-")
        convert(source, format, precision, staging / FILES[format])
        agreement = record_golden(staging, format, precision, source, variant)
        size = (staging / FILES[format]).stat().st_size
        return publish(root, staging, target, {
            "name": source.manifest["name"], "variant": variant, "format": format, "precision": precision,
            "parents": {"model": source.id, "dataset": source.manifest["parents"]["dataset"]},
            "spec": source.manifest["spec"], "tolerance": TOLERANCE[precision],
            "calibration_images": len(source.calibration) if precision == "int8" else 0,
            "measured": {"bytes": size, "golden": agreement},
            "tools": tools(),
            "summary": {"variant": variant, "bytes": size}})
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def convert(source: Source, format: str, precision: str, path: Path) -> None:
    """Export, with whatever a converter raises told as Damaged: another format of the same model may still work."""
    try:
        export(source.model, format, precision, source.calibration, path)
    except (OSError, MemoryError, JobTimeoutException):
        raise
    except Exception as e:  # converters raise what they like
        raise Damaged(f"{format}-{precision} can't be exported: {type(e).__name__}: {e}", "export_failed") from e


def record_golden(staging: Path, format: str, precision: str, source: Source, what: str) -> dict[str, float]:
    """Run the golden batch through the Session that will serve, hold it against Keras, write golden.npz.

    int8 is compared and not refused here: what it loses is the gate's to judge, on far more images.
    """
    session = load(staging, format)
    try:
        scores = run_in_chunks(session, source.golden_images)
    finally:
        session.close()
    if precision != "int8":
        compare_golden(source.golden_scores, scores, precision, what)
    np.savez(staging / "golden.npz", images=source.golden_images, probabilities=scores)
    return agreement(source.golden_scores, scores)


def agreement(expected: np.ndarray, got: np.ndarray) -> dict[str, float]:
    """How near two float32 [N, K] are: the share of equal argmaxes 0..1, the largest and the mean difference."""
    difference = np.abs(expected - got)
    return {"images": len(got), "agreement": float((expected.argmax(1) == got.argmax(1)).mean()),
            "max_difference": float(difference.max()), "mean_difference": float(difference.mean())}
