"""PreprocessJob: raw images -> Dataset."""

import shutil
from tempfile import TemporaryFile
from typing import Any

from preprocessing import device, sources, table, write
from preprocessing.decode import decode_all
from preprocessing.layouts import pick_size, read_layout
from preprocessing.tree import scan
from shared.artifacts import publish, stage
from shared.attempt import Attempt, attempt
from shared.datasets import Spec
from shared.jobs import PreprocessJob


def run(job_id: str) -> dict[str, Any]:
    """What a worker calls: one attempt at the job."""
    return attempt(job_id, prepare)


def prepare(job: PreprocessJob, ctx: Attempt) -> dict[str, Any]:
    """Read the source, decode its images, arrange and publish them as a Dataset. Returns the manifest's summary."""
    path = sources.locate(job.source, ctx)
    tree = scan(str(path), str(ctx.settings.imports))
    layout = read_layout(tree)
    size = job.size or pick_size(tree, layout)
    # Unlinked from the start: whatever ends this process, the volume gets the space back.
    with TemporaryFile(dir=ctx.work) as pixels:
        rows = decode_all(tree, layout, size, job.seed, pixels.fileno(), ctx)
        xp, frames = device.choose(ctx.settings.device)
        arranged = table.arrange(frames, rows, layout.labels, job.validation, job.test)
        staging = stage(ctx.root, ctx.job_id)
        try:
            mean, std = write.write_pixels(staging, arranged, pixels.fileno(), size, xp, ctx)
            spec = Spec(size, layout.labels, mean, std)
            write.write_index(staging, arranged, layout.labels, frames)
            stats = write.write_stats(staging, arranged, rows, spec)
            summary = {"dataset_id": job.dataset_id, "name": job.name, "images": stats["images"],
                       "classes": len(layout.labels), "size": size, "skipped": len(rows.skipped),
                       "duplicates": arranged.duplicates["images"], "conflicts": arranged.conflicts["images"]}
            ctx.report("publish", 0, 1)
            manifest = publish(ctx.root, staging, job.target, {
                "name": job.name, "parents": {"source": job.source}, "spec": spec.to_json(), "summary": summary})
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    ctx.report("publish", 1, 1)
    return dict(manifest["summary"])
