"""Pictures to prepare, and an attempt at a job as a worker's child would make it."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from redis import Redis

from preprocessing.jobs import prepare
from shared.artifacts import read_json
from shared.attempt import Attempt
from shared.datasets import Dataset
from shared.jobs import PreprocessJob, new_id
from shared.ledger import Ledger
from shared.settings import load


@pytest.fixture
def imports(tmp_path: Path) -> Path:
    path = tmp_path / "imports"
    path.mkdir()
    return path


@pytest.fixture
def picture() -> Callable[..., bytes]:
    """picture(seed, width, height, format) -> an encoded image; every seed gives another one."""

    def make(seed: int, width: int = 40, height: int = 36, format: str = "JPEG", **options: Any) -> bytes:
        small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        out = io.BytesIO()
        Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC).save(out, format, **options)
        return out.getvalue()

    return make


@pytest.fixture
def fill(picture: Callable[..., bytes]) -> Callable[..., None]:
    """fill(folder, first, count) writes pictures number first, first + 1, ... into a folder."""

    def write(folder: Path, first: int, count: int, **options: Any) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for seed in range(first, first + count):
            (folder / f"{seed}.jpg").write_bytes(picture(seed, **options))

    return write


@pytest.fixture
def two_classes(imports: Path, fill: Callable[..., None]) -> Path:
    """imports/pets: cat and dog, 10 pictures each."""
    fill(imports / "pets" / "cat", 0, 10)
    fill(imports / "pets" / "dog", 100, 10)
    return imports / "pets"


@pytest.fixture
def attempt_at(root: Path, imports: Path, redis: Redis) -> Callable[..., Attempt]:
    """attempt_at(job) -> the Attempt that a worker's child would hand to the body."""

    def accept(job: PreprocessJob, **env: str) -> Attempt:
        settings = load({"DEVICE": "cpu", "CPU_THREADS": "1", "ARTIFACTS": str(root), "IMPORTS": str(imports), **env})
        ledger = Ledger(root, redis)
        job_id = new_id("j")
        ledger.accept(job_id, job)
        ctx = Attempt(job_id, settings, ledger)
        ctx.work.mkdir(parents=True)
        return ctx

    return accept


@pytest.fixture
def ctx(attempt_at: Callable[..., Attempt]) -> Attempt:
    """An attempt for what needs one only to report and to be stopped."""
    return attempt_at(PreprocessJob(new_id("d"), "pets", "import:pets"))


@pytest.fixture
def prepare_source(root: Path, attempt_at: Callable[..., Attempt]) -> Callable[..., tuple[Dataset, dict[str, Any]]]:
    """prepare_source(source, size=..., ...) -> the published Dataset and its stats.json."""

    def run(source: str, **fields: Any) -> tuple[Dataset, dict[str, Any]]:
        job = PreprocessJob(new_id("d"), "pets", source, **{"size": 32, **fields})
        summary = prepare(job, attempt_at(job))
        dataset = Dataset(root, job.dataset_id)
        assert dataset.manifest["summary"] == summary
        return dataset, read_json(dataset.path / "stats.json")

    return run
