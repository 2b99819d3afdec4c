"""Prediction requests and answers: image bytes in three forms in, labels with probabilities out."""

import base64
import binascii
import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from io import BytesIO
from typing import Any

import numpy as np
import orjson
from flask import request
from werkzeug.exceptions import RequestEntityTooLarge, UnsupportedMediaType
from werkzeug.formparser import FormDataParser

from inference.body import Intake, json_object, read
from shared.errors import Refused
from shared.images import decode_into

MAX_IMAGES = 256
MEGAPIXEL = 1 << 20
JPEG = b"\xff\xd8\xff"
JPEG_PIXELS = 8  # of a photograph, to a byte
LEAST_JPEG, LEAST = 512, 6144  # bytes that the smallest image of JPEG, and of another format, is as slow as
HEAD = 4096  # bytes of an image that are looked through for its size; a multiple of 4, as base64 has it
NO_FRAME = (0xC4, 0xC8, 0xCC)  # of the markers from SOF0 to SOF15: DHT, JPG, DAC
FEW = 64  # classes that are sorted sooner than the largest are picked, and likeliest that are written soon
SEVERAL = 8  # rows that NumPy sorts sooner
NO_IMAGES = 'the body is not {"images": ["<base64>", ...]}'
FORM = "multipart/form-data"  # of many small parts 32 KiB take 15 ms to read
Image = tuple[str, bytes]  # what to call it in an error, its bytes


def images_of_request(intake: Intake, limit: int) -> list[Image]:
    """The encoded images of the current request, as `images_of`.

    Raises, beside what that does:
        UnsupportedMediaType: another Content-Type.
        RequestEntityTooLarge: more than `limit` bytes.
    """
    kind = request.mimetype
    if not is_of_images(kind):
        raise UnsupportedMediaType(f"Content-Type is {kind or 'missing'}: expected image/*, application/octet-stream, "
                                   "multipart/form-data or application/json")
    return images_of(kind, request.mimetype_params, read(intake, limit))


def is_of_images(kind: str) -> bool:
    """Whether a body of this Content-Type, without its parameters, can be one of images."""
    return is_one_image(kind) or kind in ("application/json", FORM)


def is_one_image(kind: str) -> bool:
    return kind.startswith("image/") or kind == "application/octet-stream"


def images_of(kind: str, params: Mapping[str, str], body: bytes) -> list[Image]:
    """The encoded images of a body of this Content-Type: itself, the files of a form, or JSON {"images": [base64]}.

    kind: of which `is_of_images` is true; params: what follows it, as the boundary of a form.
    Raises Refused: no image, more than MAX_IMAGES, no base64, or a body that can't be read.
    """
    if kind == "application/json":
        images = _of_json(json_object(body, _check_text))
    elif kind == FORM:
        images = _of_form(body, params)
    else:
        images = [("the image", body)]
    if not images:
        raise Refused("the request has no image", "no_image")
    _check_number(len(images))
    return images


def _check_number(images: int) -> None:
    if images > MAX_IMAGES:
        raise Refused(f"the request has {images} images, at most {MAX_IMAGES} are accepted", "too_many_images")


