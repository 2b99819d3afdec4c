"""Where a PredictJob's images come from: a Dataset, whose pixels stand ready."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from shared.attempt import Attempt
from shared.datasets import Dataset
from shared.errors import Refused
from shared.jobs import SPLITS


@dataclass(frozen=True)
class Part:
    """images uint8 [M, S, S, 3] of those that have no error, in their order; labels and errors are None where unknown.

    ids, labels and errors have an entry for every image of the part.
    """

    ids: list[str]
    labels: list[str | None]
    images: np.ndarray
    errors: list[str | None]


class Source(Protocol):
    count: int

    def part(self, start: int, end: int) -> Part:
        """The images from `start` on, below `end`."""


@contextmanager
def open_source(source: str, size: int, ctx: Attempt) -> Iterator[Source]:
    """What a job's source names.

    Raises:
        NotFound: it does not exist.
        Refused: it has no images, or those of a Dataset have another size than the model's.
    """
    word, _, rest = source.partition(":")
    match word:
        case "dataset":
            dataset, _, split = rest.partition("/")
            yield DatasetSource(Dataset(ctx.root, dataset), [split] if split else list(SPLITS), size)
        case other:
            raise ValueError(f"source {other!r} is unknown")


class DatasetSource:
    """Splits of a Dataset one after another; an image's id is <split>/<number>."""

    def __init__(self, dataset: Dataset, splits: list[str], size: int):
        if dataset.spec.size != size:
            raise Refused(f"dataset {dataset.id} has images of {dataset.spec.size} pixels a side, the model takes "
                          f"{size}: prepare the same images at that size", "wrong_size")
        self._labels = dataset.spec.labels
        self._splits = [(name, dataset.images(name), dataset.labels(name)) for name in splits]
        self.count = sum(len(labels) for _, _, labels in self._splits)
        if not self.count:
            raise Refused(f"dataset {dataset.id} has no images in {', '.join(splits)}", "no_images")

    def part(self, start: int, end: int) -> Part:
        ids: list[str] = []
        labels: list[str | None] = []
        images: list[np.ndarray] = []
        first = 0
        for name, pixels, codes in self._splits:
            low, high = max(start - first, 0), min(end - first, len(codes))
            first += len(codes)
            if low < high:
                ids += [f"{name}/{i}" for i in range(low, high)]
                labels += [self._labels[code] for code in codes[low:high]]
                images.append(pixels[low:high])
        return Part(ids, labels, np.concatenate(images), [None] * len(ids))
