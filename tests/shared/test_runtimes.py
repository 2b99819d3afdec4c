"""Sessions answer alike at every batch size, refuse what is no batch, and load no file that is damaged."""

import os
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import onnx
import pytest
import tensorflow as tf

from optimization.export import export
from shared.artifacts import publish, stage
from shared.errors import Damaged
from shared.runtimes import FILES, compare_golden, load, open_session

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")
FORMATS = [("onnx", "fp32"), ("onnx", "int8"), ("litert", "fp32"), ("litert", "fp16"), ("litert", "int8")]


def pixels(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)


def network() -> keras.Model:
    keras.utils.set_random_seed(1)
    image = keras.Input((32, 32, 3))
    x = keras.layers.Rescaling(1 / 64, -2.0)(image)
    x = keras.layers.Conv2D(8, 3, strides=4, activation="relu")(x)
    return keras.Model(image, keras.layers.Dense(5, activation="softmax")(keras.layers.Flatten()(x)))


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """A folder `<format>-<precision>` with a model file for each."""
    root = tmp_path_factory.mktemp("files")
    model = network()
    for format, precision in FORMATS:
        folder = root / f"{format}-{precision}"
        folder.mkdir()
        export(model, format, precision, pixels(64), folder / FILES[format])
    return root


@pytest.fixture(params=FORMATS, ids=lambda pair: "-".join(pair))
def session(request, files):
    format, precision = request.param
    opened = load(files / f"{format}-{precision}", format)
    yield opened
    opened.close()


def test_batches_of_1_3_and_64_answer_as_single_images_do(session):
    images = pixels(64, seed=1)
    singles = np.concatenate([session.run(image[None]) for image in images])
    assert singles.shape == (64, 5)
    assert singles.dtype == np.float32
    assert np.allclose(singles.sum(1), 1, atol=0.02)
    assert len(np.unique(singles, axis=0)) > 32
    for count in (1, 3, 64, 3, 1):
        assert np.abs(session.run(images[:count]) - singles[:count]).max() < 1e-5


def test_a_strided_batch_is_read_as_it_looks(session):
    images = pixels(6, seed=1)
    assert np.abs(session.run(images[::2, :, ::-1]) - session.run(images[::2, :, ::-1].copy())).max() == 0


@pytest.mark.parametrize("wrong", [
    pixels(2).astype(np.float32), pixels(2).astype(np.int8), pixels(2)[:, :16], pixels(2)[..., :1], pixels(1)[0],
    pixels(0), pixels(2).transpose(0, 3, 1, 2),
], ids=["float32", "int8", "half", "grey", "no batch", "empty", "channels first"])
def test_another_dtype_or_shape_is_refused_and_the_session_goes_on(session, wrong):
    with pytest.raises(ValueError, match=r"expected uint8 \[N, 32, 32, 3\] with N >= 1"):
        session.run(wrong)
    assert session.run(pixels(2)).shape == (2, 5)


def test_a_session_may_be_closed_twice(session):
    session.close()
    session.close()


