"""ONNX Runtime computes where DEVICE says, and says where: never on the CPU in a GPU's stead."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from shared import gpu
from shared.errors import Damaged, Refused
from shared.runtimes.onnx import OnnxSession

READY = "CUDAExecutionProvider" in onnxruntime.get_available_providers() and gpu.find()
IMAGES = np.random.default_rng(0).integers(0, 256, (33, 32, 32, 3), dtype=np.uint8)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A classifier of 32x32 images in five classes: a convolution, a mean, a softmax."""
    weights = np.random.default_rng(1).normal(0, 0.05, (5, 3, 3, 3)).astype(np.float32)
    nodes = [helper.make_node("Cast", ["images"], ["float"], to=TensorProto.FLOAT),
             helper.make_node("Transpose", ["float"], ["nchw"], perm=[0, 3, 1, 2]),
             helper.make_node("Conv", ["nchw", "weights"], ["maps"]),
             helper.make_node("ReduceMean", ["maps"], ["logits"], axes=[2, 3], keepdims=0),
             helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1)]
    graph = helper.make_graph(
        nodes, "classifier", [helper.make_tensor_value_info("images", TensorProto.UINT8, ["batch", 32, 32, 3])],
        [helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["batch", 5])],
        [onnx.numpy_helper.from_array(weights, "weights")])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / "m.onnx")
    return tmp_path / "m.onnx"


def test_the_cpu_is_what_is_used_unless_asked_otherwise(model):
    assert OnnxSession(model).device == OnnxSession(model, 1, "cpu").device == "cpu"


@pytest.mark.skipif(bool(READY), reason="this host computes on a GPU")
def test_without_a_gpu_device_gpu_is_refused_with_the_remedy(model):
    with pytest.raises(Refused, match="install the package's extra gpu.*or set DEVICE=cpu") as refused:
        OnnxSession(model, 1, "gpu")
    assert refused.value.code == "gpu_missing"


@pytest.mark.gpu
@pytest.mark.skipif(not READY, reason="needs a GPU and onnxruntime-gpu")
def test_the_gpu_answers_as_the_cpu_does_and_is_named(model):
    on_gpu, on_cpu = OnnxSession(model, 1, "gpu"), OnnxSession(model)
    assert on_gpu.device == gpu.find()[0].name
    for count in (1, 8, 33):
        assert np.abs(on_gpu.run(IMAGES[:count]) - on_cpu.run(IMAGES[:count])).max() < 1e-5


@pytest.mark.gpu
@pytest.mark.skipif(not READY, reason="needs a GPU and onnxruntime-gpu")
def test_a_damaged_file_is_damaged_on_the_gpu_too(tmp_path):
    (tmp_path / "m.onnx").write_bytes(b"no model")
    with pytest.raises(Damaged):
        OnnxSession(tmp_path / "m.onnx", 1, "gpu")
