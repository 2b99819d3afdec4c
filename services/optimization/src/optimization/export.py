"""A Keras model -> the file of a Variant. Each takes uint8 NHWC of any batch size and returns float32 probabilities."""

import logging
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import keras
import numpy as np
import onnx
import tensorflow as tf
from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

from optimization.layout import arrange, scaled_by_convolution
from optimization.precision import Reader, to_fp16, to_int8
from shared.runtimes import run_in_chunks
from shared.runtimes.onnx import OnnxSession

OPSET = 17  # tf2onnx writes up to 18
# Those that gain: 1.3 to 1.4 times float32's images/s on the recipe `small` on one core without VNNI, measured before
# layout.py; 1.1 with Add, which takes the normalisation along. Sigmoids and their products are no faster in int8.
INT8_OPERATORS = ["Conv", "Gemm", "MatMul", "Relu", "MaxPool"]
CALIBRATION_IMAGES = 256


def export(model: keras.Model, format: str, precision: str, calibration: np.ndarray, path: Path,
           validation: np.ndarray | None = None) -> dict[str, Any]:
    """Write `model` to `path` and return what the manifest should tell of how. Raises whatever a converter raises.

    model: float32 pixels 0..255 [N, size, size, 3] -> probabilities; calibration: uint8 [M, size, size, 3] training
    images, read for int8 alone; validation: uint8 [V, size, size, 3], by which tensorrt-int8 chooses among its
    calibrations, the calibration images where there are none. A `tensorrt` file is the ONNX its engines are built from.
    """
    notes: dict[str, Any] = {}
    match format, precision:
        case "onnx", "fp32":
            to_onnx(model, path)
            arrange(path)
        case "onnx", "int8":
            with tempfile.TemporaryDirectory() as folder:
                exact = Path(folder) / "fp32.onnx"
                to_onnx(model, exact)
                arrange(exact, merge=True)
                quantize_onnx(exact, calibration, path)
        case "litert", ("fp32" | "fp16"):
            to_litert(model, precision, calibration, path)
        case "litert", "int8":
            to_litert(scaled_by_convolution(model), precision, calibration, path)
        case "tensorrt", "fp32":
            to_onnx(model, path)
        case "tensorrt", "fp16":
            to_onnx(model, path)
            to_fp16(path, path)
        case "tensorrt", "int8":
            images = calibration if validation is None else validation
            to_onnx(model, path)
            with closing(OnnxSession(path)) as exact:
                scores = run_in_chunks(exact, images, 64)
            notes["quantization"] = asdict(to_int8(path, calibration, images, scores, path))
        case _:
            raise ValueError(f"no exporter for {format}-{precision}")
    return notes


def with_pixels_in(model: keras.Model) -> keras.Model:
    """The model behind a uint8 input named `images`; the cast is inside the graph.

    tf2onnx turns a tensor that a layer holds into a further graph input: NumPy values become constants.
    """
    for layer in _layers(model):
        if isinstance(layer, keras.layers.Normalization):
            layer.mean, layer.variance = np.asarray(layer.mean), np.asarray(layer.variance)
    images = keras.Input(model.input_shape[1:], dtype="uint8", name="images")
    wrapped = keras.Model(images, model(keras.ops.cast(images, "float32"), training=False))
    wrapped(np.zeros((1, *model.input_shape[1:]), np.uint8))  # Keras exports models that were called
    return wrapped


def _layers(model: keras.Model) -> Iterator[keras.Layer]:
    for layer in model.layers:
        yield layer
        if isinstance(layer, keras.Model):
            yield from _layers(layer)


def to_onnx(model: keras.Model, path: Path) -> None:
    """ONNX with one input `images`, one output `probabilities` and a dynamic batch, all weights inside the file."""
    logging.getLogger("tf2onnx").setLevel(logging.WARNING)
    with warnings.catch_warnings():
        # Keras asks NumPy for `np.object`, which tf2onnx 1.17 needs, to see whether it must add it.
        warnings.filterwarnings("ignore", message="In the future `np.object`", category=FutureWarning)
        with_pixels_in(model).export(path, format="onnx", verbose=False, opset_version=OPSET)
    proto = onnx.load(path, load_external_data=False)
    graph = proto.graph
    if [i.name for i in graph.input] != ["images"] or len(graph.output) != 1:
        raise ValueError(f"the ONNX graph takes {[i.name for i in graph.input]}, expected images alone: "
                         "a layer holds a tensor that is no weight")
    old = graph.output[0].name
    for node in graph.node:
        node.output[:] = ["probabilities" if name == old else name for name in node.output]
        node.input[:] = ["probabilities" if name == old else name for name in node.input]
    graph.output[0].name = "probabilities"
    for value in (graph.input[0], graph.output[0]):
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
    onnx.checker.check_model(proto)
    onnx.save(proto, path)


def quantize_onnx(exact: Path, calibration: np.ndarray, path: Path) -> None:
    """Static int8 as Q/DQ: uint8 activations, int8 weights per channel, ranges from the calibration images' extremes.

    Weights use 7 bits: without VNNI, x86 adds two 8-bit products in 16 bits, which saturates (on such a CPU a
    network gave 79 % of Keras's labels with 8 bits and 95 % with 7).
    """
    with tempfile.TemporaryDirectory() as folder:
        prepared = Path(folder) / "prepared.onnx"
        quant_pre_process(exact, prepared, skip_symbolic_shape=True)
        quantize_static(
            prepared, path, Reader(calibration), quant_format=QuantFormat.QDQ, per_channel=True, reduce_range=True,
            activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8, op_types_to_quantize=INT8_OPERATORS)


def to_litert(model: keras.Model, precision: str, calibration: np.ndarray, path: Path) -> None:
    """TFLite from built-in operators alone. int8 is full integer: its input is the pixel, scale 1 and zero point 0."""
    options: dict[str, object] = {"target_spec": {"supported_ops": [tf.lite.OpsSet.TFLITE_BUILTINS]}}
    match precision:
        case "fp32":
            model = with_pixels_in(model)
        case "fp16":
            model = with_pixels_in(model)
            options = {"optimizations": [tf.lite.Optimize.DEFAULT],
                       "target_spec": {"supported_ops": [tf.lite.OpsSet.TFLITE_BUILTINS],
                                       "supported_types": [tf.float16]}}
        case "int8":
            calibration = calibration.astype(np.float32)
            calibration[0, 0, :2] = [[0.0], [255.0]]  # two pixels, so that the input's range is 0..255 in any sample
            options = {"optimizations": [tf.lite.Optimize.DEFAULT],
                       "representative_dataset": lambda: ([image[None]] for image in calibration),
                       "target_spec": {"supported_ops": [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]},
                       "inference_input_type": tf.uint8}
    model.export(path, format="litert", verbose=False, **options)


def stratified(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Indices of up to `count` images, as evenly over the classes as they go round; the same for the same seed."""
    rng = np.random.default_rng(seed)
    shuffled = rng.permutation(len(labels))
    order = shuffled[np.argsort(labels[shuffled], kind="stable")]
    _, starts, sizes = np.unique(labels[order], return_index=True, return_counts=True)
    rank = np.arange(len(order)) - np.repeat(starts, sizes)
    return np.sort(order[np.argsort(rank, kind="stable")][:count])
