"""PredictJob from end to end: every image answered, in order, once; parts survive; the choice stands."""

import dataclasses
import shutil
import zipfile
from io import BytesIO

import keras
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from optimization import predicting
from optimization.jobs import optimize, predict
from shared.artifacts import open_artifact, promote, write_json
from shared.attempt import Cancelled
from shared.datasets import Dataset
from shared.errors import NotFound, Refused
from shared.jobs import OptimizeJob, PredictJob
from shared.runtimes import open_session, run_in_chunks

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")
JOB = PredictJob("r-1", "sides", "dataset:d-1")


@pytest.fixture(scope="module")
def served(volume, tmp_path_factory, begin):
    """A volume whose Name `sides` has version 1 with two Variants, production at onnx-fp32."""
    root = tmp_path_factory.mktemp("served") / "artifacts"
    shutil.copytree(volume, root)
    job = OptimizeJob("m-1", "sides", variants=("onnx-fp32", "litert-fp32"))
    optimize(job, begin(root, job, "j-o"))
    promote(root, "sides", "production", 1, "onnx-fp32", by="test")
    return root


@pytest.fixture
def root(served, tmp_path):
    return shutil.copytree(served, tmp_path / "artifacts")


def rows_of(root, predictions="r-1"):
    return pq.read_table(root / "predictions" / predictions / "predictions.parquet").to_pylist()


def test_every_image_is_answered_as_its_variant_answers_in_order(root, begin, monkeypatch):
    monkeypatch.setattr(predicting, "PART", 200)  # several parts, across the splits' ends
    summary = predict(JOB, begin(root, JOB))
    dataset, rows = Dataset(root, "d-1"), rows_of(root)
    names = ("train", "validation", "test")
    assert [row["id"] for row in rows] == [f"{s}/{i}" for s in names for i in range(len(dataset.labels(s)))]
    images = np.concatenate([dataset.images(s) for s in names])
    labels = np.concatenate([dataset.labels(s) for s in names])
    session, manifest = open_session(root, "m-1", "onnx-fp32")
    expected = run_in_chunks(session, images)
    np.testing.assert_allclose([row["probabilities"] for row in rows], expected, atol=1e-6)
    named = [manifest["spec"]["labels"][k] for k in expected.argmax(1)]
    assert [row["predicted"] for row in rows] == named
    assert [row["label"] for row in rows] == [manifest["spec"]["labels"][k] for k in labels]
    assert all(row["confidence"] == max(row["probabilities"]) and row["error"] is None for row in rows)
    assert summary["accuracy"] == pytest.approx((expected.argmax(1) == labels).mean())
    assert (summary["images"], summary["failed"], summary["variant"]) == (len(rows), 0, "onnx-fp32")
    published = open_artifact(root, "predictions/r-1")
    assert published["labels"] == manifest["spec"]["labels"]
    assert published["parents"] == {"source": "dataset:d-1", "model": "m-1", "variant": "onnx-fp32"}


def test_a_stopped_job_keeps_its_parts_and_its_choice_though_the_alias_moves(root, begin, monkeypatch):
    monkeypatch.setattr(predicting, "PART", 300)
    ctx = begin(root, JOB)
    checks = iter([None] * 15 + [Cancelled])  # one before each part, one behind each 64 images: in the third part

    def check():
        if next(checks) is Cancelled:
            raise Cancelled

    monkeypatch.setattr(ctx, "check", check)
    ctx.work.mkdir(parents=True)
    with pytest.raises(Cancelled):
        predict(JOB, ctx)
    kept = {part: part.stat().st_mtime_ns for part in ctx.work.glob("part-*.parquet")}
    assert len(kept) == 2
    assert not (root / "predictions").exists()
    promote(root, "sides", "production", 1, "litert-fp32", by="test")
    summary = predict(JOB, begin(root, JOB))
    assert {part: part.stat().st_mtime_ns for part in kept} == kept
    assert summary["variant"] == "onnx-fp32"
    assert len(rows_of(root)) == summary["images"] == 1440


def test_one_split_a_named_variant_and_the_embedding(root, begin):
    job = PredictJob("r-2", "sides", "dataset:d-1/test", version=1, variant="litert-fp32", embedding=True)
    summary = predict(job, begin(root, job, "j-2"))
    rows = rows_of(root, "r-2")
    assert (summary["variant"], len(rows)) == ("litert-fp32", 60)
    vectors = np.array([row["embedding"] for row in rows])
    assert vectors.shape == (60, 8 * 8 * 16)
    model = keras.models.load_model(root / "models/m-1/model.keras", compile=False)
    images = Dataset(root, "d-1").images("test").astype(np.float32)
    expected = keras.Model(model.input, model.get_layer("logits").input)(images, training=False)
    np.testing.assert_allclose(vectors, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("change", "error", "says"), [
    ({"name": "nobody"}, NotFound, "model nobody does not exist"),
    ({"alias": "candidate"}, NotFound, "no alias candidate: give version and variant"),
    ({"version": 7}, NotFound, r"no version 7: it has \[1\]"),
    ({"variant": "onnx-int8"}, NotFound, "variants/m-1/onnx-int8 does not exist"),
    ({"variant": "tensorrt-fp16"}, NotFound, "variants/m-1/tensorrt-fp16 does not exist"),
    ({"source": "dataset:d-9"}, NotFound, "datasets/d-9 does not exist"),
])
def test_what_can_not_be_predicted_says_why_and_publishes_nothing(root, begin, change, error, says):
    job = PredictJob(**{"predictions_id": "r-3", "name": "sides", "source": "dataset:d-1", **change})
    with pytest.raises(error, match=says):
        predict(job, begin(root, job, "j-3"))
    assert not (root / "predictions").exists()


