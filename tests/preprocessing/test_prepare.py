"""The body of a PreprocessJob: a source in, a published Dataset out, or a sentence and nothing left behind."""

import json
import os
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil
import pytest
from PIL import Image

from preprocessing.decode import decode_all
from preprocessing.jobs import prepare
from preprocessing.layouts import read_layout
from shared.artifacts import open_artifact
from shared.attempt import Attempt, Cancelled
from shared.datasets import SPLITS, Dataset
from shared.errors import Refused
from shared.images import decode
from shared.jobs import PreprocessJob, new_id
from shared.tree import scan

Prepare = Callable[..., tuple[Dataset, dict[str, Any]]]


def test_a_folder_becomes_a_dataset(prepare_source: Prepare, two_classes: Path) -> None:
    dataset, stats = prepare_source("import:pets", validation=0.2, test=0.2)
    assert dataset.spec.labels == ("cat", "dog")
    assert dataset.spec.size == 32
    assert stats["classes"] == {"train": {"cat": 6, "dog": 6}, "validation": {"cat": 2, "dog": 2},
                                "test": {"cat": 2, "dog": 2}}
    assert stats["sizes"] == [{"width": 40, "height": 36, "images": 20}]
    assert dataset.manifest["summary"] == {
        "dataset_id": dataset.id, "name": "pets", "images": {"train": 12, "validation": 4, "test": 4}, "classes": 2,
        "size": 32, "skipped": 0, "duplicates": 0, "conflicts": 0}
    assert dataset.manifest["parents"]["source"] == "import:pets"
    open_artifact(dataset.path.parents[1], f"datasets/{dataset.id}", hashes=True)


def test_the_index_says_where_every_row_of_pixels_came_from(prepare_source: Prepare, two_classes: Path) -> None:
    dataset, _ = prepare_source("import:pets")
    index = pd.read_parquet(dataset.path / "index.parquet")
    assert list(index.columns) == ["split", "row", "label", "path", "sha256", "width", "height"]
    for split in SPLITS:
        rows = index[index["split"] == split]
        assert list(rows["row"]) == list(range(len(dataset.images(split))))
        for row, path, label in zip(rows["row"], rows["path"], rows["label"], strict=True):
            expected = decode((two_classes / path).read_bytes(), 32)
            assert np.array_equal(dataset.images(split)[row], expected)
            assert dataset.spec.labels[dataset.labels(split)[row]] == label == path.split("/")[0]


def test_mean_and_std_are_those_of_the_training_split(prepare_source: Prepare, two_classes: Path) -> None:
    dataset, stats = prepare_source("import:pets")
    pixels = dataset.images("train").astype(np.float64) / 255
    assert np.allclose(dataset.spec.mean, pixels.mean((0, 1, 2)), rtol=0, atol=1e-12)
    assert np.allclose(dataset.spec.std, pixels.std((0, 1, 2)), rtol=0, atol=1e-9)
    assert stats["mean"] == list(dataset.spec.mean)


def test_the_same_source_gives_the_same_bytes(prepare_source: Prepare, two_classes: Path) -> None:
    one, two = prepare_source("import:pets")[0], prepare_source("import:pets")[0]
    hashes = [{name: f["sha256"] for name, f in d.manifest["files"].items()} for d in (one, two)]
    assert hashes[0] == hashes[1]
    assert one.manifest["parents"] == two.manifest["parents"]
    assert hashes[0]["train.npy"] != prepare_source("import:pets", seed=1)[0].manifest["files"]["train.npy"]["sha256"]


def test_the_number_of_processes_does_not_change_the_dataset(
        attempt_at: Callable[..., Attempt], root: Path, imports: Path, fill: Callable[..., None]) -> None:
    fill(imports / "many" / "a", 0, 150, width=33, height=32)
    fill(imports / "many" / "b", 500, 150, width=33, height=32)
    hashes = []
    for threads in ("1", "3"):
        job = PreprocessJob(new_id("d"), "many", "import:many")
        prepare(job, attempt_at(job, CPU_THREADS=threads))
        hashes.append(Dataset(root, job.dataset_id).manifest["files"]["train.npy"]["sha256"])
    assert hashes[0] == hashes[1]


@pytest.mark.parametrize(("width", "size"), [(20, 32), (50, 64), (90, 64), (100, 128), (180, 224), (400, 224)])
def test_without_a_size_the_nearest_to_the_images_is_taken(
        prepare_source: Prepare, imports: Path, fill: Callable[..., None], width: int, size: int) -> None:
    fill(imports / "pets" / "cat", 0, 3, width=width, height=width + 9)
    fill(imports / "pets" / "dog", 9, 3, width=width, height=width + 9)
    assert prepare_source("import:pets", size=0)[0].spec.size == size


