"""What must be equal on both paths, op by op and whole datasets: `check(xp, frames, device)` against NumPy and pandas.

Plain functions: `test_gpu.py` runs them under pytest, `benchmarks/preprocessing_gpu.py` where there is none.
"""

import hashlib
import io
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pandas
from PIL import Image
from redis import Redis

from preprocessing.inspection import channel_sums
from preprocessing.jobs import prepare
from preprocessing.quality import look, near_pairs, to_host
from preprocessing.resample import resample
from preprocessing.rows import Rows, rank_key
from preprocessing.table import arrange
from shared.artifacts import open_artifact
from shared.attempt import Attempt
from shared.images import resize
from shared.jobs import PreprocessJob, new_id
from shared.ledger import Ledger
from shared.settings import load

RESIZES = ((32, 32, 64), (33, 47, 32), (500, 375, 224), (330, 320, 224), (40, 300, 32), (300, 40, 64), (224, 224, 96))


def pictures(seed: int, n: int, size: int) -> np.ndarray:
    """uint8 [n, size, size, 3]: noise, gradients, checks, flat ones."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (n, size, size, 3), dtype=np.uint8)
    images[1::4] = np.arange(size, dtype=np.uint8)[:, None, None] * (255 // size)
    images[2::4] = (np.indices((size, size)).sum(0) % 2 * 255).astype(np.uint8)[:, :, None]
    images[3::4] = rng.integers(0, 256, images[3::4, :1, :1].shape)
    return images


def channel_sums_are_equal(xp: ModuleType, frames: ModuleType, device: str) -> None:
    for seed, n in ((0, 1), (1, 300), (2, 3000)):
        images = pictures(seed, n, 32)
        for one, two in zip(channel_sums(xp, xp.asarray(images)), channel_sums(np, images), strict=True):
            assert one.tolist() == two.tolist()


def looks_are_equal(xp: ModuleType, frames: ModuleType, device: str) -> None:
    for seed, size, n in ((0, 32, 500), (1, 61, 50), (2, 224, 9), (3, 256, 5)):
        images = pictures(seed, n, size)
        one, two = look(xp, xp.asarray(images)), look(np, images)
        for column in ("hashes", "brightness", "sharpness"):
            a, b = getattr(one, column), getattr(two, column)
            assert type(a) is np.ndarray, (column, type(a))
            assert a.dtype == b.dtype, (column, a.dtype, b.dtype)
            assert a.tobytes() == b.tobytes(), (column, size, np.argwhere(a != b)[:5].tolist())


def near_pairs_are_equal(xp: ModuleType, frames: ModuleType, device: str) -> None:
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**32, (5000, 4), dtype=np.uint32)
    hashes[1000:2000] = hashes[:1000]
    flipped = np.uint32(1) << rng.integers(0, 32, 1000).astype(np.uint32)
    hashes[np.arange(1000, 2000), rng.integers(0, 4, 1000)] ^= flipped
    hashes[3000:3100] = hashes[3000]
    hashes[4000:4500, :2] = 0
    hashes[4500:] &= np.uint32(1)
    for chosen in (hashes, hashes[:2], hashes[:1], hashes[:0], hashes[4500:]):
        for one, two in zip(near_pairs(xp, chosen), near_pairs(np, chosen), strict=True):
            assert type(one) is np.ndarray
            assert one.dtype == two.dtype, (one.dtype, two.dtype)
            assert one.tolist() == two.tolist()


def resizes_are_equal(xp: ModuleType, frames: ModuleType, device: str) -> None:
    for width, height, size in RESIZES:
        images = np.random.default_rng(width).integers(0, 256, (5, height, width, 3), dtype=np.uint8)
        images[0] = np.where(images[0] > 127, 255, 0)
        found = to_host(resample(xp, images, size))
        assert found.dtype == np.uint8
        assert np.array_equal(found, resample(np, images, size)), (width, height, size)


def resizes_are_those_of_single_images(xp: ModuleType, frames: ModuleType, device: str) -> None:
    for width, height, size in RESIZES:
        images = np.random.default_rng(width).integers(0, 256, (3, height, width, 3), dtype=np.uint8)
        expected = np.stack([resize(image, size) for image in images])
        assert np.array_equal(to_host(resample(xp, images, size)), expected), (width, height, size)


def synthetic_rows(n: int, classes: int, given: bool, seed: int = 0) -> Rows:
    """Rows with copies within and across splits, contradictions and skipped images."""
    rng = np.random.default_rng(seed)
    rows = Rows([f"{i:06}.jpg" for i in range(n)], rng.integers(0, classes, n).astype(np.int32),
                (rng.integers(0, 3, n) if given else np.zeros(n)).astype(np.int8))
    contents = np.where(rng.random(n) < 0.1, rng.integers(0, n, n), np.arange(n))
    rows.labels[:] = np.where(rng.random(n) < 0.02, rows.labels, rows.labels[contents])
    rows.sha256 = [hashlib.sha256(b"%d" % c).hexdigest() for c in contents]
    rows.keys[:] = [rank_key(seed, digest) for digest in rows.sha256]
    rows.widths[:] = rows.heights[:] = 32
    rows.skipped = {int(i): "broken" for i in rng.choice(n, n // 50, replace=False)}
    return rows


def tables_are_equal(xp: ModuleType, frames: ModuleType, device: str) -> None:
    labels = ("a", "b", "c")
    for given in (False, True):
        for seed, validation, test in ((0, 0.1, 0.1), (1, 0.2, 0.0), (2, 0.0, 0.3)):
            rows = synthetic_rows(2000, 3, given, seed)
            one, two = (arrange(f, rows, labels, validation, test) for f in (frames, pandas))
            assert one.duplicates == two.duplicates
            assert one.duplicates["images"] > 0
            assert one.conflicts == two.conflicts
            assert one.conflicts["images"] > 0
            for split in two.sources:
                for a, b in ((one.sources, two.sources), (one.labels, two.labels)):
                    assert type(a[split]) is np.ndarray
                    assert a[split].dtype == b[split].dtype
                    assert a[split].tolist() == b[split].tolist(), (given, seed, split)


class Quiet(Attempt):
    """An attempt that tells nobody: there is no Redis here."""

    def check(self) -> None:
        pass

    def report(self, stage: str, step: float, of: float, **metrics: float | str) -> None:
        pass


def prepared(root: Path, imports: Path, device: str, size: int) -> tuple[dict[str, str], dict[str, bytes]]:
    """SHA-256 of every file of the Dataset, and the small files' bytes."""
    settings = load({"DEVICE": device, "CPU_THREADS": "2", "ARTIFACTS": str(root), "IMPORTS": str(imports.parent)})
    ledger = Ledger(root, Redis(port=1, socket_connect_timeout=0.01, retry=None))
    job, job_id = PreprocessJob(new_id("d"), "pets", f"import:{imports.name}", size), new_id("j")
    ledger.accept(job_id, job)
    ctx = Quiet(job_id, settings, ledger)
    ctx.work.mkdir(parents=True)
    prepare(job, ctx)
    manifest = open_artifact(root, job.target, hashes=True)
    texts = {name: (root / job.target / name).read_bytes() for name in ("stats.json", "index.parquet")}
    return {name: f["sha256"] for name, f in manifest["files"].items()}, texts


