"""PreprocessJob: raw images -> Dataset."""

import gc
import hashlib
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from preprocessing import cifar10, device, quality, sources, table, write
from preprocessing.decode import decode_all
from preprocessing.inspection import inspect
from preprocessing.layouts import pick_size, read_layout
from preprocessing.rows import Rows
from shared.archives import open_archive
from shared.artifacts import publish, sha256, stage
from shared.attempt import Attempt, attempt
from shared.datasets import SPLITS, Spec
from shared.jobs import PreprocessJob
from shared.tree import Tree, scan


def run(job_id: str) -> dict[str, Any]:
    """What a worker calls, in a fork for this job alone: one attempt at it."""
    collect_seldom()
    return attempt(job_id, prepare)


def collect_seldom() -> None:
    """Spare the garbage collector: it goes again and again through all that a process keeps, and a job keeps an entry
    of each image and hardly makes a cycle. 0.15 of 1.6 s at 50,000 images."""
    gc.freeze()  # the modules
    gc.set_threshold(100_000)


def prepare(job: PreprocessJob, ctx: Attempt) -> dict[str, Any]:
    """Read the source, decode its images, arrange and publish them as a Dataset. Returns the manifest's summary."""
    device.check(ctx.settings.device)
    path = sources.locate(job.source, ctx)
    # Unlinked from the start: whatever ends this process, the volume gets the space back.
    with TemporaryFile(dir=ctx.work) as pixels:
        with _open_tree(path, ctx) as tree:
            labels, size, rows = _decode(tree, job, pixels.fileno(), ctx)
        xp, frames = device.choose(ctx.settings.device)  # not before the decoding processes are forked
        arranged = table.arrange(frames, rows, labels, job.validation, job.test)
        staging = stage(ctx.root, ctx.job_id)
        try:
            write.write_pixels(staging, arranged, pixels.fileno(), size, ctx)
            mean, std, seen = inspect(staging, size, xp, ctx)
            spec = Spec(size, labels, mean, std)  # type: ignore[arg-type]
            with ThreadPoolExecutor(1) as pool:  # pixels are hashed and reach the disk beside what keeps one core busy
                hashed = {f"{split}.npy": pool.submit(_kept, staging / f"{split}.npy") for split in SPLITS}
                write.write_index(staging, arranged, rows, labels)
                found = quality.report(xp, seen, arranged, rows.paths, labels)
                stats = write.write_stats(staging, arranged, rows, spec, found)
            ctx.report("publish", 0, 1)
            manifest = publish(ctx.root, staging, job.target, {
                "name": job.name, "parents": {"source": job.source, "sha256": _digest(path, rows)},
                "spec": spec.to_json(), "summary": _summary(job, size, stats)},
                {name: kept.result() for name, kept in hashed.items()})
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    ctx.report("publish", 1, 1)
    return dict(manifest["summary"])


@contextmanager
def _open_tree(path: Path, ctx: Attempt) -> Iterator[Tree]:
    if path.is_dir():
        yield scan(str(path), str(ctx.settings.imports))
    else:
        with open_archive(path, ctx) as tree:
            yield tree


def _decode(tree: Tree, job: PreprocessJob, pixels_fd: int,
            ctx: Attempt) -> tuple[tuple[str, ...], int, Rows]:
    """The classes' names, the size of an image, and what is known of each; the pixels go to `pixels_fd`."""
    ctx.report("read", 0, 1)
    batches = cifar10.find(tree)
    if batches:
        size = job.size or cifar10.SIDE
        xp, _ = device.choose(ctx.settings.device)
        return cifar10.LABELS, size, cifar10.decode_cifar10(tree, batches, size, job.seed, pixels_fd, xp, ctx)
    layout = read_layout(tree)
    size = job.size or pick_size(tree, layout)
    return layout.labels, size, decode_all(tree, layout, size, job.seed, pixels_fd, ctx)


def _kept(path: Path) -> str:
    """The SHA-256 of a file that is on the disk for good: `publish` then has nothing of it to wait for."""
    with open(path, "rb") as f:
        os.fsync(f.fileno())
    return sha256(path)


def _digest(path: Path, rows: Rows) -> str:
    """SHA-256 of the source: of the archive's bytes, or of a folder's list of paths and their images' SHA-256."""
    if path.is_file():
        return sha256(path)
    listed = "".join(f"{path}\0{digest}\n" for path, digest in sorted(zip(rows.paths, rows.sha256, strict=True)))
    return hashlib.sha256(listed.encode()).hexdigest()


def _summary(job: PreprocessJob, size: int, stats: dict[str, Any]) -> dict[str, Any]:
    return {"dataset_id": job.dataset_id, "name": job.name, "images": stats["images"],
            "classes": len(stats["classes"]["train"]), "size": size, "skipped": stats["skipped"]["images"],
            "duplicates": stats["duplicates"]["images"], "conflicts": stats["conflicts"]["images"]}