def test_broken_images_are_skipped_counted_and_named(
        prepare_source: Prepare, two_classes: Path, picture: Callable[..., bytes]) -> None:
    (two_classes / "cat" / "cut.jpg").write_bytes(picture(50)[:300])
    (two_classes / "cat" / "notes.txt").write_text("not an image")
    (two_classes / "dog" / "empty.png").write_bytes(b"")
    dataset, stats = prepare_source("import:pets")
    assert dataset.manifest["summary"]["skipped"] == stats["skipped"]["images"] == 3
    assert [s["path"] for s in stats["skipped"]["examples"]] == ["cat/cut.jpg", "cat/notes.txt", "dog/empty.png"]
    assert all("expected" in s["reason"] for s in stats["skipped"]["examples"])
    assert sum(dataset.manifest["summary"]["images"].values()) == 20


def test_skipped_images_are_all_counted_and_the_first_100_named(prepare_source: Prepare, two_classes: Path) -> None:
    for i in range(120):
        (two_classes / "cat" / f"broken-{i}.jpg").write_bytes(b"x")
    _, stats = prepare_source("import:pets")
    assert stats["skipped"]["images"] == 120
    assert len(stats["skipped"]["examples"]) == 100


def test_splits_of_the_layout_are_kept(prepare_source: Prepare, imports: Path, fill: Callable[..., None]) -> None:
    for split, first in (("train", 0), ("val", 1000), ("test", 2000)):
        for label, offset in (("cat", 0), ("dog", 500)):
            fill(imports / "pets" / split / label, first + offset, 4)
    dataset, _ = prepare_source("import:pets")
    index = pd.read_parquet(dataset.path / "index.parquet")
    assert {s: set(index[index["split"] == s]["path"].str.split("/").str[0]) for s in SPLITS} == {
        "train": {"train"}, "validation": {"val"}, "test": {"test"}}


def test_a_missing_validation_split_is_cut_from_the_training_images(
        prepare_source: Prepare, imports: Path, fill: Callable[..., None]) -> None:
    for split, first, count in (("train", 0, 10), ("test", 2000, 5)):
        for label, offset in (("cat", 0), ("dog", 500)):
            fill(imports / "pets" / split / label, first + offset, count)
    dataset, _ = prepare_source("import:pets", validation=0.2, test=0.4)
    assert dataset.manifest["summary"]["images"] == {"train": 16, "validation": 4, "test": 10}


def test_one_image_under_two_labels_is_reported_and_dropped(prepare_source: Prepare, two_classes: Path) -> None:
    shutil.copy(two_classes / "cat" / "0.jpg", two_classes / "dog" / "also.jpg")
    dataset, stats = prepare_source("import:pets")
    assert dataset.manifest["summary"]["conflicts"] == stats["conflicts"]["images"] == 2
    assert {(c["path"], c["label"]) for c in stats["conflicts"]["examples"]} == {
        ("cat/0.jpg", "cat"), ("dog/also.jpg", "dog")}
    assert sum(dataset.manifest["summary"]["images"].values()) == 19


def test_a_copy_across_splits_stays_in_test_alone(
        prepare_source: Prepare, imports: Path, fill: Callable[..., None]) -> None:
    for split, first in (("train", 0), ("validation", 1000), ("test", 2000)):
        for label, offset in (("cat", 0), ("dog", 500)):
            fill(imports / "pets" / split / label, first + offset, 4)
    pets = imports / "pets"
    shutil.copy(pets / "test/cat/2000.jpg", pets / "train/cat/copy-of-test.jpg")
    shutil.copy(pets / "test/cat/2000.jpg", pets / "validation/cat/copy-of-test.jpg")
    shutil.copy(pets / "validation/dog/1500.jpg", pets / "train/dog/copy-of-validation.jpg")
    dataset, stats = prepare_source("import:pets")
    assert dataset.manifest["summary"]["images"] == {"train": 8, "validation": 8, "test": 8}
    assert stats["duplicates"]["images"] == stats["duplicates"]["removed"] == 3
    assert not [p for p in pd.read_parquet(dataset.path / "index.parquet")["path"] if "copy" in p]


