"""An HTTP/1.1 answer as bytes; what answers have in common is made once."""

import time
from email.utils import formatdate
from functools import lru_cache
from http import HTTPStatus

from inference import errors
from inference.predictor import BUSY
from shared.errors import Unavailable

Headers = list[tuple[str, str]]
STATUS = {status.value: f"{status.value} {status.phrase}" for status in HTTPStatus}
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


def whole(status: int, body: bytes, headers: Headers, more: tuple[tuple[str, str], ...], last: bool) -> bytes:
    """more: headers of every answer; last: the connection ends behind it."""
    head = _head(status, tuple(headers), more, last)
    return b"%bContent-Length: %d\r\nDate: %b\r\n\r\n%b" % (head, len(body), date(), body)


@lru_cache(256)
def busy(path: str) -> tuple[int, bytes, Headers]:
    """Status, body and headers of the answer to what would wait for too long."""
    return errors.form(path, *errors.explain(Unavailable(BUSY, "busy"), "POST", path))


@lru_cache(256)
def _head(status: int, headers: tuple[tuple[str, str], ...], more: tuple[tuple[str, str], ...], last: bool) -> bytes:
    lines = [f"HTTP/1.1 {STATUS[status]}", *(f"{name}: {value}" for name, value in (*headers, *more)),
             *(["Connection: close"] if last else [])]
    return "\r\n".join(lines).encode() + b"\r\n"


def date() -> bytes:
    return _date(int(time.time()))


@lru_cache(1)
def _date(second: int) -> bytes:
    return formatdate(second, usegmt=True).encode()
