"""Fewer images to learn from: those that a small network, trained on all of them first, is least sure of.

Selection via proxy (C. Coleman et al., ICLR 2020, arXiv 1906.11829): what a small network finds easy teaches a large
one little either. Least sure is where the entropy of its answer is highest; each class keeps the same share.
"""

import io
import shutil
from collections.abc import Callable
from pathlib import Path

import keras
import numpy as np

from shared.artifacts import write_bytes
from shared.attempt import Attempt
from shared.datasets import Dataset
from shared.jobs import TrainJob
from training.fitting import Training
from training.recipes import Recipe, kept, resolve

PROXY = "small"  # its recipe
PIECE = 4096  # images that are copied at once
FILE = "selection.npy"  # in ctx.work: rows of the training images, so that a resumed training learns from the same ones


class Selected(Dataset):
    """A Dataset with some of its training images alone; the other splits are whole."""

    def __init__(self, whole: Dataset, rows: np.ndarray, copy: Path):
        """rows: int [N], those of the training split; copy: a file of their images, written where it is not there."""
        self.__dict__.update(whole.__dict__)
        self._labels, self._copy = whole.labels("train")[rows], copy
        if not copy.exists():
            images, partly = whole.images("train"), copy.with_name(f".{copy.name}")
            written = np.lib.format.open_memmap(partly, "w+", images.dtype, (len(rows), *images.shape[1:]))
            for at in range(0, len(rows), PIECE):
                written[at:at + PIECE] = images[rows[at:at + PIECE]]
            written.flush()
            partly.rename(copy)

    def images(self, split: str) -> np.ndarray:
        if split != "train":
            return super().images(split)
        array: np.ndarray = np.load(self._copy, mmap_mode="r", allow_pickle=False)
        return array

    def labels(self, split: str) -> np.ndarray:
        return self._labels if split == "train" else super().labels(split)


class OfProxy(Attempt):
    """An attempt at a job as the proxy's training sees it: a folder of its own, progress under another name."""

    def __init__(self, ctx: Attempt):
        self.__dict__.update(ctx.__dict__)
        self._outer = ctx
        self.work = ctx.work / "proxy"
        self.work.mkdir(parents=True, exist_ok=True)

    def report(self, stage: str, step: float, of: float, **metrics: float | str) -> None:
        self._outer.report("select", step, of, **metrics)


def select(dataset: Dataset, job: TrainJob, ctx: Attempt, replicas: int,
           begin: Callable[[Recipe, Attempt], Training]) -> Dataset:
    """The Dataset without the share `job.leave_out` of its training images.

    The proxy trains once: an attempt that resumes takes what an earlier one chose. Raises as a training does.
    """
    path = ctx.work / FILE
    if not path.exists():
        labels = dataset.labels("train")
        proxy = OfProxy(ctx)
        recipe = resolve(TrainJob("m-0", dataset.id, job.name, PROXY), len(labels), replicas)
        training = begin(recipe, proxy)
        training.fit()
        training.save()  # should this be stopped now
        rows = least_sure(training.predict(dataset.images("train"), ctx.check), labels, job.leave_out)
        packed = io.BytesIO()
        np.save(packed, rows)
        write_bytes(path, packed.getvalue())
        shutil.rmtree(proxy.work, ignore_errors=True)
        keras.backend.clear_session()
    return Selected(dataset, np.load(path, allow_pickle=False), ctx.work / "selected.npy")


def least_sure(answers: np.ndarray, labels: np.ndarray, leave_out: float) -> np.ndarray:
    """Rows, ascending, that are left of each class without the share `leave_out` of lowest entropy.

    answers: float [N, K] probabilities; labels: int [N].
    """
    entropy = -(answers * np.log(np.maximum(answers, 1e-12))).sum(1)
    chosen: list[np.ndarray] = []
    for k in np.unique(labels):
        rows = np.flatnonzero(labels == k)
        chosen.append(rows[np.argsort(entropy[rows], kind="stable")][-kept(np.array(len(rows)), leave_out):])
    return np.sort(np.concatenate(chosen))
