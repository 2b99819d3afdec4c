"""An infer request as it came: the JSON part, then the bytes of the inputs that say so."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import orjson

from inference.codec import MAX_IMAGES
from inference.v2.tensors import DATATYPES, from_binary, from_json
from shared.errors import Refused

INPUT, OUTPUT = "images", "probabilities"  # as in every Variant's file
SOURCES = ("data", "binary_data_size", "shared_memory_region")
MOST_DIMENSIONS = 8
SMALL = 4096  # bytes of JSON before tensors in binary; longer ones have tensors in them, and are not sent twice
Object = dict[str, Any]
ReadRegion = Callable[[str, int, int], bytes]  # (region, offset, bytes) -> its bytes


@dataclass(frozen=True)
class Tensor:
    """An input, BYTES as objects.

    json: it came as JSON, where BYTES are base64: text can't hold an image's bytes otherwise. raw: it is a whole body
    of uint8, whose shape the model knows.
    """

    array: np.ndarray
    datatype: str
    json: bool = False
    raw: bool = False


@dataclass(frozen=True)
class Output:
    """A requested output's form: binary or JSON, the `classes` likeliest, or into a shared memory region."""

    binary: bool
    classes: int = 0
    region: str = ""
    offset: int = 0
    size: int = 0

    @property
    def is_text(self) -> bool:
        return self.classes > 0 or not (self.binary or self.region)


@dataclass(frozen=True)
class InferRequest:
    tensor: Tensor
    outputs: tuple[Output, ...]
    id: str = ""
    variant: str | None = None
    timeout_us: int = 0
    priority: int = 0


@dataclass(frozen=True)
class _Input:
    """What the JSON says of the input; `source` is the one of SOURCES that it has, `entry` and `parameters` its own."""

    datatype: str
    shape: list[int]
    source: str
    size: int
    entry: Object
    parameters: Object


@dataclass(frozen=True)
class _Message:
    """The JSON of a request, without the bytes that follow it."""

    input: _Input
    outputs: tuple[Output, ...]
    id: str
    variant: str | None
    timeout_us: int
    priority: int


def parse(model: str, body: bytes | memoryview, header: int | None, read_region: ReadRegion) -> InferRequest:
    """header: the Inference-Header-Content-Length, the bytes of JSON at the start of the body; None for all of them.

    Raises Refused for what is not a whole infer request, in Triton's sentences where it has one.
    """
    json_size = len(body) if header is None else header
    if not 0 <= json_size <= len(body):
        raise Refused(f"inference header size should be in range (0, {len(body)}), got: {header}", "malformed")
    head = bytes(body[:json_size])
    message = _known(model, head) if header is not None and json_size <= SMALL else _message(model, head)
    tensor = _tensor(model, message.input, memoryview(body)[json_size:], read_region)
    return InferRequest(tensor, message.outputs, message.id, message.variant, message.timeout_us, message.priority)


def _message(model: str, head: bytes) -> _Message:
    try:
        message = orjson.loads(head)
    except ValueError as e:
        raise Refused(f"failed to parse the request JSON buffer: {e}", "malformed") from None
    if not isinstance(message, dict):
        raise Refused("failed to parse the request JSON buffer: it is no object", "malformed")
    parameters = field(message, "parameters", dict, {})
    reserved = next((key for key in parameters if key.startswith("triton_")), None)
    if reserved:
        raise Refused("parameter keys starting with 'triton_' are reserved for Triton usage and should not be "
                      f"specified: {reserved}", "malformed")
    outputs = field(message, "outputs", list, [])
    if len(outputs) > 1:
        raise Refused(f"expected at most 1 outputs but got {len(outputs)} outputs for model '{model}'", "malformed")
    binary = field(parameters, "binary_data_output", bool, False)
    return _Message(_input(model, field(message, "inputs", list)),
                    tuple(_output(model, item) for item in outputs) or (Output(binary),),
                    field(message, "id", str, ""), field(parameters, "variant", str, None),
                    count(parameters, "timeout"), count(parameters, "priority"))


_known = lru_cache(256)(_message)  # a client that sends tensors in binary sends the same JSON again and again


def raw(body: bytes | memoryview) -> InferRequest:
    """A body that is the pixels of one image and nothing else; the answer is binary."""
    return InferRequest(Tensor(np.frombuffer(body, np.uint8), "UINT8", raw=True), (Output(True),))


