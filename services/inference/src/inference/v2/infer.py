"""POST /v2/models/<model>/infer: the protocol's form around what every prediction goes through."""

import gzip
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

from flask import Response, request

from inference.body import JSON_LIMIT, read
from inference.context import Api, api
from inference.scores import DEADLINE_S, PRODUCTION, model_called, scores
from inference.v2.answers import respond, to_images
from inference.v2.messages import InferRequest, parse, raw
from shared.errors import NotFound, Refused
from shared.jobs import check_id

HEADER = "Inference-Header-Content-Length"
JSON_IN_MEMORY = 12  # times the size of its text that a tensor of JSON takes at most while it is read
LEVEL = 1  # of compression: answers are a few probabilities


def infer(model: str, version: int | None = None) -> Response:
    context = api()
    name, alias = place(model)
    body = read(context.intake, context.settings.request_limit_mib << 20, inflate=True)
    with context.statistics.request(model_called(name, alias)) as timing:
        asked = _parse(context, model, body)
        patience_s = min(DEADLINE_S, asked.timeout_us / 1e6) if asked.timeout_us else DEADLINE_S
        with known(model, version):
            served, found = scores(context, timing, name, alias, version, asked.variant,
                                   lambda size: to_images(model, asked.tensor, size), patience_s)
        loaded = served.loaded
        content, json_size = respond(asked, model, served.version, {"variant": loaded.variant}, found,
                                     loaded.spec.labels, context.regions.write)
        return _response(content, json_size)


def place(model: str) -> tuple[str, str]:
    """The Name and the alias of what clients call a model: NAME, or NAME@ALIAS."""
    name, at, alias = model.partition("@")
    return check_id(name, "model name"), check_id(alias, "alias") if at else PRODUCTION


@contextmanager
def known(model: str, version: int | None = None) -> Iterator[None]:
    """What is not found is told in Triton's sentence, which clients look for."""
    try:
        yield
    except NotFound as e:
        asked = f"'{model}'" if version is None else f"'{model}' version {version}"
        raise NotFound(f"Request for unknown model: {asked} is not found: {e}", e.code) from None


def _parse(context: Api, model: str, body: bytes) -> InferRequest:
    text = request.headers.get(HEADER)
    if text is not None and not (text.isascii() and text.removeprefix("-").isdigit()):
        raise Refused(f"Unable to parse {HEADER}, got: {text}", "malformed")
    header = None if text is None else int(text[:20])
    if header == 0 and body:
        return raw(body)
    size = len(body) if header is None else min(header, len(body))
    needed = min(JSON_IN_MEMORY * size, context.intake.memory) if size > JSON_LIMIT else 0
    with context.intake.hold(needed):
        return parse(model, body, header, context.regions.read)


def _response(content: bytes, json_size: int | None) -> Response:
    accepted = request.accept_encodings
    encoding = max(("gzip", "deflate"), key=lambda name: accepted[name]) if accepted else ""
    if encoding and accepted[encoding] > 0:
        content = gzip.compress(content, LEVEL) if encoding == "gzip" else zlib.compress(content, LEVEL)
    else:
        encoding = ""
    response = Response(content, mimetype="application/json" if json_size is None else "application/octet-stream")
    if json_size is not None:
        response.headers[HEADER] = str(json_size)
    if encoding:
        response.headers["Content-Encoding"] = encoding
    return response
