"""From a request's tensor to images, and from scores to the answer in the forms that were asked for."""

import base64
import binascii
from collections.abc import Callable, Sequence

import numpy as np
import orjson

from inference.codec import HEAD, MAX_IMAGES, decode_all, weight
from inference.v2.messages import INPUT, OUTPUT, InferRequest, Object, Output, Tensor, too_many
from inference.v2.tensors import from_binary, to_binary, to_json
from shared.errors import Refused

WriteRegion = Callable[[str, int, int, bytes], None]  # (region, offset, most bytes, bytes)


def to_images(model: str, tensor: Tensor, size: int) -> np.ndarray:
    """uint8 [N, size, size, 3] of pixels 0..255 in any datatype of numbers, rounded, or of encoded images as BYTES.

    Raises Refused: another shape, more than MAX_IMAGES, a value that is no pixel, bytes that are no image.
    """
    array = tensor.array
    if tensor.raw:
        return from_binary(array.tobytes(), "UINT8", (1, size, size, 3), f"input '{INPUT}' for model '{model}'")
    if array.ndim and len(array) > MAX_IMAGES:
        raise too_many(model)
    if tensor.datatype == "BYTES":
        if array.ndim not in (1, 2) or array.shape[1:] not in ((), (1,)):
            raise Refused(f"unexpected shape for input '{INPUT}' for model '{model}'. Expected [-1], got "
                          f"{list(array.shape)}", "malformed")
        return decode_all([(f"image {i}", _encoded(item, tensor.json, i)) for i, item in enumerate(array.reshape(-1))],
                          size)
    if array.ndim != 4 or array.shape[1:] != (size, size, 3):
        raise Refused(f"unexpected shape for input '{INPUT}' for model '{model}'. Expected [-1,{size},{size},3], got "
                      f"{list(array.shape)}", "malformed")
    if tensor.datatype == "UINT8":
        return array
    if tensor.datatype == "BOOL":
        raise Refused(f"inference input '{INPUT}' data-type is 'BOOL', but model '{model}' expects 'UINT8', another "
                      "datatype of numbers from 0 to 255, or 'BYTES'", "malformed")
    least, most = array.min(), array.max()
    if not (least >= 0 and most <= 255):  # NaN is neither
        raise Refused(f"input '{INPUT}' for model '{model}' has values from {least} to {most}: expected pixels from 0 "
                      "to 255", "malformed")
    return (np.rint(array) if array.dtype.kind == "f" else array).astype(np.uint8)


def weigh(tensor: Tensor) -> int:
    """How much there is to do until they are images, as `codec.weight`."""
    if tensor.datatype == "UINT8":  # they are images
        return 0
    if tensor.datatype != "BYTES":
        return tensor.array.nbytes
    try:
        return sum(weight(base64.b64decode(item[:HEAD]) if tensor.json else item[:HEAD], len(item))
                   for item in tensor.array.reshape(-1))
    except binascii.Error:
        return 0  # it is refused at once


def respond(request: InferRequest, model: str, version: int, parameters: Object, scores: np.ndarray,
            labels: Sequence[str], write_region: WriteRegion) -> tuple[bytes, int | None]:
    """The body, and how much of it is JSON if bytes of outputs follow. parameters: what else the answer tells."""
    blobs: list[bytes] = []
    outputs = [_output(output, scores, labels, blobs, write_region) for output in request.outputs]
    message = {**({"id": request.id} if request.id else {}), "model_name": model, "model_version": str(version),
               "parameters": parameters, "outputs": outputs}
    head = orjson.dumps(message)
    return b"".join([head, *blobs]), len(head) if blobs else None


def _encoded(item: bytes, is_base64: bool, number: int) -> bytes:
    if not is_base64:
        return item
    try:
        return base64.b64decode(item, validate=True)
    except binascii.Error:
        raise Refused(f"image {number} is not base64: in JSON a BYTES element is an encoded image as base64",
                      "malformed") from None


def _output(output: Output, scores: np.ndarray, labels: Sequence[str], blobs: list[bytes],
            write_region: WriteRegion) -> Object:
    tensor, datatype = (likeliest(scores, labels, output.classes), "BYTES") if output.classes else (scores, "FP32")
    told: Object = {"name": OUTPUT, "datatype": datatype, "shape": list(tensor.shape)}
    if output.region:  # without `parameters`: C++ clients would look for binary_data_size in it
        write_region(output.region, output.offset, output.size, to_binary(tensor, datatype))
    elif output.binary:
        blobs.append(to_binary(tensor, datatype))
        told["parameters"] = {"binary_data_size": len(blobs[-1])}
    else:
        told["data"] = to_json(tensor, datatype)
    return told


def likeliest(scores: np.ndarray, labels: Sequence[str], k: int) -> np.ndarray:
    """object [N, k] of b"<probability>:<index>:<label>", the likeliest first."""
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    found = np.empty(order.shape, object)
    for row, best in enumerate(order.tolist()):
        for column, i in enumerate(best):
            found[row, column] = f"{scores[row, i]:.6f}:{i}:{labels[i]}".encode()
    return found
