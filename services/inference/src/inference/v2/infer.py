"""POST /v2/models/<model>/infer: the protocol's form around what every prediction goes through."""

import gzip
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

from flask import Response, request
from werkzeug.http import parse_accept_header

from inference.body import JSON_LIMIT, read
from inference.context import Api, api
from inference.predictor import LAST
from inference.scores import DEADLINE_S, LIGHT, PRODUCTION, many, model_called, scores
from inference.statistics import Timing
from inference.steps import WRITE, Steps, finish
from inference.v2.answers import respond, to_images, weigh
from inference.v2.messages import InferRequest, parse, raw
from shared.errors import NotFound, Refused
from shared.jobs import check_id

RULE, VERSION_RULE = "/v2/models/<model>/infer", "/v2/models/<model>/versions/<int:version>/infer"
HEADER = "Inference-Header-Content-Length"
JSON_IN_MEMORY = 12  # times the size of its text that a tensor of JSON takes at most while it is read
LEVEL = 1  # of compression: answers are a few probabilities


def infer(model: str, version: int | None = None) -> Response:
    context = api()
    name, alias = place(model)
    body = read(context.intake, context.settings.request_limit_mib << 20, inflate=True)
    with context.statistics.request(model_called(name, alias), request.headers.get("traceparent", "")) as timing:
        return _response(*finish(ask(context, timing, model, version, body, request.headers.get(HEADER))))


def ask(context: Api, timing: Timing, model: str, version: int | None, body: bytes | memoryview,
        header: str | None) -> Steps[tuple[bytes, int | None]]:
    """An infer request's answer, and how much of it is JSON if bytes of outputs follow.

    header: Inference-Header-Content-Length as it came. Raises as `parse`, `scores`, `to_images` and `respond`.
    """
    name, alias = place(model)
    if (int(header[:20]) if header and header.isdecimal() else len(body)) > LIGHT:  # bytes of JSON
        yield None
    asked = _parse(context, model, body, header)
    encoded = asked.tensor.array.size if asked.tensor.datatype == "BYTES" else 0
    patience_s = min(DEADLINE_S, asked.timeout_us / 1e6) if asked.timeout_us else DEADLINE_S
    try:
        served, found = yield from scores(context, timing, name, alias, version, asked.variant,
                                          lambda size: to_images(model, asked.tensor, size), weigh(asked.tensor),
                                          encoded, patience_s, asked.priority or LAST)
    except NotFound as e:
        raise unknown(model, version, e) from None
    loaded = served.loaded
    if any(output.is_text and many(found, output.classes or found.shape[1]) for output in asked.outputs):
        yield WRITE
    told = {"variant": loaded.variant, "model_digest": loaded.digest}
    answer = respond(asked, model, served.version, told, found, loaded.spec.labels,
                     context.regions.write)
    context.meters.encode.observe(timing.encoding_s())
    return answer


def place(model: str) -> tuple[str, str]:
    """The Name and the alias of what clients call a model: NAME, or NAME@ALIAS."""
    name, at, alias = model.partition("@")
    return check_id(name, "model name"), check_id(alias, "alias") if at else PRODUCTION


@contextmanager
def known(model: str, version: int | None = None) -> Iterator[None]:
    """What is not found is told as by `unknown`."""
    try:
        yield
    except NotFound as e:
        raise unknown(model, version, e) from None


def unknown(model: str, version: int | None, error: NotFound) -> NotFound:
    """The error in Triton's sentence, which clients look for."""
    asked = f"'{model}'" if version is None else f"'{model}' version {version}"
    return NotFound(f"Request for unknown model: {asked} is not found: {error}", error.code)


def _parse(context: Api, model: str, body: bytes | memoryview, text: str | None) -> InferRequest:
    if text is not None and not (text.isascii() and text.removeprefix("-").isdigit()):
        raise Refused(f"Unable to parse {HEADER}, got: {text}", "malformed")
    header = None if text is None else int(text[:20])
    if header == 0 and body:
        return raw(body)
    size = len(body) if header is None else min(header, len(body))
    if size <= JSON_LIMIT:
        return parse(model, body, header, context.regions.read)
    with context.intake.hold(min(JSON_IN_MEMORY * size, context.intake.memory)):
        return parse(model, body, header, context.regions.read)


def compressed(content: bytes, accepted: str) -> tuple[bytes, list[tuple[str, str]]]:
    """An answer as its client's Accept-Encoding prefers it, and the header that says so."""
    match _encoding(accepted):
        case "gzip" as encoding:
            return gzip.compress(content, LEVEL, mtime=0), [("Content-Encoding", encoding)]
        case "deflate" as encoding:
            return zlib.compress(content, LEVEL), [("Content-Encoding", encoding)]
    return content, []


@lru_cache(256)
def _encoding(accepted: str) -> str:
    """gzip or deflate, whichever is wanted more, or neither."""
    wanted = parse_accept_header(accepted)
    best = max(("gzip", "deflate"), key=lambda name: wanted[name])
    return best if wanted[best] > 0 else ""


def _response(content: bytes, json_size: int | None) -> Response:
    content, headers = compressed(content, request.headers.get("Accept-Encoding", ""))
    if json_size is not None:
        headers.append((HEADER, str(json_size)))
    return Response(content, headers=headers,
                    mimetype="application/json" if json_size is None else "application/octet-stream")
