"""A Dataset that a small network learns in seconds, and attempts at training on it, with or without pytest."""

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from redis import Redis

from shared import attempt
from shared.artifacts import publish, stage
from shared.attempt import Attempt
from shared.datasets import Spec
from shared.jobs import TrainJob
from shared.ledger import Ledger
from shared.settings import Settings

THREADS = 2
NOBODY = "redis://127.0.0.1:1/0"  # a closed port: the live view is lost, the record is not
COLOURS = np.array([[200, 60, 60], [60, 200, 60], [60, 60, 200]])


def write_dataset(root: Path, images: int = 300, size: int = 32, seed: int = 0) -> str:
    """Publish a Dataset of three classes, each a colour under strong noise; a quarter of it is validation."""
    rng = np.random.default_rng(seed)
    labels = np.arange(images, dtype=np.int32) % 3
    noise = rng.normal(0, 60, (images, size, size, 3))
    pixels = np.clip(COLOURS[labels][:, None, None] + noise, 0, 255).astype(np.uint8)
    staging = stage(root, "test")
    cut = images * 3 // 4
    for split, part in (("train", slice(cut)), ("validation", slice(cut, None))):
        np.save(staging / f"{split}.npy", pixels[part])
        np.save(staging / f"{split}.labels.npy", labels[part])
    scaled = pixels[:cut] / 255
    spec = Spec(size, ("red", "green", "blue"), tuple(scaled.mean((0, 1, 2))), tuple(scaled.std((0, 1, 2))))
    dataset_id = f"d-{images}-{size}-{seed}"
    publish(root, staging, f"datasets/{dataset_id}", {"spec": spec.to_json(), "summary": {}})
    return dataset_id


def new_attempt(root: Path, job: TrainJob, job_id: str = "j-1", device: str = "cpu", **settings: Any) -> Attempt:
    """An attempt at a job, accepted at its first call, with a Redis that does not answer."""
    ledger = Ledger(root, Redis.from_url(NOBODY))
    ledger.accept(job_id, job)
    ctx = Attempt(job_id, Settings(device, artifacts=root, redis_url=NOBODY, cpu_threads=THREADS, **settings), ledger)
    ctx.work.mkdir(parents=True, exist_ok=True)
    return ctx


def ask_to_stop() -> None:
    """As a worker that is told to end."""
    attempt.ask_stop(signal.SIGUSR1, None)


class AtLook(Attempt):
    """An attempt to which `act` happens just before the body looks for the n-th time (from 0) whether to stop."""

    def __init__(self, ctx: Attempt, look: int, act: Callable[[], None] = ask_to_stop):
        self.__dict__.update(ctx.__dict__)
        self.left, self.act = look, act

    @property
    def should_stop(self) -> bool:
        if self.left == 0:
            self.act()
        self.left -= 1
        return super().should_stop


class AtStep(Attempt):
    """An attempt whose worker is asked to stop once `training`, to be set, has begun so many steps."""

    def __init__(self, ctx: Attempt, step: int):
        self.__dict__.update(ctx.__dict__)
        self.at, self.training = step, None

    @property
    def should_stop(self) -> bool:
        if self.training is not None and self.training.step == self.at:
            ask_to_stop()
        return super().should_stop
