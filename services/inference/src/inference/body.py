"""Request bodies: read in pieces, within limits, and never taken for whole when they are not."""

import json
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from flask import request
from werkzeug.exceptions import RequestEntityTooLarge, UnsupportedMediaType

from shared.errors import Refused, Unavailable

PIECE = 1 << 20
JSON_LIMIT = 1 << 20
STALL_S = 60.0  # without a byte of a request that is not whole: then it is given up
BODY_SLOTS = 256  # requests that may be sending a body at one time; each holds a thread until its client is done


class Intake:
    """Bounds what clients can hold: how many send a body at once, and the memory of the bodies still arriving."""

    def __init__(self, memory: int, slots: int = BODY_SLOTS):
        self.memory = self._free = memory
        self._slots = slots
        self._lock = threading.Lock()

    def enter(self) -> None:
        """Take a slot, until `leave`. Raises Unavailable when every slot is taken."""
        with self._lock:
            if self._slots == 0:
                raise Unavailable("too many requests are sending a body at this moment", "busy")
            self._slots -= 1

    def leave(self) -> None:
        with self._lock:
            self._slots += 1

    def take(self, size: int) -> None:
        """Raises Unavailable when the memory for bodies is used up."""
        with self._lock:
            if self._free < size:
                raise Unavailable("the requests arriving at this moment fill the memory set aside for them", "busy")
            self._free -= size

    def give(self, size: int) -> None:
        with self._lock:
            self._free += size

    @contextmanager
    def hold(self, size: int) -> Iterator[None]:
        """Set aside memory for what a body is turned into. Raises Unavailable when it is used up."""
        self.take(size)
        try:
            yield
        finally:
            self.give(size)


def pieces(intake: Intake, limit: int, inflate: bool = False) -> Iterator[bytes]:
    """The body of the current request in pieces of at most 1 MiB; of what it is decompressed, with `inflate`.

    Raises:
        RequestEntityTooLarge: it has, or (at once) says that it has, more than `limit` bytes.
        Refused: it ended before its Content-Length. granian shows a lost client as the end of the body.
        Unavailable: too many bodies arrive at once.
    """
    declared = request.content_length
    encoding = request.headers.get("Content-Encoding", "identity")
    if encoding not in ("identity", *(("gzip", "deflate") if inflate else ())):
        raise UnsupportedMediaType("gzip and deflate are the only Content-Encodings of this route" if inflate else
                                   "compressed bodies are not accepted: send it without Content-Encoding")
    if declared is not None and declared > limit:
        raise RequestEntityTooLarge(f"the body has {declared} bytes, at most {limit} are accepted")
    stream = _stream(intake, limit, declared)
    return stream if encoding == "identity" else _inflated(stream, limit)


def _stream(intake: Intake, limit: int, declared: int | None) -> Iterator[bytes]:
    got = 0
    intake.enter()
    try:
        while piece := request.stream.read(PIECE):
            got += len(piece)
            if got > limit:
                raise RequestEntityTooLarge(f"the body has more than the {limit} bytes that are accepted")
            yield piece
    finally:
        intake.leave()
    if declared is not None and got != declared:
        raise cut_off(got, declared)


def cut_off(got: int, declared: int) -> Refused:
    return Refused(f"the body ended after {got} bytes, its Content-Length is {declared}: send it again", "malformed")


def stalled(seconds: float) -> Refused:
    return Refused(f"no byte of the rest of this request came for {seconds:g} s: send it again", "timeout")


def read_declared(intake: Intake, stream: Any, declared: int) -> bytes:
    """A body of which `declared` bytes are announced, and allowed; raises Refused and Unavailable as `pieces`.

    One call of `read` where that is enough: each lets go of the interpreter, and under load waits to have it back.
    """
    intake.enter()
    body, got = [], 0
    try:
        while got < declared and (piece := stream.read(min(PIECE, declared - got))):
            if declared > PIECE:
                intake.take(len(piece))
            got += len(piece)
            body.append(piece)
    finally:
        intake.leave()
        if declared > PIECE:
            intake.give(got)
    if got != declared:
        raise cut_off(got, declared)
    return body[0] if len(body) == 1 else b"".join(body)


def _inflated(compressed: Iterator[bytes], limit: int) -> Iterator[bytes]:
    """Raises RequestEntityTooLarge for more than `limit` bytes, of which no more are made; Refused for other bytes."""
    inflater, got = zlib.decompressobj(32 + zlib.MAX_WBITS), 0  # gzip's header or zlib's
    try:
        for piece in compressed:
            while piece:
                if inflater.eof:  # what follows must be another member of gzip, or zeros that fill a block
                    if not (piece := piece.lstrip(b"\0")):
                        break
                    inflater = zlib.decompressobj(16 + zlib.MAX_WBITS)
                data = inflater.decompress(piece, PIECE)
                piece = inflater.unused_data if inflater.eof else inflater.unconsumed_tail
                got += len(data)
                if got > limit:
                    raise RequestEntityTooLarge(f"the body has more than the {limit} bytes that are accepted, "
                                                "decompressed")
                yield data
    except zlib.error as e:
        raise Refused(f"the body can't be decompressed: {e}", "malformed") from None
    if not inflater.eof:
        raise Refused("the compressed body ends before it is whole", "malformed")


def read(intake: Intake, limit: int, inflate: bool = False) -> bytes:
    """The whole body of the current request; raises as `pieces` does."""
    body = bytearray()
    try:
        for piece in pieces(intake, limit, inflate):
            intake.take(len(piece))
            body += piece
    finally:
        intake.give(len(body))
    return bytes(body)


def read_json(intake: Intake, limit: int = JSON_LIMIT) -> dict[str, Any]:
    """The body as a JSON object.

    Raises, beside what `pieces` and `json_object` do:
        UnsupportedMediaType: it is not sent as application/json. A form of another site can't send that unasked.
    """
    if request.mimetype != "application/json":
        raise UnsupportedMediaType(f"Content-Type is {request.mimetype or 'missing'}: expected application/json")
    return json_object(read(intake, limit))


def json_object(text: bytes, check: Callable[[bytes], None] = lambda text: None) -> dict[str, Any]:
    """check: of the text, if it has over 1 MiB.

    Raises Refused: it is not JSON, or not an object; and what `check` does.
    """
    if len(text) > JSON_LIMIT:
        check(text)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise Refused(f"the body is not JSON: {e}", "malformed") from None
    if not isinstance(value, dict):
        raise Refused(f"the body is a JSON {type(value).__name__}, expected an object", "malformed")
    return value
