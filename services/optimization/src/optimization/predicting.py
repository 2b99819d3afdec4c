"""PredictJob: a Variant's answers for every image of a source, as Parquet; it goes on where it was stopped.

Done in parts: each is a file in the job's work folder, whole or absent, and all are joined at the end.
"""

import shutil
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from optimization.images import Part, Source, open_source
from shared import faults
from shared.artifacts import Manifest, aliases, publish, read_json, stage, versions, write_bytes, write_json
from shared.attempt import Attempt
from shared.errors import NotFound, Refused
from shared.jobs import PredictJob
from shared.runtimes import Session, open_session, run_in_chunks
from shared.runtimes.plan import Unfit
from shared.settings import threads

PART = 4096  # images at most: what is lost when the job is killed
PART_BYTES = 128 << 20  # of their pixels
CHUNK = {"onnx": 64, "litert": 64, "tensorrt": 4096}  # images a call: CPUs are fastest in their caches
Embed = Callable[[np.ndarray], np.ndarray]
FILE = "predictions.parquet"


def predict_all(job: PredictJob, ctx: Attempt) -> dict[str, Any]:
    """The whole job; publishes predictions/<id> and returns its summary.

    predictions.parquet: id (path in the archive, or <split>/<number>), label (its class, if the source is a dataset),
    predicted, confidence, probabilities (in the order of the manifest's labels), embedding if asked for, and error:
    why an image has none of these.

    Raises:
        NotFound: no such Name, alias, version, Variant or dataset.
        Damaged: the Variant or the dataset is not what was published.
        Refused: the source has no images, is no archive, or has images of another size; the Variant can't run here,
            or has no embedding.
    """
    chosen = _chosen(job, ctx)
    began = time.monotonic()
    session, manifest = _open(ctx, chosen)
    with closing(session), open_source(job.source, manifest["spec"]["size"], ctx) as source:
        embed = _embedding(ctx, manifest) if job.embedding else None
        parts = _run_parts(source, session, manifest, embed, ctx)
    staging = stage(ctx.root, ctx.job_id)
    try:
        summary = _join(parts, staging / FILE) | {"predictions_id": job.predictions_id, "name": job.name, **chosen,
                                                  "seconds": round(time.monotonic() - began, 3)}
        ctx.report("publish", 0, 1)
        published = publish(ctx.root, staging, job.target, {
            "name": job.name, "parents": {"source": job.source, "model": chosen["model"], "variant": chosen["variant"]},
            "labels": manifest["spec"]["labels"], "device": session.device, "summary": summary})
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    ctx.report("publish", 1, 1)
    return dict(published["summary"])


def _chosen(job: PredictJob, ctx: Attempt) -> dict[str, Any]:
    """{version, model, variant}: what was chosen when the job began first, whatever the alias does since."""
    kept = ctx.work / "chosen.json"
    if kept.exists():
        return dict(read_json(kept))
    known, record = versions(ctx.root, job.name), aliases(ctx.root, job.name).get(job.alias)
    if not known:
        raise NotFound(f"model {job.name} does not exist: GET /v1/models lists those that do")
    if record is None and not (job.version and job.variant):
        raise NotFound(f"{job.name} has no alias {job.alias}: give version and variant")
    version = job.version or (record["version"] if record else 0)
    if version not in known:
        raise NotFound(f"{job.name} has no version {version}: it has {sorted(known)}")
    variant = job.variant or (record["variant"] if record else "")
    chosen = {"version": version, "model": known[version], "variant": variant}
    write_json(kept, chosen)
    return chosen


def _open(ctx: Attempt, chosen: dict[str, Any]) -> tuple[Session, Manifest]:
    try:
        return open_session(ctx.root, chosen["model"], chosen["variant"], threads(ctx.settings), ctx.settings.device)
    except Unfit as e:
        raise Refused(f"{chosen['variant']} can't run here: {e}; name another variant, such as onnx-fp32",
                      "unfit") from None


