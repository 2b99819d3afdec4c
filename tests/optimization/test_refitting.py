"""Which ONNX files are two trainings of one network; what is done with that needs a GPU: test_tensorrt.py."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from optimization.refitting import graph_of, note, refitted
from shared.runtimes.plan import Host

HOST = Host("8.6.0", "NVIDIA H100", "9.0")


def model(seed: int, width: int = 4, dtype: type = np.float32, axis: int = 1) -> bytes:
    weights = np.random.default_rng(seed).normal(size=(3, width)).astype(dtype)
    shape = numpy_helper.from_array(np.array([axis, -1], np.int64), "shape")
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"]), helper.make_node("Reshape", ["y", "shape"], ["z"])]
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3])],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(weights, "w"), shape])
    return helper.make_model(graph).SerializeToString()


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_two_trainings_are_one_graph(dtype: type) -> None:
    first, second = model(0, dtype=dtype), model(1, dtype=dtype)
    assert first != second
    assert graph_of(first) == graph_of(second)
    assert onnx.load_model_from_string(first).graph.initializer[0].raw_data  # it is told of a copy


@pytest.mark.parametrize("other", [model(0, width=5), model(0, dtype=np.float16), model(0, axis=2)])
def test_another_network_is_another_graph(other: bytes) -> None:
    assert graph_of(model(0)) != graph_of(other)


def test_without_an_earlier_plan_there_is_nothing_to_refit(tmp_path: Path) -> None:
    graph = graph_of(model(0))
    assert refitted(tmp_path, graph, model(0), HOST, (1, 64, 1024)) is None
    note(tmp_path, graph, tmp_path / "gone.plan", HOST)
    assert refitted(tmp_path, graph, model(0), HOST, (1, 64, 1024)) is None
    (tmp_path / "gone.plan").write_bytes(b"damaged")
    assert refitted(tmp_path, graph, model(0), HOST, (1, 64, 1024)) is None
