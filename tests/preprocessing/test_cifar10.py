"""CIFAR-10's two editions, made small."""

import hashlib
import io
import os
import pickle
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from preprocessing.plain_pickle import load_plain
from shared.datasets import Dataset
from shared.errors import Refused

Prepare = Callable[..., tuple[Dataset, dict[str, Any]]]
BATCHES = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")
LABELS = (np.arange(40) % 10).tolist()


def planes_of(batch: int) -> np.ndarray:
    return np.random.default_rng(batch).integers(0, 256, (40, 3072), dtype=np.uint8)


def binary(batch: int) -> bytes:
    return np.concatenate([np.array(LABELS, np.uint8)[:, None], planes_of(batch)], axis=1).tobytes()


def python(batch: int, protocol: int = 4, **changes: Any) -> bytes:
    body = {"batch_label": "x", "labels": LABELS, "data": planes_of(batch), "filenames": ["a.png"] * 40, **changes}
    return pickle.dumps(body, protocol)


def python2(batch: int) -> bytes:
    """As Python 2 with NumPy 1 wrote the official files: text is bytes, the array's bytes are a string."""
    raw = planes_of(batch).tobytes()

    def text(s: bytes) -> bytes:
        return b"U" + bytes([len(s)]) + s

    array = (b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00t" + text(b"b") + b"tR"
             b"(K\x01(K\x28M\x00\x0ctcnumpy\ndtype\n(" + text(b"u1") + b"K\x00K\x01tR(K\x03" + text(b"|")
             + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T" + len(raw).to_bytes(4, "little") + raw + b"tb")
    labels = b"](" + b"".join(b"K" + bytes([label]) for label in LABELS) + b"e"
    return b"\x80\x02}(" + text(b"data") + array + text(b"labels") + labels + b"u."


def pack(path: Path, folder: str, files: dict[str, bytes], mode: str = "w:gz") -> None:
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, data in files.items():
            info = tarfile.TarInfo(folder + name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def test_the_binary_edition_keeps_its_test_split_and_its_pixels(prepare_source: Prepare, imports: Path) -> None:
    files = {f"{b}.bin": binary(i) for i, b in enumerate(BATCHES)}
    others = {"batches.meta.txt": b"airplane\n", "readme.html": b""}
    pack(imports / "cifar-10-binary.tar.gz", "cifar-10-batches-bin/", files | others)
    dataset, stats = prepare_source("import:cifar-10-binary.tar.gz", size=0)
    assert dataset.spec.size == 32
    assert dataset.spec.labels[0] == "airplane"
    assert stats["images"] == {"train": 180, "validation": 20, "test": 40}
    assert set(stats["classes"]["validation"].values()) == {2}
    index = pd.read_parquet(dataset.path / "index.parquet")
    test = index[index["split"] == "test"]
    assert set(test["path"].str.split("#").str[0]) == {"test_batch"}
    for row, path, digest in zip(test["row"], test["path"], test["sha256"], strict=True):
        plane = planes_of(5)[int(path.split("#")[1])]
        assert np.array_equal(dataset.images("test")[row], plane.reshape(3, 32, 32).transpose(1, 2, 0))
        assert digest == hashlib.sha256(plane.tobytes()).hexdigest()


@pytest.mark.parametrize("edition", [python2, lambda b: python(b, 2), lambda b: python(b, 4), lambda b: python(b, 5)])
def test_every_edition_gives_the_same_dataset(prepare_source: Prepare, imports: Path,
                                              edition: Callable[[int], bytes]) -> None:
    pack(imports / "bin", "cifar-10-batches-bin/", {f"{b}.bin": binary(i) for i, b in enumerate(BATCHES)}, "w")
    pack(imports / "py", "cifar-10-batches-py/", {b: edition(i) for i, b in enumerate(BATCHES)} | {"batches.meta": b""})
    one, two = prepare_source("import:bin")[0].manifest["files"], prepare_source("import:py")[0].manifest["files"]
    assert {n: f["sha256"] for n, f in one.items()} == {n: f["sha256"] for n, f in two.items()}


def test_a_folder_of_batches_will_do_and_another_size_too(prepare_source: Prepare, imports: Path) -> None:
    (imports / "c" / "cifar-10-batches-bin").mkdir(parents=True)
    for i, name in enumerate(BATCHES):
        (imports / "c" / "cifar-10-batches-bin" / f"{name}.bin").write_bytes(binary(i))
    dataset, stats = prepare_source("import:c", size=48)
    assert dataset.images("train").shape == (180, 48, 48, 3)
    assert stats["sizes"] == [{"width": 32, "height": 32, "images": 240}]


def test_without_a_test_batch_both_splits_are_cut(prepare_source: Prepare, imports: Path) -> None:
    pack(imports / "c", "", {f"{b}.bin": binary(i) for i, b in enumerate(BATCHES[:5])})
    assert prepare_source("import:c")[1]["images"] == {"train": 160, "validation": 20, "test": 20}


@pytest.mark.parametrize(("name", "data", "sentence"), [
    ("data_batch_1.bin", binary(0)[:-1], "expected a multiple of 3073"),
    ("data_batch_1.bin", b"\x0a" + bytes(3072), "not all 0 to 9"),
    ("data_batch_1.bin", b"", "has 0 images"),
    ("data_batch_1", b"hello", "refused as a pickle"),
    ("data_batch_1", pickle.dumps([1, 2]), "refused as a pickle"),
    ("data_batch_1", python(0)[:1000], "refused as a pickle"),
    ("data_batch_1", python(0, labels=LABELS[:-1]), "is not a batch of CIFAR-10"),
    ("data_batch_1", python(0, labels=[10**30] * 40), "not all 0 to 9"),
    ("data_batch_1", python(0, labels=["cat"] * 40), "is not a batch of CIFAR-10"),
    ("data_batch_1", python(0, data=np.zeros((40, 100), np.uint8)), "is not a batch of CIFAR-10"),
    ("data_batch_1", python(0, data=np.zeros((40, 3072), np.float32)), "refused as a pickle .*expected uint8"),
])
def test_what_is_no_batch_is_refused(prepare_source: Prepare, imports: Path, name: str, data: bytes,
                                     sentence: str) -> None:
    pack(imports / "c", "", {name: data})
    with pytest.raises(Refused, match=sentence) as e:
        prepare_source("import:c")
    assert e.value.code == "bad_dataset"


def test_two_editions_beside_each_other_are_refused(prepare_source: Prepare, imports: Path) -> None:
    pack(imports / "c", "", {"data_batch_1.bin": binary(0), "data_batch_1": python(0)})
    with pytest.raises(Refused, match="CIFAR-10 is here more than once, in data_batch_1 and data_batch_1.bin"):
        prepare_source("import:c")


class Runs:
    """Unpickled by the standard library, it would make a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("protocol", range(6))
def test_a_pickle_that_runs_code_is_refused_and_runs_nothing(tmp_path: Path, protocol: int) -> None:
    data = pickle.dumps({"data": Runs(tmp_path / "ran"), "labels": []}, protocol)
    with pytest.raises(Refused, match=r"asks for (posix|nt)\.mkdir") as e:
        load_plain(data, "data_batch_1")
    assert e.value.code == "bad_dataset"
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("data", [b"\x80\x02}r\xff\xff\xff\x7f.", b"}p99999999\n.", b"}q\xff."])
def test_a_pickle_that_asks_for_gigabytes_gets_none(data: bytes) -> None:
    tracemalloc.start()
    with pytest.raises(Refused, match="it keeps a value as its"):
        load_plain(data, "data_batch_1")
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


@pytest.mark.parametrize("wanted", [
    b"cbuiltins\neval\n(X\x03\x00\x00\x001+1tR.", b"cnumpy\nload\n(X\x01\x00\x00\x00xtR.",
    b"cos\nsystem\n(X\x04\x00\x00\x00truetR.",
    b"cnumpy.core.multiarray\nscalar\n(tR.", b"c_codecs\nencode\n(X\x01\x00\x00\x00xX\x04\x00\x00\x00zliptR.",
    b"cnumpy\nndarray\n(K\x05tR.", b"cnumpy\ndtype\n(X\x01\x00\x00\x00OtR.",
    b"cnumpy.core.numeric\n_frombuffer\n(C\x01xX\x01\x00\x00\x00O(K\x01tX\x01\x00\x00\x00CtR."])
def test_only_byte_arrays_and_plain_values_are_restored(wanted: bytes) -> None:
    with pytest.raises(Refused, match="refused as a pickle"):
        load_plain(wanted, "data_batch_1")