def too_many(model: str) -> Refused:
    return Refused(f"inference request batch-size must be <= {MAX_IMAGES} for '{model}'", "too_many_images")


def field(holder: Object, key: str, kind: type, *default: Any) -> Any:
    """holder[key], of this type; the default where it is absent, if there is one. Raises Refused."""
    value = holder.get(key)
    if key not in holder and default:
        return default[0]
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise Refused(f"Unable to parse '{key}': it is {'absent' if key not in holder else type(value).__name__}, "
                      f"expected {kind.__name__}", "malformed")
    return value


def count(holder: Object, key: str) -> int:
    """A whole number from 0, 0 where it is absent."""
    value: int = field(holder, key, int, 0)
    if not 0 <= value < 1 << 63:
        raise Refused(f"Unable to parse '{key}': it is {value}, expected a whole number from 0", "malformed")
    return value


def _input(model: str, inputs: list[Any]) -> _Input:
    if len(inputs) != 1:
        raise Refused(f"expected 1 inputs but got {len(inputs)} inputs for model '{model}'", "malformed")
    entry = _object(inputs[0], "inputs")
    name, datatype, shape = (field(entry, key, kind) for key, kind in
                             (("name", str), ("datatype", str), ("shape", list)))
    if name != INPUT:
        raise Refused(f"unexpected inference input '{name}' for model '{model}'", "malformed")
    if datatype not in DATATYPES:
        raise Refused(f"datatype {datatype!r} of input '{name}' is unknown: expected one of {', '.join(DATATYPES)}",
                      "malformed")
    if len(shape) > MOST_DIMENSIONS or not all(type(d) is int and 1 <= d < 1 << 31 for d in shape):
        raise Refused(f"Unable to parse 'shape': {str(shape)[:100]} of input '{name}'", "malformed")
    parameters = field(entry, "parameters", dict, {})
    given = [key for key in SOURCES if key in (entry if key == "data" else parameters)]
    if len(given) != 1:
        raise Refused(f"input '{INPUT}' for model '{model}' sets {' and '.join(given) or 'none'} of "
                      f"{', '.join(SOURCES)}: expected exactly one", "malformed")
    return _Input(datatype, shape, given[0], count(parameters, "binary_data_size"), entry, parameters)


def _tensor(model: str, told: _Input, blobs: memoryview, read_region: ReadRegion) -> Tensor:
    what = f"input '{INPUT}' for model '{model}'"
    if len(blobs) < told.size:
        raise Refused(f"unexpected size for input '{INPUT}', expecting {told.size - len(blobs)} additional bytes for "
                      f"model '{model}'", "malformed")
    if len(blobs) > told.size:
        raise Refused(f"unexpected additional input data for model '{model}'", "malformed")
    if told.datatype == "BYTES" and math.prod(told.shape) > MAX_IMAGES:  # before each of them is looked at
        raise too_many(model)
    match told.source:
        case "data":
            return Tensor(from_json(told.entry["data"], told.datatype, told.shape, what), told.datatype, json=True)
        case "binary_data_size":
            data: bytes | memoryview = blobs
        case _:
            parameters = told.parameters
            data = read_region(field(parameters, "shared_memory_region", str),
                               count(parameters, "shared_memory_offset"), count(parameters, "shared_memory_byte_size"))
    return Tensor(from_binary(data, told.datatype, told.shape, what), told.datatype)


def _output(model: str, entry: Any) -> Output:
    entry = _object(entry, "outputs")
    name = field(entry, "name", str)
    if name != OUTPUT:
        raise Refused(f"unexpected inference output '{name}' for model '{model}'", "malformed")
    parameters = field(entry, "parameters", dict, {})
    region = field(parameters, "shared_memory_region", str, "")
    found = Output(field(parameters, "binary_data", bool, False), count(parameters, "classification"), region,
                   count(parameters, "shared_memory_offset"), count(parameters, "shared_memory_byte_size"))
    if found.region and (found.classes or found.binary):
        raise Refused(f"output '{name}' can't be in a shared memory region and have 'classification' or 'binary_data'",
                      "malformed")
    return found


def _object(value: Any, key: str) -> Object:
    if not isinstance(value, dict):
        raise Refused(f"Unable to parse '{key}': expected objects", "malformed")
    return value