def test_a_dataset_of_another_size_is_refused_with_the_remedy(root, begin):
    path = root / "datasets/d-1/manifest.json"
    path.write_text(path.read_text().replace('"size": 32', '"size": 64'))
    job = PredictJob("r-4", "sides", "dataset:d-1")
    with pytest.raises(Refused, match="64 pixels a side, the model takes 32: prepare the same images"):
        predict(job, begin(root, job, "j-4"))


def upload(root, name, members, as_zip=True):
    """An archive as the API keeps it."""
    path = root / "raw" / name / "data"
    path.parent.mkdir(parents=True)
    if as_zip:
        with zipfile.ZipFile(path, "w") as archive:
            for member, data in members.items():
                archive.writestr(member, data)
    else:
        path.write_bytes(members)
    write_json(path.with_name("upload.json"), {"size": path.stat().st_size})


def png(image):
    out = BytesIO()
    Image.fromarray(image).save(out, "png")
    return out.getvalue()


def test_an_uploaded_archive_is_answered_file_by_file_and_what_is_no_image_says_so(root, begin):
    images = Dataset(root, "d-1").images("test")[:5]
    members = {f"a/{i}.png": png(image) for i, image in enumerate(images)}
    upload(root, "u-1", {**members, "b/broken.jpg": b"\xff\xd8\xff no jpeg", "notes.txt": b"hello", ".DS_Store": b"x"})
    job = PredictJob("r-5", "sides", "upload:u-1", embedding=True)
    summary = predict(job, begin(root, job, "j-5"))
    rows = {row["id"]: row for row in rows_of(root, "r-5")}
    assert list(rows) == [*members, "b/broken.jpg", "notes.txt"]
    assert (summary["images"], summary["failed"], summary["accuracy"]) == (7, 2, None)
    session, _ = open_session(root, "m-1", "onnx-fp32")
    got = [rows[name]["probabilities"] for name in members]
    np.testing.assert_allclose(got, session.run(np.ascontiguousarray(images)), atol=1e-6)
    assert all(len(rows[name]["embedding"]) == 8 * 8 * 16 and rows[name]["error"] is None for name in members)
    for name in ("b/broken.jpg", "notes.txt"):
        assert "expected a whole JPEG, PNG or WebP file" in rows[name]["error"]
        assert rows[name]["predicted"] is rows[name]["probabilities"] is rows[name]["embedding"] is None


def test_an_archive_of_no_image_at_all_is_a_table_of_errors(root, begin):
    upload(root, "u-2", {"notes.txt": b"hello"})
    job = PredictJob("r-6", "sides", "upload:u-2")
    assert predict(job, begin(root, job, "j-6"))["failed"] == 1
    assert [row["predicted"] for row in rows_of(root, "r-6")] == [None]


@pytest.mark.parametrize("packed", [False, True])
def test_a_folder_or_archive_of_the_host_is_read_where_it_lies(root, begin, tmp_path, packed):
    images = Dataset(root, "d-1").images("test")[:3]
    for i, image in enumerate(images):
        (tmp_path / "imports/new/inner").mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(tmp_path / f"imports/new/inner/{i}.png")
    (tmp_path / "imports/new/broken.png").write_bytes(b"no image")
    name = "new"
    if packed:
        name = shutil.make_archive(str(tmp_path / "imports/packed"), "zip", tmp_path / "imports/new").rpartition("/")[2]
    job = PredictJob("r-9", "sides", f"import:{name}")
    ctx = begin(root, job)
    ctx.settings = dataclasses.replace(ctx.settings, imports=tmp_path / "imports")
    summary = predict(job, ctx)
    rows = rows_of(root, "r-9")
    assert [row["id"] for row in rows] == ["broken.png", "inner/0.png", "inner/1.png", "inner/2.png"]
    assert (summary["images"], summary["failed"], rows[0]["predicted"]) == (4, 1, None)
    session, _ = open_session(root, "m-1", "onnx-fp32")
    np.testing.assert_allclose([row["probabilities"] for row in rows[1:]], run_in_chunks(session, images), atol=1e-6)
    for missing in ("none", "../artifacts"):
        job = PredictJob("r-8", "sides", f"import:{missing}")
        ctx = begin(root, job, f"j-{len(missing)}")
        ctx.settings = dataclasses.replace(ctx.settings, imports=tmp_path / "imports")
        with pytest.raises(Refused, match="does not exist|is not valid"):
            predict(job, ctx)


@pytest.mark.parametrize(("members", "as_zip", "says"), [
    ({}, True, "holds no files"), (b"neither zip nor tar", False, "expected a zip, or a tar")])
def test_an_upload_that_is_no_archive_of_files_is_refused(root, begin, members, as_zip, says):
    upload(root, "u-3", members, as_zip)
    job = PredictJob("r-7", "sides", "upload:u-3")
    with pytest.raises(Refused, match=says):
        predict(job, begin(root, job, "j-7"))
    assert not (root / "predictions").exists()