@pytest.mark.parametrize("format", ["onnx", "litert"])
def test_a_file_cut_anywhere_is_damaged(files, tmp_path, format):
    whole = (files / f"{format}-fp32" / FILES[format]).read_bytes()
    for kept in (0, 1, 8, 100, len(whole) // 2, len(whole) - 1000, len(whole) - 1):
        (tmp_path / FILES[format]).write_bytes(whole[:kept])
        with pytest.raises(Damaged, match="model that can be loaded"):
            load(tmp_path, format)


def test_an_unknown_format_is_damaged(tmp_path):
    with pytest.raises(Damaged, match="'pickle' is unknown"):
        load(tmp_path, "pickle")


@pytest.mark.parametrize("format", ["onnx", "litert"])
@pytest.mark.filterwarnings("ignore:In the future `np.object`:FutureWarning")
def test_a_model_of_float_pixels_is_no_variant(tmp_path, format):
    model = network()
    model(np.zeros((1, 32, 32, 3), np.float32))
    model.export(tmp_path / FILES[format], format=format, verbose=False)
    with pytest.raises(Damaged, match=r"float32.*expected one uint8 \[N, size, size, 3\]"):
        load(tmp_path, format)


def test_an_onnx_model_of_one_batch_size_alone_is_no_variant(files, tmp_path):
    proto = onnx.load(files / "onnx-fp32/model.onnx")
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 8
    onnx.save(proto, tmp_path / "model.onnx")
    with pytest.raises(Damaged, match="expected one uint8"):
        load(tmp_path, "onnx")


def test_weights_in_another_file_are_not_read(files, tmp_path, monkeypatch):
    proto = onnx.load(files / "onnx-fp32/model.onnx")
    onnx.save(proto, tmp_path / "model.onnx", save_as_external_data=True, location="weights.bin", size_threshold=100)
    assert (tmp_path / "weights.bin").stat().st_size > 0
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Damaged, match="External data"):
        load(tmp_path, "onnx")


def test_full_integer_pixels_of_another_scale_are_damaged(tmp_path):
    model = network()
    dark = (pixels(32) // 2).astype(np.float32)
    model.export(tmp_path / "model.tflite", format="litert", verbose=False, optimizations=[tf.lite.Optimize.DEFAULT],
                 representative_dataset=lambda: ([image[None]] for image in dark),
                 target_spec={"supported_ops": [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]}, inference_input_type=tf.uint8)
    with pytest.raises(Damaged, match="scale 0.49.*expected 1 and 0"):
        load(tmp_path, "litert")


@pytest.fixture
def published(files, tmp_path):
    """A volume with variants/m-1/onnx-fp32, whose golden scores are off by what the test asks for."""
    def publish_with(off: float) -> Path:
        staging = stage(tmp_path, "test")
        (staging / "model.onnx").write_bytes((files / "onnx-fp32/model.onnx").read_bytes())
        session = load(staging, "onnx")
        scores = session.run(pixels(40))
        np.savez(staging / "golden.npz", images=pixels(40), probabilities=scores + np.float32(off))
        publish(tmp_path, staging, "variants/m-1/onnx-fp32", {"format": "onnx", "precision": "fp32", "summary": {}})
        return tmp_path
    return publish_with


def test_a_published_variant_opens_when_it_answers_its_golden_batch(published):
    session, manifest = open_session(published(5e-4), "m-1", "onnx-fp32")
    assert manifest["id"] == "m-1/onnx-fp32"
    assert session.run(pixels(2)).shape == (2, 5)


def test_a_published_variant_that_answers_otherwise_does_not_open(published):
    root = published(2e-3)
    with pytest.raises(Damaged, match="off by 0.002.*rebuild this variant"):
        open_session(root, "m-1", "onnx-fp32")


def test_a_golden_batch_is_compared_by_the_precision_given():
    expected = np.tile(np.float32([0.6, 0.4]), (200, 1))
    compare_golden(expected, expected + np.float32(0.9e-2), "fp16", "x")
    with pytest.raises(Damaged):
        compare_golden(expected, expected + np.float32(0.9e-2), "fp32", "x")


def test_int8_needs_99_percent_of_the_labels_equal():
    expected = np.tile(np.float32([0.51, 0.49]), (200, 1))
    turned = expected.copy()
    turned[:2] = [0.49, 0.51]
    compare_golden(expected, turned, "int8", "x")
    turned[:3] = [0.49, 0.51]
    with pytest.raises(Damaged, match="98.5 % of the labels equal"):
        compare_golden(expected, turned, "int8", "x")


@pytest.mark.parametrize("got", [np.full((4, 2), np.nan, np.float32), np.zeros((3, 2), np.float32)])
def test_answers_that_are_no_probabilities_of_these_images_are_damaged(got):
    with pytest.raises(Damaged, match="expected \\(4, 2\\) finite"):
        compare_golden(np.zeros((4, 2), np.float32), got, "fp32", "x")
