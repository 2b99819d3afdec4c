"""Precision written into an ONNX graph, as TensorRT reads it: fp16 weights, or Q/DQ pairs around int8.

TensorRT 10 and 11 take the types from the graph; 8.6 takes the Q/DQ pairs and is allowed fp16 everywhere else.
"""

import contextlib
import io
import logging
import tempfile
from collections.abc import Iterator, Set
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantType
from onnxruntime.quantization.calibrate import TensorsData, create_calibrator
from onnxruntime.quantization.qdq_quantizer import QDQQuantizer
from onnxruntime.quantization.quant_utils import load_model_with_shape_infer
from onnxruntime.quantization.shape_inference import quant_pre_process

from shared.runtimes import run_in_chunks
from shared.runtimes.onnx import OnnxSession

WEIGHTED = ("Conv", "Gemm", "MatMul")
FLOAT32_ONLY = ("Softmax", "Resize", "Upsample", "Range", "CumSum", "TopK")  # for their range, or by their definition
FLOAT, FLOAT16 = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16
MOST_HALF = float(np.finfo(np.float16).max)
CHUNK = 32  # images whose activations a histogram holds at once
METHODS = {"entropy": (CalibrationMethod.Entropy, {"symmetric": True}),
           "percentile": (CalibrationMethod.Percentile, {"symmetric": True, "percentile": 99.99})}
# Symmetric with all zero points 0, and no quantized bias: what TensorRT takes.
TENSORRT_QDQ = {"ActivationSymmetric": True, "WeightSymmetric": True, "QuantizeBias": False,
                "DedicatedQDQPair": True, "AddQDQPairToWeight": True}


class Reader(CalibrationDataReader):
    """Feeds calibration images to ONNX Runtime, 32 at a time."""

    def __init__(self, images: np.ndarray):
        self._batches = iter([images[i:i + CHUNK] for i in range(0, len(images), CHUNK)])

    def get_next(self) -> dict[str, np.ndarray] | None:
        batch = next(self._batches, None)
        return None if batch is None else {"images": batch}


@dataclass(frozen=True)
class Quantized:
    """How an int8 graph was made: the method of its ranges, the layers left alone, and how near it came to Keras.

    agreement: share of equal argmaxes, 0..1; difference: mean difference of a probability.
    """

    method: str
    left: tuple[str, ...]
    agreement: float
    difference: float


def to_fp16(exact: Path, path: Path) -> None:
    """Weights and activations in fp16 from the first weighted layer on.

    What stands before it is the normalisation of pixels 0..255, and the softmax at the end needs the range: both stay
    in float32.
    """
    model = onnx.load(exact)
    behind: set[str] = set()  # tensors that a weighted layer precedes
    names = set()
    for node in named(model).graph.node:
        if node.op_type in WEIGHTED or any(name in behind for name in node.input):
            behind.update(node.output)
            if node.op_type not in FLOAT32_ONLY:
                names.add(node.name)
    onnx.save(halve(model, names), path)