@pytest.mark.parametrize("pack", ["zip", "tar", "gztar", "bztar", "xztar"])
def test_an_uploaded_archive_gives_what_its_folder_gives(
        prepare_source: Prepare, root: Path, two_classes: Path, tmp_path: Path, pack: str) -> None:
    made = Path(shutil.make_archive(str(tmp_path / "packed"), pack, two_classes.parent, "pets"))
    folder = root / "raw" / "u-1"
    folder.mkdir(parents=True)
    made.rename(folder / "data")
    (folder / "upload.json").write_text(json.dumps({"size": (folder / "data").stat().st_size}))
    from_upload, from_folder = prepare_source("upload:u-1")[0], prepare_source("import:pets")[0]
    for split in SPLITS:
        assert np.array_equal(from_upload.images(split), from_folder.images(split))
        assert np.array_equal(from_upload.labels(split), from_folder.labels(split))
    assert from_upload.spec == from_folder.spec


def test_stored_and_deflated_members_are_read_alike(prepare_source: Prepare, two_classes: Path, imports: Path) -> None:
    for name, method in (("stored.zip", zipfile.ZIP_STORED), ("deflated.zip", zipfile.ZIP_DEFLATED)):
        with zipfile.ZipFile(imports / name, "w", method) as archive:
            for path in sorted(two_classes.rglob("*.jpg")):
                archive.write(path, path.relative_to(two_classes))
    one, two = prepare_source("import:stored.zip")[0], prepare_source("import:deflated.zip")[0]
    assert np.array_equal(one.images("train"), two.images("train"))


def test_a_csv_manifest_in_an_archive_decides_labels_and_splits(
        prepare_source: Prepare, imports: Path, picture: Callable[..., bytes], tmp_path: Path) -> None:
    lines = ["path,label,split"]
    with tarfile.open(imports / "listed.tar", "w") as archive:
        for i in range(12):
            path = tmp_path / f"{i}.png"
            path.write_bytes(picture(i, format="PNG"))
            archive.add(path, f"set/images/{i}.png")
            lines.append(f"images/{i}.png,{'even' if i % 2 == 0 else 'odd'},{('train', 'val', 'test')[i // 2 % 3]}")
        manifest = tmp_path / "manifest.csv"
        manifest.write_text("\n".join(lines))
        archive.add(manifest, "set/manifest.csv")
    dataset, _ = prepare_source("import:listed.tar")
    assert dataset.spec.labels == ("even", "odd")
    assert dataset.manifest["summary"]["images"] == {"train": 4, "validation": 4, "test": 4}


def _leftovers(root: Path) -> list[str]:
    return [str(p) for folder in (".staging", "work", "datasets") for p in (root / folder).rglob("*") if p.is_file()]


def test_every_image_broken_fails_with_what_was_found(prepare_source: Prepare, root: Path, imports: Path) -> None:
    for label in ("cat", "dog"):
        (imports / "pets" / label).mkdir(parents=True)
        (imports / "pets" / label / "x.jpg").write_bytes(b"x")
    with pytest.raises(Refused, match="none of the 2 images can be used, such as cat/x.jpg") as e:
        prepare_source("import:pets")
    assert e.value.code == "bad_dataset"
    assert _leftovers(root) == []


def test_a_class_too_small_for_every_split_is_named(prepare_source: Prepare, two_classes: Path, root: Path) -> None:
    for path in sorted((two_classes / "dog").iterdir())[2:]:
        path.unlink()
    with pytest.raises(Refused, match=r"'dog' has 2 .*at least 3 in each class"):
        prepare_source("import:pets")
    assert _leftovers(root) == []


def test_an_archive_that_lies_about_a_member_fails_and_leaves_nothing(
        prepare_source: Prepare, two_classes: Path, imports: Path, root: Path) -> None:
    with zipfile.ZipFile(imports / "lies.zip", "w") as archive:
        for path in sorted(two_classes.rglob("*.jpg")):
            archive.write(path, path.relative_to(two_classes))
    data = bytearray((imports / "lies.zip").read_bytes())
    at = data.index(b"\xff\xd8\xff") + 40
    data[at] ^= 0xFF
    (imports / "lies.zip").write_bytes(data)
    with pytest.raises(Refused, match="is not the .* bytes that its directory says") as e:
        prepare_source("import:lies.zip")
    assert e.value.code == "bad_archive"
    assert _leftovers(root) == []


