"""Prediction requests and answers: image bytes in three forms in, labels with probabilities out."""

import base64
import binascii
from collections.abc import Sequence
from heapq import nlargest
from io import BytesIO
from typing import Any

import numpy as np
from flask import request
from werkzeug.exceptions import RequestEntityTooLarge, UnsupportedMediaType
from werkzeug.formparser import FormDataParser

from inference.body import Intake, read, read_json
from shared.errors import Refused
from shared.images import decode_into

MAX_IMAGES = 256
FEW = 64  # classes that are sorted sooner than the largest are picked
Image = tuple[str, bytes]  # what to call it in an error, its bytes


def images_of_request(intake: Intake, limit: int) -> list[Image]:
    """The encoded images of the current request: its raw body, the files of a form, or JSON {"images": [base64]}.

    Raises:
        UnsupportedMediaType: another Content-Type.
        RequestEntityTooLarge: more than `limit` bytes.
        Refused: no image, more than MAX_IMAGES, or no base64.
    """
    kind = request.mimetype
    if kind == "application/json":
        images = _of_json(read_json(intake, limit))
    elif kind == "multipart/form-data":
        images = _of_form(read(intake, limit))
    elif kind.startswith("image/") or kind == "application/octet-stream":
        images = [("the image", read(intake, limit))]
    else:
        raise UnsupportedMediaType(f"Content-Type is {kind or 'missing'}: expected image/*, application/octet-stream, "
                                   "multipart/form-data or application/json")
    if not images:
        raise Refused("the request has no image", "no_image")
    if len(images) > MAX_IMAGES:
        raise Refused(f"the request has {len(images)} images, at most {MAX_IMAGES} are accepted", "too_many_images")
    return images


def weight(start: bytes, size: int) -> int:
    """About how many bytes of JPEG an image of `size` bytes is as slow as to decode; start: its first 32 bytes.

    Other formats hold many more pixels in a byte, if these are all alike.
    """
    if start.startswith(b"\xff\xd8\xff"):
        return size
    if start.startswith(b"\x89PNG"):
        return max(size, int.from_bytes(start[16:20], "big") * int.from_bytes(start[20:24], "big") // 4)
    return 16 * size


def decode_all(images: Sequence[Image], size: int) -> np.ndarray:
    """uint8 [N, size, size, 3] RGB. Raises Refused with the name of the image that can't be decoded."""
    batch = np.empty((len(images), size, size, 3), np.uint8)
    for i, image in enumerate(images):
        _decode(image, batch[i])
    return batch


def _decode(image: Image, row: np.ndarray) -> None:
    name, data = image
    try:
        decode_into(data, row)
    except Refused as e:
        raise Refused(f"{name}: {e}", "bad_image") from None


def top(scores: np.ndarray, labels: Sequence[str], k: int) -> list[dict[str, Any]]:
    """The k likeliest of each row of float32 [N, classes], best first; probabilities to 6 decimals."""
    classes = range(len(labels))
    return [{"top": [{"label": labels[i], "index": i, "probability": round(row[i], 6)}
                     for i in (sorted(classes, key=row.__getitem__, reverse=True)[:k] if len(row) <= FEW else
                               nlargest(k, classes, row.__getitem__))]} for row in scores.tolist()]


def _of_json(body: dict[str, Any]) -> list[Image]:
    texts = body.get("images")
    if not isinstance(texts, list) or not all(isinstance(t, str) for t in texts) or len(body) != 1:
        raise Refused('the body is not {"images": ["<base64>", ...]}', "malformed")
    images = []
    for i, text in enumerate(texts):
        try:
            images.append((f"image {i}", base64.b64decode(text, validate=True)))
        except (binascii.Error, ValueError):
            raise Refused(f"image {i} is not base64", "malformed") from None
    return images


def _of_form(body: bytes) -> list[Image]:
    parser = FormDataParser(stream_factory=_in_memory, max_form_parts=MAX_IMAGES + 16, silent=False)
    try:
        _, _, files = parser.parse(BytesIO(body), "multipart/form-data", len(body), request.mimetype_params)
    except RequestEntityTooLarge:
        raise Refused(f"the form has more than the {MAX_IMAGES} images that are accepted", "too_many_images") from None
    except ValueError as e:
        raise Refused(f"the body is not a whole multipart form: {e}", "malformed") from None
    return [(f"image {i} ({file.filename or 'no name'})", file.stream.read())
            for i, (_, file) in enumerate(files.items(multi=True))]


def _in_memory(total_content_length: int | None, content_type: str | None, filename: str | None,
               content_length: int | None = None) -> BytesIO:
    return BytesIO()