def named(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model, each node with a name."""
    for number, node in enumerate(model.graph.node):
        node.name = node.name or f"{node.op_type}_{number}"
    return model


def halve(model: onnx.ModelProto, names: Set[str]) -> onnx.ModelProto:
    """The nodes of these names in fp16, a Cast wherever a float tensor crosses between them and the others.

    Raises onnx.checker.ValidationError when the result is no valid graph.
    """
    graph = onnx.shape_inference.infer_shapes(model).graph
    types = {v.name: v.type.tensor_type.elem_type for v in (*graph.input, *graph.output, *graph.value_info)}
    weights = {w.name: w for w in graph.initializer}
    types |= {name: w.data_type for name, w in weights.items()}
    half = {name for node in graph.node if node.name in names for name in node.output if types.get(name) == FLOAT}
    made: dict[tuple[str, int], str] = {}  # (tensor, type) -> its name in that type
    nodes: list[onnx.NodeProto] = []

    def in_type(name: str, wanted: int) -> str:
        if types.get(name) != FLOAT or (FLOAT16 if name in half else FLOAT) == wanted:
            return name
        if (name, wanted) not in made:
            made[name, wanted] = new = f"{name}/{'half' if wanted == FLOAT16 else 'float'}"
            if name in weights:
                values = np.clip(numpy_helper.to_array(weights[name]), -MOST_HALF, MOST_HALF)
                graph.initializer.append(numpy_helper.from_array(values.astype(np.float16), new))
            else:
                nodes.append(helper.make_node("Cast", [name], [new], name=f"{new}/cast", to=wanted))
        return made[name, wanted]

    for node in graph.node:
        wanted = FLOAT16 if node.name in names else FLOAT
        node.input[:] = [in_type(name, wanted) for name in node.input]
        if node.op_type == "Cast" and wanted == FLOAT16:
            for attribute in node.attribute:
                attribute.i = FLOAT16 if attribute.i == FLOAT else attribute.i
        nodes.append(node)
    for output in graph.output:
        if output.name in half:
            raise ValueError(f"the graph's output {output.name} would be fp16, expected float32: it ends in no softmax")
    used = {name for node in nodes for name in node.input}
    kept = [w for w in graph.initializer if w.name in used]
    result = helper.make_graph(nodes, graph.name, graph.input, graph.output, kept)
    whole = helper.make_model(result, opset_imports=model.opset_import, ir_version=model.ir_version)
    onnx.checker.check_model(whole, full_check=True)
    return whole


def to_int8(exact: Path, calibration: np.ndarray, images: np.ndarray, scores: np.ndarray, path: Path) -> Quantized:
    """Q/DQ around the weighted layers, the nearest to Keras of four: entropy or percentile, all layers or all but the
    first and the last, which are then in fp16.

    calibration: uint8 [M, size, size, 3] training images, which give the ranges; images, scores: uint8 [N, size, size,
    3] and Keras's float32 [N, classes], which decide. Quantizing everything wins a tie: it is the faster.
    """
    with tempfile.TemporaryDirectory() as temp:
        folder = Path(temp)
        prepared = folder / "prepared.onnx"
        quant_pre_process(exact, prepared, skip_symbolic_shape=True)
        made = []
        for method in METHODS:
            ranges = ranges_of(prepared, calibration, method, folder)
            for left in ((), _ends(onnx.load(prepared))):
                candidate = folder / f"{method}-{len(left)}.onnx"
                write_qdq(prepared, ranges, left, candidate)
                onnx.save(halve(named(onnx.load(candidate)), set(left)), candidate)
                session = OnnxSession(candidate)
                got = run_in_chunks(session, images, 64)
                session.close()
                agreement = float((got.argmax(1) == scores.argmax(1)).mean())
                made.append((Quantized(method, left, agreement, float(np.abs(got - scores).mean())), candidate))
        best, file = max(made, key=lambda pair: (pair[0].agreement, -len(pair[0].left), -pair[0].difference))
        path.write_bytes(file.read_bytes())
    return best


def _ends(model: onnx.ModelProto) -> tuple[str, ...]:
    """Names of the first and the last weighted layer."""
    names = [node.name for node in model.graph.node if node.op_type in WEIGHTED]
    return (names[0], names[-1]) if len(names) > 1 else ()


def ranges_of(prepared: Path, calibration: np.ndarray, method: str, folder: Path) -> TensorsData:
    """Ranges of every activation that is quantized, from histograms; CHUNK images' activations in memory at a time."""
    kind, options = METHODS[method]
    with quiet():
        calibrator = create_calibrator(prepared, WEIGHTED, augmented_model_path=str(folder / "augmented.onnx"),
                                       calibrate_method=kind, extra_options=options)
        for i in range(0, len(calibration), CHUNK):
            calibrator.collect_data(Reader(calibration[i:i + CHUNK]))
        return calibrator.compute_data()


def write_qdq(prepared: Path, ranges: TensorsData, left: tuple[str, ...], path: Path) -> None:
    """The graph with int8 Q/DQ pairs, weights per channel, the layers named in `left` as they were."""
    with quiet():
        quantizer = QDQQuantizer(
            load_model_with_shape_infer(prepared), per_channel=True, reduce_range=False, weight_qType=QuantType.QInt8,
            activation_qType=QuantType.QInt8, tensors_range=ranges, nodes_to_quantize=[], nodes_to_exclude=list(left),
            op_types_to_quantize=list(WEIGHTED), extra_options=TENSORRT_QDQ)
        quantizer.quantize_model()
        quantizer.model.save_model_to_file(str(path), False)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """ONNX Runtime's calibrators print what they do, and warn of each tensor without a range."""
    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