def test_a_cancelled_job_stops_while_decoding_and_leaves_nothing(
        attempt_at: Callable[..., Attempt], root: Path, two_classes: Path) -> None:
    job = PreprocessJob(new_id("d"), "pets", "import:pets")
    ctx = attempt_at(job)
    (root / "jobs" / ctx.job_id / "cancel").touch()
    with pytest.raises(Cancelled):
        prepare(job, ctx)
    assert _leftovers(root) == []


def test_progress_is_told_by_stage(attempt_at: Callable[..., Attempt], two_classes: Path, redis: Any) -> None:
    job = PreprocessJob(new_id("d"), "pets", "import:pets")
    ctx = attempt_at(job)
    prepare(job, ctx)
    events = [json.loads(f[b"event"]) for _, f in redis.xrange(f"lanner:events:{ctx.job_id}")]
    told = [(e["stage"], e["step"], e["of"]) for e in events if e["what"] == "progress"]
    stages = [stage for stage, _, _ in told]
    assert stages == sorted(stages, key=["read", "decode", "write", "inspect", "publish"].index)
    assert ("decode", 20, 20) in told
    assert ("write", 20, 20) in told
    assert told[-1] == ("publish", 1, 1)


def test_a_full_volume_is_the_volume_s_fault_and_not_the_image_s(
        ctx: Attempt, two_classes: Path, imports: Path) -> None:
    tree = scan(str(two_classes), str(imports))
    with open("/dev/full", "wb") as full, pytest.raises(OSError, match="No space left"):
        decode_all(tree, read_layout(tree), 32, 0, full.fileno(), ctx)


def test_a_decoder_that_dies_ends_the_attempt_and_leaves_no_process(
        ctx: Attempt, imports: Path, fill: Callable[..., None], tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch) -> None:
    for label in ("a", "b"):  # large, so that some are left to decode when the first answer has come
        fill(imports / "many" / label, 0, 60, width=1200, height=900)
    tree = scan(str(imports / "many"), str(imports))
    before = {c.pid for c in psutil.Process().children()}

    def kill_decoders(*_: object, **__: object) -> None:
        for child in psutil.Process().children():
            if child.pid not in before:
                child.kill()

    monkeypatch.setattr(ctx, "report", kill_decoders)
    with open(tmp_path / "pixels", "w+b") as pixels, pytest.raises(RuntimeError, match="a decoding process died"):
        decode_all(tree, read_layout(tree), 32, 0, pixels.fileno(), ctx)
    assert {c.pid for c in psutil.Process().children()} <= before


def test_many_broken_images_with_long_names_are_no_obstacle(ctx: Attempt, imports: Path, tmp_path: Path) -> None:
    for label in ("a", "b"):
        (imports / "many" / label).mkdir(parents=True)
        for i in range(700):
            (imports / "many" / label / f"{'x' * 200}{i}.jpg").write_bytes(b"\xff\xd8\xff")
    tree = scan(str(imports / "many"), str(imports))
    with open(tmp_path / "pixels", "w+b") as pixels:
        assert len(decode_all(tree, read_layout(tree), 32, 0, pixels.fileno(), ctx).skipped) == 1400


def test_every_picture_of_a_photo_album_is_upright(prepare_source: Prepare, imports: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    for label in ("a", "b"):
        (imports / "album" / label).mkdir(parents=True)
        for i in range(3):
            half = np.zeros((60, 80, 3), np.uint8)
            half[:, :40] = 200 + 10 * i + (label == "b")
            Image.fromarray(half).save(imports / "album" / label / f"{i}.jpg", exif=exif, quality=95)
    dataset, stats = prepare_source("import:album")
    assert stats["sizes"] == [{"width": 60, "height": 80, "images": 6}]
    for image in dataset.images("train"):
        assert image[:12].min() > 150
        assert image[20:].max() < 100


@pytest.mark.skipif(not os.path.isdir(os.environ.get("LANNER_TEST_DATA", "")),
                    reason="LANNER_TEST_DATA names no folder of real images")
def test_real_photographs_become_a_dataset(attempt_at: Callable[..., Attempt], root: Path) -> None:
    folder = Path(os.environ["LANNER_TEST_DATA"]).resolve()
    job = PreprocessJob(new_id("d"), "real", f"import:{folder.name}")
    summary = prepare(job, attempt_at(job, IMPORTS=str(folder.parent)))
    assert summary["classes"] == len([p for p in folder.iterdir() if p.is_dir()])
    assert summary["skipped"] == 0
    assert sum(summary["images"].values()) + summary["conflicts"] == len(list(folder.rglob("*.jpg")))
    assert 0.3 < np.mean(Dataset(root, job.dataset_id).spec.mean) < 0.7
