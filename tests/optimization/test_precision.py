"""Precision in the ONNX graph: what TensorRT reads, run here by ONNX Runtime."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from optimization.export import export
from optimization.precision import METHODS, WEIGHTED
from optimization.reference import KerasReference
from shared.datasets import Dataset
from shared.runtimes import FILES, TOLERANCE, load, run_in_chunks

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")
PRECISIONS = ("fp32", "fp16", "int8")


@pytest.fixture(scope="module")
def exported(volume, tmp_path_factory) -> tuple[Path, dict]:
    """A folder per precision with its ONNX file, and what the export told."""
    root = tmp_path_factory.mktemp("exported")
    dataset = Dataset(volume, "d-1")
    model = KerasReference(volume / "models/m-1/model.keras", 32).model
    notes = {}
    for precision in PRECISIONS:
        (root / precision).mkdir()
        notes[precision] = export(model, "tensorrt", precision, dataset.images("train")[:96],
                                  root / precision / FILES["tensorrt"], dataset.images("validation")[:200])
    return root, notes


def graph_of(root: Path, precision: str) -> onnx.GraphProto:
    return onnx.load(root / precision / FILES["tensorrt"]).graph


@pytest.mark.parametrize("precision", PRECISIONS)
def test_each_precision_answers_as_keras_does(exported, volume, precision):
    root, _ = exported
    session = load(root / precision, "onnx")
    with np.load(volume / "models/m-1/golden.npz") as golden:
        got = run_in_chunks(session, golden["images"])
        assert np.abs(got - golden["probabilities"]).max() <= TOLERANCE[precision]
    session.close()


def test_fp16_has_half_weights_and_float_normalisation_and_softmax_with_one_cast_between_each(exported):
    graph = onnx.shape_inference.infer_shapes(onnx.load(exported[0] / "fp16" / FILES["tensorrt"])).graph
    types = {v.name: v.type.tensor_type.elem_type for v in (*graph.input, *graph.output, *graph.value_info)}
    weights = {w.name: w.data_type for w in graph.initializer}
    seen_weighted = False
    for node in graph.node:
        if node.op_type in WEIGHTED:
            seen_weighted = True
            assert weights[node.input[1]] == onnx.TensorProto.FLOAT16
        if node.op_type in ("Mul", "Sub", "Add", "Div") and not seen_weighted:
            assert types[node.output[0]] == onnx.TensorProto.FLOAT
        if node.op_type == "Softmax":
            assert types[node.input[0]] == onnx.TensorProto.FLOAT
    casts = [onnx.helper.get_attribute_value(n.attribute[0]) for n in graph.node if n.op_type == "Cast"]
    assert casts.count(onnx.TensorProto.FLOAT16) == 1
    assert casts.count(onnx.TensorProto.FLOAT) == 2  # of the pixels, and before the softmax
    before, after = ((exported[0] / p / FILES["tensorrt"]).stat().st_size for p in ("fp32", "fp16"))
    assert after < 0.7 * before


def test_int8_is_symmetric_per_channel_and_says_how_it_was_chosen(exported):
    root, notes = exported
    graph = graph_of(root, "int8")
    values = {w.name: numpy_helper.to_array(w) for w in graph.initializer}
    pairs = [n for n in graph.node if n.op_type == "QuantizeLinear"]
    assert pairs
    assert all(not values[n.input[2]].any() and values[n.input[2]].dtype == np.int8 for n in pairs)
    assert any(values[n.input[1]].size > 1 for n in pairs)
    told = notes["int8"]["quantization"]
    assert told["method"] in METHODS
    assert 0.95 <= told["agreement"] <= 1
    assert len(told["left"]) in (0, 2)


def test_layers_left_out_of_int8_are_in_fp16(exported):
    root, notes = exported
    graph = graph_of(root, "int8")
    weights = {w.name: w.data_type for w in graph.initializer}
    left = [n for n in graph.node if n.name in notes["int8"]["quantization"]["left"]]
    assert all(weights[n.input[1]] == onnx.TensorProto.FLOAT16 for n in left)
