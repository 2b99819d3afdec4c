"""A published Dataset as its readers see it: memory-mapped pixels, labels and the spec."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shared.artifacts import Manifest, open_artifact
from shared.errors import Damaged
from shared.jobs import SPLITS as SPLITS


@dataclass(frozen=True)
class Spec:
    """What an image means, from the Dataset to the endpoint.

    mean and std are per channel (R, G, B) over the training split, of pixels scaled to 0..1.
    """

    size: int
    labels: tuple[str, ...]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @classmethod
    def of(cls, manifest: Manifest) -> "Spec":
        s = manifest["spec"]
        return cls(s["size"], tuple(s["labels"]), tuple(s["mean"]), tuple(s["std"]))

    def to_json(self) -> dict[str, Any]:
        return {"size": self.size, "labels": list(self.labels), "mean": list(self.mean), "std": list(self.std)}


class Dataset:
    """An opened Dataset. Its files' sizes and headers are checked; full hashes are the publisher's and the scrub's."""

    def __init__(self, root: Path, dataset_id: str):
        self.id = dataset_id
        self.path = root / "datasets" / dataset_id
        self.manifest = open_artifact(root, f"datasets/{dataset_id}", hashes=False)
        self.spec = Spec.of(self.manifest)

    def images(self, split: str) -> np.ndarray:
        """uint8 [N, size, size, 3], RGB, memory-mapped, read-only."""
        array: np.ndarray = np.load(self.path / f"{split}.npy", mmap_mode="r", allow_pickle=False)
        if array.dtype != np.uint8 or array.shape[1:] != (self.spec.size, self.spec.size, 3):
            raise Damaged(f"dataset {self.id}: {split}.npy is {array.dtype}{array.shape}, "
                          f"expected uint8 [N, {self.spec.size}, {self.spec.size}, 3]")
        return array

    def labels(self, split: str) -> np.ndarray:
        """int32 [N], indices into spec.labels."""
        labels: np.ndarray = np.load(self.path / f"{split}.labels.npy", allow_pickle=False)
        return labels