def weight(start: bytes, size: int) -> int:
    """About how many bytes of a photograph as JPEG an image of `size` bytes is as slow as to decode.

    start: its bytes, or the first of them. Its pixels count, too: a byte holds thousands where they are all alike.
    """
    pixels, a_byte = _pixels(start)
    return max(size, pixels // a_byte, LEAST_JPEG if a_byte == JPEG_PIXELS else LEAST) if pixels else MEGAPIXEL


def _pixels(start: bytes) -> tuple[int, int]:
    """Of an image, and how many of them take as long as a byte of JPEG; 0 where its beginning does not tell."""
    if start.startswith(JPEG):
        return _pixels_of_jpeg(start), JPEG_PIXELS
    if start.startswith(b"\x89PNG") and len(start) >= 24:
        return int.from_bytes(start[16:20], "big") * int.from_bytes(start[20:24], "big"), 4
    if start.startswith(b"RIFF") and len(start) >= 30:
        match start[12:16]:
            case b"VP8X":
                return (int.from_bytes(start[24:27], "little") + 1) * (int.from_bytes(start[27:30], "little") + 1), 1
            case b"VP8L":
                sides = int.from_bytes(start[21:25], "little")
                return ((sides & 0x3FFF) + 1) * ((sides >> 14 & 0x3FFF) + 1), 1
            case b"VP8 ":
                return ((int.from_bytes(start[26:28], "little") & 0x3FFF) *
                        (int.from_bytes(start[28:30], "little") & 0x3FFF)), 1
    return 0, 1


def _pixels_of_jpeg(start: bytes) -> int:
    """From its frame header, behind segments that are gone through as decoders do: one may hold another's header."""
    at = 2
    while at + 9 <= len(start) and start[at] == 0xFF:
        marker = start[at + 1]
        if 0xC0 <= marker <= 0xCF and marker not in NO_FRAME:
            return (start[at + 5] << 8 | start[at + 6]) * (start[at + 7] << 8 | start[at + 8])
        at += 2 + (start[at + 2] << 8 | start[at + 3])
    return 0


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
        said = str(e).removeprefix("the image") if name == "the image" else f": {e}"
        raise Refused(f"{name}{said}", "bad_image") from None


def entries(labels: Sequence[str]) -> list[bytes]:
    """What `top` writes before the probability of each class."""
    return [b'{"label":%b,"index":%d,"probability":' % (orjson.dumps(label), i) for i, label in enumerate(labels)]


def top(scores: np.ndarray, entries: Sequence[bytes], k: int) -> list[bytes]:
    """The k likeliest of each row of float32 [N, classes] as JSON, best first; probabilities to 6 decimals.

    entries: of the classes, as `entries` makes them. All else of the text is written here: objects for a JSON library
    take three times as long.
    """
    k, classes, found = min(k, len(entries)), len(entries), []
    form = _form(k)
    orders, rows = _of_few(scores, k) if classes <= FEW else _of_many(scores, k)
    for order, row in zip(orders, rows, strict=True):
        values: tuple[Any, ...] = tuple([part for i in order for part in (entries[i], row[i])])
        found.append(form % values if math.isfinite(sum(values[1::2])) else _with_null(values))
    return found


def _of_few(scores: np.ndarray, k: int) -> tuple[list[list[int]], list[list[float]]]:
    """Of each row the classes of its k largest scores, the largest first, and its scores by class."""
    rows = scores.tolist()
    if len(rows) >= SEVERAL:
        return np.argsort(-scores, axis=1, kind="stable")[:, :k].tolist(), rows
    return [sorted(range(len(row)), key=row.__getitem__, reverse=True)[:k] for row in rows], rows


def _of_many(scores: np.ndarray, k: int) -> tuple[list[list[int]], list[dict[int, float]]]:
    """As `_of_few`, with the scores of those classes alone."""
    some = np.argpartition(-scores, min(k, scores.shape[1] - 1), axis=1)[:, :k]
    some.sort(axis=1)  # of equal ones the first class is first
    order = np.take_along_axis(some, np.argsort(-np.take_along_axis(scores, some, 1), axis=1, kind="stable"), 1)
    orders = order.tolist()
    return orders, [dict(zip(o, best, strict=True))
                    for o, best in zip(orders, np.take_along_axis(scores, order, 1).tolist(), strict=True)]


@lru_cache(64)
def _form(k: int) -> bytes:
    return b'{"top":[%b]}' % b",".join([b"%b%.6f}"] * k)


def _with_null(values: Sequence[Any]) -> bytes:
    """What is no number can't be written as one."""
    return b'{"top":[%b]}' % b",".join(
        entry + (b"%.6f}" % score if math.isfinite(score) else b"null}")
        for entry, score in zip(values[::2], values[1::2], strict=True))


def _check_text(text: bytes) -> None:
    """Refuse what is not {"images": ["<base64>", ...]} at a glance, before it is 25 times as large in memory."""
    if any(text.count(mark) > most for mark, most in ((b"{", 1), (b"[", 1), (b",", 16 * MAX_IMAGES))):
        raise Refused(NO_IMAGES, "malformed")


def _of_json(body: dict[str, Any]) -> list[Image]:
    texts = body.get("images")
    if not isinstance(texts, list) or not all(isinstance(t, str) for t in texts) or len(body) != 1:
        raise Refused(NO_IMAGES, "malformed")
    _check_number(len(texts))
    images = []
    for i, text in enumerate(texts):
        try:
            images.append((f"image {i}", base64.b64decode(text, validate=True)))
        except (binascii.Error, ValueError):
            raise Refused(f"image {i} is not base64: expected the standard alphabet, without line breaks and without "
                          "`data:...;base64,` before it", "malformed") from None
    return images


def _of_form(body: bytes, params: Mapping[str, str]) -> list[Image]:
    parser = FormDataParser(stream_factory=_in_memory, max_form_parts=MAX_IMAGES + 16, silent=False)
    try:
        _, _, files = parser.parse(BytesIO(body), FORM, len(body), dict(params))
    except RequestEntityTooLarge:
        raise Refused(f"the form has more than the {MAX_IMAGES} images that are accepted", "too_many_images") from None
    except ValueError as e:
        raise Refused(f"the body is not a whole multipart form: {e}", "malformed") from None
    return [(f"image {i} ({file.filename or 'no name'})", file.stream.read())
            for i, (_, file) in enumerate(files.items(multi=True))]


def _in_memory(total_content_length: int | None, content_type: str | None, filename: str | None,
               content_length: int | None = None) -> BytesIO:
    return BytesIO()
