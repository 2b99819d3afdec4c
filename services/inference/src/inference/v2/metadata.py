"""What clients ask about a model before they use it: its metadata and its configuration, as Triton writes them."""

import json

from inference.codec import MAX_IMAGES
from inference.loaded import Found
from inference.v2.messages import INPUT, OUTPUT, Object

BACKENDS = {"onnx": ("onnxruntime_onnx", "onnxruntime"), "litert": ("litert_flatbuffer", "litert"),
            "tensorrt": ("tensorrt_plan", "tensorrt")}  # format of a Variant -> (platform, backend)


def metadata(model: str, found: Found, versions: list[int]) -> Object:
    size, classes = found.spec.size, len(found.spec.labels)
    return {"name": model, "versions": [str(v) for v in sorted(versions)], "platform": _backend(found)[0],
            "inputs": [{"name": INPUT, "datatype": "UINT8", "shape": [-1, size, size, 3]}],
            "outputs": [{"name": OUTPUT, "datatype": "FP32", "shape": [-1, classes]}]}


def config(model: str, found: Found) -> Object:
    """`max_batch_size` is what one request may have; the largest batch that runs at once is `preferred_batch_size`."""
    platform, backend = _backend(found)
    size, labels = found.spec.size, found.spec.labels
    told: Object = {
        "name": model, "platform": platform, "backend": backend, "max_batch_size": MAX_IMAGES,
        "version_policy": {"all": {}},
        "input": [{"name": INPUT, "data_type": "TYPE_UINT8", "format": "FORMAT_NHWC", "dims": [size, size, 3]}],
        "output": [{"name": OUTPUT, "data_type": "TYPE_FP32", "dims": [len(labels)]}],
        "dynamic_batching": {"preferred_batch_size": [min(found.batch, MAX_IMAGES)], "max_queue_delay_microseconds": 0},
        "parameters": {"variant": {"string_value": found.variant}, "labels": {"string_value": json.dumps(labels)}}}
    match found.device:
        case "":  # not in memory, so nothing computes it
            pass
        case "cpu":
            told["instance_group"] = [{"name": f"{model}_0", "kind": "KIND_CPU", "count": 1}]
        case _:
            told["instance_group"] = [{"name": f"{model}_0", "kind": "KIND_GPU", "count": 1, "gpus": [0]}]
    return told


def _backend(found: Found) -> tuple[str, str]:
    return BACKENDS[found.variant.split("-")[0]]
