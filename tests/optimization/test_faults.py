"""Planted faults, the ones that are commonest after a deployment: each is refused before it can serve."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import keras
import numpy as np
import pytest

from optimization.build import Source, build
from optimization.export import stratified
from optimization.gate import judge
from optimization.reference import KerasReference
from shared.artifacts import open_artifact, promote, register_version, sha256
from shared.datasets import Dataset
from shared.errors import Damaged
from shared.runtimes import load, open_session, run_in_chunks
from shared.runtimes.onnx import OnnxSession

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")


@pytest.fixture(scope="module")
def source(volume) -> Source:
    dataset = Dataset(volume, "d-1")
    with np.load(volume / "models/m-1/golden.npz") as golden:
        images, scores = golden["images"], golden["probabilities"]
    model = KerasReference(volume / "models/m-1/model.keras", 32).model
    sample = stratified(np.asarray(dataset.labels("train")), 128, 0)
    return Source("m-1", open_artifact(volume, "models/m-1"), model, images, scores, dataset.images("train")[sample])


@pytest.fixture(scope="module")
def built(volume, source, tmp_path_factory) -> Path:
    """A volume with a sound onnx-fp32."""
    root = Path(shutil.copytree(volume, tmp_path_factory.mktemp("built") / "artifacts"))
    build(root, "j-1", source, "onnx-fp32")
    return root


@pytest.fixture
def root(built, tmp_path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "artifacts"))


def wrapped(model: keras.Model, before=lambda pixels: pixels, after=lambda scores: scores) -> keras.Model:
    image = keras.Input((32, 32, 3))
    return keras.Model(image, after(model(before(image), training=False)))


FAULTS = {
    "channels swapped to BGR": lambda m: wrapped(m, before=lambda pixels: pixels[..., ::-1]),
    "pixels divided by 255 twice": lambda m: wrapped(m, before=lambda pixels: pixels / 255),
    "labels permuted": lambda m: wrapped(m, after=lambda scores: keras.ops.take(scores, [1, 2, 3, 0], axis=1)),
}


@pytest.mark.parametrize("variant", ["onnx-fp32", "litert-fp16"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_graph_is_refused_when_it_is_built(tmp_path, source, fault, variant):
    faulty = replace(source, model=FAULTS[fault](source.model))
    with pytest.raises(Damaged, match=f"{variant}: the golden batch is off"):
        build(tmp_path, "j-1", faulty, variant)
    assert not (tmp_path / "variants").exists()
    assert list((tmp_path / ".staging").iterdir()) == []


def verdict_on(volume, root, source, variant):
    """The gate's verdict on a Variant of `root`, on the validation split."""
    dataset = Dataset(volume, "d-1")
    images, labels = dataset.images("validation"), np.asarray(dataset.labels("validation"))
    reference = KerasReference(volume / "models/m-1/model.keras", 32)
    session = load(root / "variants/m-1" / variant, variant.split("-")[0])
    verdict = judge(run_in_chunks(reference, images), run_in_chunks(session, images), labels, 0.5)
    session.close()
    return verdict


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_int8_graph_is_refused_by_the_gate(volume, tmp_path, source, fault):
    build(tmp_path, "j-1", replace(source, model=FAULTS[fault](source.model)), "litert-int8")
    assert not verdict_on(volume, tmp_path, source, "litert-int8").passes


@pytest.mark.parametrize("variant", ["onnx-int8", "litert-int8"])
def test_int8_calibrated_on_noise_is_refused_by_the_gate_and_on_training_images_it_passes(
        volume, tmp_path, source, variant):
    noise = np.random.default_rng(0).integers(0, 256, source.calibration.shape, dtype=np.uint8)
    build(tmp_path / "noise", "j-1", replace(source, calibration=noise), variant)
    build(tmp_path / "sound", "j-1", source, variant)
    assert not verdict_on(volume, tmp_path / "noise", source, variant).passes
    assert verdict_on(volume, tmp_path / "sound", source, variant).passes


def test_a_flipped_byte_is_refused_at_load_and_at_promotion(root):
    file = root / "variants/m-1/onnx-fp32/model.onnx"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0x40
    file.write_bytes(data)
    with pytest.raises(Damaged, match=r"model\.onnx has other bytes"):
        open_session(root, "m-1", "onnx-fp32")
    with pytest.raises(Damaged, match=r"model\.onnx has other bytes"):
        promote(root, "sides", "production", register_version(root, "sides", "m-1"), "onnx-fp32", by="somebody")


def forge(folder: Path) -> None:
    """Make the manifest agree with the files as they are now."""
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"] = {name: {"size": (folder / name).stat().st_size, "sha256": sha256(folder / name)}
                         for name in manifest["files"]}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_other_weights_under_hashes_that_fit_are_refused_by_the_golden_batch(root, source):
    folder = root / "variants/m-1/onnx-fp32"
    other = keras.models.clone_model(source.model)
    scores = np.asarray(other(source.golden_images.astype(np.float32), training=False))
    build(root / "other", "j-1", replace(source, model=other, golden_scores=scores), "onnx-fp32")
    shutil.copy(root / "other/variants/m-1/onnx-fp32/model.onnx", folder / "model.onnx")
    forge(folder)
    with pytest.raises(Damaged, match="onnx-fp32: the golden batch is off"):
        open_session(root, "m-1", "onnx-fp32")


def test_a_truncated_onnx_file_is_refused_by_its_size_and_by_the_runtime(root):
    folder = root / "variants/m-1/onnx-fp32"
    file = folder / "model.onnx"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(Damaged, match=r"model\.onnx has \d+ bytes, expected \d+"):
        open_session(root, "m-1", "onnx-fp32")
    with pytest.raises(Damaged, match="is not an ONNX model that can be loaded"):
        OnnxSession(file)
    forge(folder)
    with pytest.raises(Damaged, match="is not an ONNX model that can be loaded"):
        open_session(root, "m-1", "onnx-fp32")