def _embedding(ctx: Attempt, manifest: Manifest) -> Embed:
    """What the layer before the logits sees, float32 [N, D], of the Keras model: Variants give probabilities alone.

    Raises Refused when the model has no layer of that name.
    """
    # Imported here alone: TensorFlow takes seconds, and no Variant needs it.
    import keras

    from optimization.reference import KerasReference, use_cpu

    use_cpu(threads(ctx.settings))
    model = manifest["parents"]["model"]
    reference = KerasReference(ctx.root / "models" / model / "model.keras", manifest["spec"]["size"])
    try:
        inner = keras.Model(reference.model.input, reference.model.get_layer("logits").input)
    except ValueError:
        raise Refused(f"model {model} has no layer `logits`, before which the embedding is taken: leave it out",
                      "no_embedding") from None

    def embed(images: np.ndarray) -> np.ndarray:
        found = np.asarray(inner.predict_on_batch(images.astype(np.float32)), np.float32)
        return found.reshape(len(images), -1)

    return embed


def _run_parts(source: Source, session: Session, manifest: Manifest, embed: Embed | None, ctx: Attempt) -> list[Path]:
    labels, chunk = manifest["spec"]["labels"], CHUNK[manifest["format"]]
    size = max(64, min(PART, PART_BYTES // (3 * manifest["spec"]["size"] ** 2)))
    parts, began, done = [], time.monotonic(), 0
    for number, start in enumerate(range(0, source.count, size)):
        path = ctx.work / f"part-{number:06}.parquet"
        parts.append(path)
        end = min(start + size, source.count)
        if not path.exists():
            ctx.check()
            if number:
                faults.point("mid-predict")
            part = source.part(start, end)
            scores = (run_in_chunks(session, part.images, chunk, ctx.check) if len(part.images) else
                      np.empty((0, len(labels))))
            vectors = None if embed is None else _embedded(embed, part.images, ctx)
            written = pa.BufferOutputStream()
            pq.write_table(_table(part, scores, labels, vectors), written)
            write_bytes(path, written.getvalue())
            done += end - start
        rate = done / max(time.monotonic() - began, 1e-9)
        ctx.report("predict", end, source.count, images_per_s=round(rate, 1))
    return parts


def _embedded(embed: Embed, images: np.ndarray, ctx: Attempt) -> np.ndarray:
    found = [np.empty((0, 0), np.float32)] if not len(images) else []
    for at in range(0, len(images), 64):
        ctx.check()
        found.append(embed(images[at:at + 64]))
    return np.concatenate(found)


def _table(part: Part, scores: np.ndarray, labels: list[str], vectors: np.ndarray | None) -> pa.Table:
    """Rows in the part's order: those with pixels have their scores, the others their error."""
    whole = [i for i, error in enumerate(part.errors) if error is None]
    place = dict(zip(whole, range(len(whole)), strict=True))
    best = scores.argmax(1) if len(scores) else np.empty(0, int)

    def column(values: list[Any], kind: pa.DataType) -> pa.Array:
        return pa.array([values[place[i]] if i in place else None for i in range(len(part.ids))], kind)

    columns = {
        "id": pa.array(part.ids, pa.string()), "label": pa.array(part.labels, pa.string()),
        "predicted": column([labels[k] for k in best], pa.string()),
        "confidence": column([float(row[k]) for row, k in zip(scores, best, strict=True)], pa.float32()),
        "probabilities": column(list(scores.astype(np.float32)), pa.list_(pa.float32()))}
    if vectors is not None:
        columns["embedding"] = column(list(vectors), pa.list_(pa.float32()))
    return pa.table({**columns, "error": pa.array(part.errors, pa.string())})


def _join(parts: list[Path], path: Path) -> dict[str, Any]:
    """One file of all parts, a row group each; returns how many images, how many failed, and the accuracy if known."""
    images = failed = labelled = right = 0
    with pq.ParquetWriter(path, pq.read_schema(parts[0]), compression="zstd") as writer:
        for part in parts:
            table = pq.read_table(part)
            writer.write_table(table)
            images, failed = images + len(table), failed + len(table) - table["error"].null_count
            hits = pc.drop_null(pc.equal(table["label"], table["predicted"]))
            labelled, right = labelled + len(hits), right + (pc.sum(hits).as_py() or 0)
    return {"images": images, "failed": failed, "accuracy": right / labelled if labelled else None}