def a_folder_of_images(folder: Path) -> None:
    for i in range(160):
        small = np.random.default_rng(i % 140).integers(0, 256, (5, 5, 3), dtype=np.uint8)
        out = io.BytesIO()
        picture = Image.fromarray(small).resize((60 + i % 7, 50), Image.Resampling.BICUBIC)
        picture.save(out, "JPEG" if i % 3 else "PNG", quality=90 if i < 140 else 60)
        path = folder / ("cat", "dog")[i % 2] / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(out.getvalue())
    (folder / "dog" / "broken.jpg").write_bytes(b"no picture")


def batches_of_cifar10(folder: Path) -> None:
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for name, n in (("data_batch_1", 300), ("test_batch", 60)):
        records = rng.integers(0, 256, (n, 3073), dtype=np.uint8)
        records[:, 0] = np.arange(n) % 10
        (folder / f"{name}.bin").write_bytes(records.tobytes())


def datasets_are_byte_equal(xp: ModuleType, frames: ModuleType, device: str) -> None:
    for make, size in ((a_folder_of_images, 48), (batches_of_cifar10, 32), (batches_of_cifar10, 40)):
        with tempfile.TemporaryDirectory() as temp:
            imports = Path(temp) / "imports" / "source"
            make(imports)
            (one, texts), (two, expected) = (prepared(Path(temp) / d, imports, d, size) for d in (device, "cpu"))
            for name, text in texts.items():
                assert text == expected[name], (make.__name__, size, name, text[:2000], expected[name][:2000])
            assert one == two, (make.__name__, size, one, two)


CHECKS: list[Callable[[ModuleType, ModuleType, str], None]] = [
    channel_sums_are_equal, looks_are_equal, near_pairs_are_equal, resizes_are_equal,
    resizes_are_those_of_single_images, tables_are_equal, datasets_are_byte_equal]
