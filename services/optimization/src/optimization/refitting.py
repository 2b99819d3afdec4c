"""The engine of a network that was trained again: an earlier one's kernels with the new weights, and nothing is chosen.

Asked for by TENSORRT_REFIT, since an engine that can be refitted may fold none of its weights: on an H100 it answers
about 15 % fewer images a second. Two trainings of a network are the same ONNX graph but for the weights' values. A plan
is noted under its graph; the next file of that graph takes it, if TensorRT can put every weight in its place, and is
checked as a new engine is.
"""

import hashlib
import logging
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from shared.artifacts import read_json, write_json
from shared.errors import LannerError
from shared.runtimes.plan import Host, read, slug

log = logging.getLogger("lanner.optimization")
WEIGHTS = (TensorProto.FLOAT, TensorProto.FLOAT16)
PRECISIONS = ("fp32", "fp16")  # the scales of an int8 network can't be refitted


def graph_of(model: bytes) -> str:
    """SHA-256 of an ONNX file without the values of its weights; their names and shapes are in it."""
    proto = onnx.load_model_from_string(model)
    for weight in proto.graph.initializer:
        if weight.data_type in WEIGHTS:
            for name in ("raw_data", "float_data", "int32_data"):
                weight.ClearField(name)
    return hashlib.sha256(proto.SerializeToString(deterministic=True)).hexdigest()


def note(engines: Path, graph: str, plan: Path, host: Host) -> None:
    """The next file of this graph may take this plan."""
    write_json(_note(engines, graph, host), {"plan": plan.name})


def refitted(engines: Path, graph: str, model: bytes, host: Host, batches: tuple[int, int, int]) -> bytes | None:
    """The plan of an earlier file of this graph with the weights of this one; None where there is none that can be."""
    try:
        header, plan = read(engines / read_json(_note(engines, graph, host))["plan"], host)
    except (LannerError, KeyError, TypeError):
        return None
    if header.batches != batches:
        return None
    try:
        return _with_weights(plan, model)
    except Exception:  # TensorRT raises what it likes; what can't be refitted is built
        log.warning("an earlier engine of this graph can't be refitted", exc_info=True)
        return None


def _with_weights(plan: bytes, model: bytes) -> bytes | None:
    import tensorrt as trt

    from shared.runtimes.tensorrt import LOGGER

    engine = trt.Runtime(LOGGER).deserialize_cuda_engine(plan)
    if engine is None or not engine.refittable:
        return None
    arrays = {w.name: np.ascontiguousarray(numpy_helper.to_array(w))
              for w in onnx.load_model_from_string(model).graph.initializer}
    refitter = trt.Refitter(engine, LOGGER)
    names = refitter.get_all_weights()  # the parser's, which are those of the file
    if not names or not all(n in arrays and refitter.set_named_weights(n, trt.Weights(arrays[n])) for n in names):
        log.warning("an earlier engine of this graph can't be refitted: it has the weights %s, the ONNX file %s",
                    names[:3], list(arrays)[:3])
        return None
    if missing := refitter.get_missing_weights():
        log.warning("an earlier engine of this graph can't be refitted: it lacks %s", missing[:3])
        return None
    return bytes(engine.serialize()) if refitter.refit_cuda_engine() else None


def _note(engines: Path, graph: str, host: Host) -> Path:
    return engines / "graphs" / f"{graph[:24]}.{slug(host)}.json"
