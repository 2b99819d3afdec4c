"""Where a PredictJob's images come from: a Dataset, whose pixels stand ready, or an archive or folder to be decoded."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from shared.archives import imported, open_archive, uploaded
from shared.attempt import Attempt
from shared.datasets import Dataset
from shared.errors import Refused
from shared.images import decode
from shared.jobs import SPLITS
from shared.settings import threads
from shared.tree import Member, Tree, is_clutter, read, scan


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
        Refused: it has no images, or those of a Dataset have another size than the model's; an upload or import is
            missing, or no archive.
    """
    word, _, rest = source.partition(":")
    match word:
        case "dataset":
            dataset, _, split = rest.partition("/")
            yield DatasetSource(Dataset(ctx.root, dataset), [split] if split else list(SPLITS), size)
        case "upload":
            with open_archive(uploaded(ctx.root, rest), ctx) as tree:
                yield ArchiveSource(tree, size, threads(ctx.settings))
        case "import":
            path = imported(ctx.settings.imports, rest)
            if path.is_dir():
                yield ArchiveSource(scan(str(path), str(ctx.settings.imports)), size, threads(ctx.settings))
                return
            with open_archive(path, ctx) as tree:
                yield ArchiveSource(tree, size, threads(ctx.settings))
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


class ArchiveSource:
    """Every file of an archive or folder in order of path, its image's id. One that is no image has an error."""

    def __init__(self, tree: Tree, size: int, threads: int):
        self._tree, self._size, self._threads = tree, size, threads
        self._members = [m for m in tree.members if not is_clutter(m.path)]
        self.count = len(self._members)
        if not self.count:
            raise Refused("the source holds no files: expected images, in folders or not", "no_images")

    def part(self, start: int, end: int) -> Part:
        members = self._members[start:end]
        with ThreadPoolExecutor(self._threads) as pool:  # decoders let go of Python's lock
            found = list(pool.map(self._decoded, members))
        images = [image for image in found if isinstance(image, np.ndarray)]
        pixels = np.stack(images) if images else np.empty((0, self._size, self._size, 3), np.uint8)
        errors = [None if isinstance(image, np.ndarray) else image for image in found]
        return Part([m.path for m in members], [None] * len(members), pixels, errors)

    def _decoded(self, member: Member) -> np.ndarray | str:
        """Pixels, or why there are none."""
        try:
            return decode(read(self._tree.kind, self._tree.folder, self._tree.fd, member), self._size)
        except (Refused, OSError) as e:  # of a folder a file may have gone, or not be this user's to read
            return str(e)
