"""CIFAR-10 in its official files, the binary edition or the Python one.

Binary: per image 1 byte of label and 3,072 of pixels: the red plane, the green, the blue, each row by row.
Python: a pickled dict with `data`, uint8 [N, 3072] in the same order, and `labels`, a list. Both are described at
https://www.cs.toronto.edu/~kriz/cifar.html. Both give the same Dataset, to the last bit.
"""

import hashlib
import re
from types import ModuleType

import numpy as np

from preprocessing.plain_pickle import load_plain
from preprocessing.quality import to_host
from preprocessing.resample import resample
from preprocessing.rows import Rows, pwrite, rank_key
from preprocessing.table import TEST, TRAIN
from shared import faults
from shared.attempt import Attempt
from shared.errors import Refused
from shared.tree import Member, Tree, read

SIDE = 32
PIXELS = 3 * SIDE * SIDE
LABELS = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
BATCH = re.compile(r"(?:[^/]+/)?(data_batch_[1-9]|test_batch)(\.bin)?")
STEP = 256  # images between two writes


def find(tree: Tree) -> list[Member]:
    """The batch files, data_batch_1 first, in the source itself or in its one folder; empty if it is not CIFAR-10.

    Raises Refused (bad_dataset) where there are more than one, in several folders or both editions.
    """
    found = [m for m in tree.members if BATCH.fullmatch(m.path)]
    if not any("data_batch" in m.path for m in found):
        return []
    editions = {(m.path.rpartition("/")[0], m.path.endswith(".bin")): m.path for m in found}
    if len(editions) > 1:
        raise Refused(f"CIFAR-10 is here more than once, in {' and '.join(sorted(editions.values())[:2])}: each image "
                      "would count as often; leave one", "bad_dataset")
    return found


def decode_cifar10(tree: Tree, batches: list[Member], size: int, seed: int, pixels_fd: int, xp: ModuleType,
                   ctx: Attempt) -> Rows:
    """As `decode_all`, of CIFAR-10's batch files: its test batch is the test split, the others are for training.

    Raises:
        Refused: (bad_dataset) a file is not a batch of CIFAR-10.
    """
    parts, first = [], 0
    for done, member in enumerate(batches):
        name = BATCH.fullmatch(member.path)[1]  # type: ignore[index]
        labels, planes = _read_batch(tree, member)
        part = Rows([f"{name}#{i:05}" for i in range(len(labels))], labels,
                    np.full(len(labels), TEST if name == "test_batch" else TRAIN, np.int8))
        for start in range(0, len(labels), STEP):
            ctx.check()
            chosen = planes[start:start + STEP]
            pwrite(pixels_fd, _pixels(xp, chosen, size), (first + start) * size * size * 3)
            for row, plane in enumerate(chosen, start):
                part.sha256[row] = hashlib.sha256(plane).hexdigest()
                part.keys[row] = rank_key(seed, part.sha256[row])
            ctx.report("decode", done + (start + len(chosen)) / len(labels), len(batches))
        if done == len(batches) // 2:
            faults.point("mid-decode")
        part.widths[:] = part.heights[:] = SIDE
        parts.append(part)
        first += len(labels)
    return Rows.joined(parts)


def _read_batch(tree: Tree, member: Member) -> tuple[np.ndarray, np.ndarray]:
    """int32 [N] labels and uint8 [N, 3072] planes of one file."""
    data = read(tree.kind, tree.folder, tree.fd, member)
    if member.path.endswith(".bin"):
        if len(data) % (1 + PIXELS):
            raise Refused(f"{member.path} has {len(data)} bytes: expected a multiple of {1 + PIXELS}, as CIFAR-10's "
                          "binary edition has", "bad_dataset")
        records = np.frombuffer(data, np.uint8).reshape(-1, 1 + PIXELS)
        labels, planes = records[:, 0].astype(np.int32), records[:, 1:]
    else:
        batch = load_plain(data, member.path)
        planes, found = batch.get("data"), batch.get("labels")
        if (not isinstance(planes, np.ndarray) or planes.shape[1:] != (PIXELS,) or not isinstance(found, list)
                or len(found) != len(planes) or not all(type(label) is int for label in found)):
            raise Refused(f"{member.path} is not a batch of CIFAR-10: expected `data`, uint8 [N, {PIXELS}], and "
                          "`labels`, a list of N integers", "bad_dataset")
        labels = np.clip(np.array(found, dtype=object), -1, len(LABELS)).astype(np.int32)
    if len(labels) == 0 or labels.min() < 0 or labels.max() >= len(LABELS):
        raise Refused(f"{member.path} has {len(labels)} images with labels that are not all 0 to {len(LABELS) - 1}: "
                      "it is not a batch of CIFAR-10", "bad_dataset")
    return labels, np.ascontiguousarray(planes)


def _pixels(xp: ModuleType, planes: np.ndarray, size: int) -> np.ndarray:
    """uint8 [N, 3072] -> uint8 [N, size, size, 3]."""
    images = np.ascontiguousarray(planes.reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1))
    return images if size == SIDE else to_host(resample(xp, images, size))
