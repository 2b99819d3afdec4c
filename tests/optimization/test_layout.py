"""What Keras exports, laid out for a CPU, answers as it did."""

from pathlib import Path

import keras
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from optimization.export import export, to_onnx
from optimization.layout import arrange, scaled_by_convolution
from optimization.reference import KerasReference
from shared.datasets import Spec
from shared.runtimes.onnx import OnnxSession
from training.networks import build
from training.recipes import RECIPES

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")
SPEC = Spec(32, ("a", "b", "c"), (0.49, 0.48, 0.45), (0.25, 0.24, 0.26))


def pixels(count: int) -> np.ndarray:
    return np.random.default_rng(count).integers(0, 256, (count, 32, 32, 3), np.uint8)


def kinds(path: Path) -> list[str]:
    return [node.op_type for node in onnx.load(path).graph.node]


def model_of(which: str, volume: Path) -> keras.Model:
    if which == "test":  # Keras' Normalization layer, which subtracts and divides
        return KerasReference(volume / "models/m-1/model.keras", 32).model
    keras.utils.set_random_seed(0)
    return build(RECIPES[which], SPEC)


@pytest.mark.parametrize("which", ["small", "accurate", "transfer", "test"])
def test_an_arranged_file_answers_to_the_last_bit_as_what_keras_exported(which, volume, tmp_path):
    plain, arranged = tmp_path / "plain.onnx", tmp_path / "arranged.onnx"
    to_onnx(model_of(which, volume), plain)
    arranged.write_bytes(plain.read_bytes())
    arrange(arranged)
    before, after = OnnxSession(plain), OnnxSession(arranged)
    for count in (1, 3, 64):
        assert np.array_equal(before.run(pixels(count)), after.run(pixels(count)))
    assert kinds(arranged)[:2] == ["Cast", "Transpose"]
    assert "Transpose" in kinds(plain)
    assert kinds(plain)[:2] != kinds(arranged)[:2]
    assert ("Shape" in kinds(plain)) == (which in ("small", "test"))  # those that flatten
    assert "Shape" not in kinds(arranged)
    graph = onnx.load(arranged).graph
    assert {c.name for c in graph.initializer} <= {name for node in graph.node for name in node.input}


def made(tmp_path: Path, constants: dict[str, np.ndarray], nodes: list[tuple[str, list[str], str]],
         outputs: list[str]) -> Path:
    """A graph from `x`, float32 [N, 4, 4, 3], through nodes (kind, inputs, output)."""
    made_nodes = [helper.make_node(kind, inputs, [output], **({"perm": [0, 3, 1, 2]} if kind == "Transpose" else {}))
                  for kind, inputs, output in nodes]
    graph = helper.make_graph(
        made_nodes, "made", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4, 4, 3])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None] * 4) for name in outputs],
        [numpy_helper.from_array(value.astype(np.float32), name) for name, value in constants.items()])
    path = tmp_path / "made.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10), path)
    return path


def answers(path: Path) -> list[np.ndarray]:
    x = np.random.default_rng(0).normal(size=(2, 4, 4, 3)).astype(np.float32)
    return ort.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"x": x})


@pytest.mark.parametrize("colours", [np.array([1.5, -2, 3]), np.array([[[[1.5, -2, 3]]]]), np.array(7.0)])
@pytest.mark.parametrize("kind", ["Add", "Sub", "Mul", "Div"])
@pytest.mark.parametrize("inputs", [["x", "c"], ["c", "x"]])
def test_arithmetic_moves_behind_the_transpose_on_whichever_side_its_constant_stands(kind, colours, inputs, tmp_path):
    path = made(tmp_path, {"c": colours, "d": np.array([2.0, 4, 8])},
                [(kind, inputs, "y"), ("Add", ["y", "d"], "z"), ("Transpose", ["z"], "out")], ["out"])
    before = answers(path)
    arrange(path)
    assert kinds(path) == ["Transpose", kind, "Add"]
    assert np.array_equal(before[0], answers(path)[0])


@pytest.mark.parametrize(("kind", "inputs"), [("Add", ["x", "c"]), ("Add", ["c", "x"]), ("Mul", ["x", "c"]),
                                              ("Mul", ["c", "x"]), ("Sub", ["x", "c"]), ("Sub", ["c", "x"]),
                                              ("Div", ["x", "c"]), ("Div", ["c", "x"])])
@pytest.mark.parametrize("colours", [np.array([1.5, -2, 3]), np.array(7.0)])
def test_merged_arithmetic_is_one_node_unless_a_constant_is_divided_by_pixels(kind, inputs, colours, tmp_path):
    path = made(tmp_path, {"c": colours, "d": np.array([2.0, 4, 8])},
                [("Mul", ["x", "d"], "w"), (kind, [i.replace("x", "w") for i in inputs], "y"), ("Sub", ["y", "d"], "z"),
                 ("Transpose", ["z"], "out")], ["out"])
    before = answers(path)
    arrange(path, merge=True)
    divided = (kind, inputs) == ("Div", ["c", "x"])
    assert kinds(path) == (["Transpose", "Mul", "Div", "Sub"] if divided else ["Transpose", "BatchNormalization"])
    np.testing.assert_allclose(answers(path)[0], before[0], rtol=1e-5, atol=1e-5)


def test_one_number_for_all_colours_is_not_merged(tmp_path):
    path = made(tmp_path, {"c": np.array(7.0)}, [("Mul", ["x", "c"], "y"), ("Transpose", ["y"], "out")], ["out"])
    arrange(path, merge=True)
    assert kinds(path) == ["Transpose", "Mul"]


def test_int8_scales_its_pixels_in_one_node_colours_first(volume, tmp_path):
    export(model_of("test", volume), "onnx", "int8", pixels(64), tmp_path / "model.onnx")
    order = [kind for kind in kinds(tmp_path / "model.onnx") if kind != "DequantizeLinear"]
    assert order[:4] == ["Cast", "Transpose", "BatchNormalization", "QuantizeLinear"]


@pytest.mark.parametrize(("constants", "nodes", "outputs"), [
    ({"c": np.ones(3)}, [("Add", ["x", "c"], "y"), ("Transpose", ["y"], "out"), ("Relu", ["y"], "also")],
     ["out", "also"]),  # somebody else reads it as it was
    ({"c": np.ones((4, 4, 3))}, [("Add", ["x", "c"], "y"), ("Transpose", ["y"], "out")], ["out"]),  # a number a pixel
    ({}, [("Add", ["x", "x"], "y"), ("Transpose", ["y"], "out")], ["out"]),  # no constant
], ids=["read twice", "a number a pixel", "no constant"])
def test_what_can_not_move_is_left_as_it_is(constants, nodes, outputs, tmp_path):
    path = made(tmp_path, constants, nodes, outputs)
    before, order = answers(path), kinds(path)
    arrange(path)
    assert kinds(path) == order
    assert all(np.array_equal(a, b) for a, b in zip(before, answers(path), strict=True))


def test_pixels_scaled_by_a_convolution_give_the_same_answers_and_the_model_stays(tmp_path):
    keras.utils.set_random_seed(0)
    image = keras.Input((32, 32, 3))
    x = keras.layers.Rescaling([0.01, 0.02, 0.03], [-1.0, 0.0, 1.0], name="normalise")(image)
    x = keras.layers.GlobalAveragePooling2D()(keras.layers.Conv2D(8, 3, padding="same")(x))
    model = keras.Model(image, keras.layers.Softmax()(keras.layers.Rescaling(2.0, name="scale")(x)))
    scaled, images = scaled_by_convolution(model), pixels(8).astype(np.float32)
    assert np.abs(model(images).numpy() - scaled(images).numpy()).max() < 1e-6
    assert isinstance(scaled.get_layer("normalise"), keras.layers.DepthwiseConv2D)
    assert isinstance(scaled.get_layer("scale"), keras.layers.Rescaling)
    assert isinstance(model.get_layer("normalise"), keras.layers.Rescaling)
