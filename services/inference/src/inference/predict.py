"""POST /v1/models/<name>/predict, the hot path: decode, submit, encode. Loading and batching are elsewhere."""

from collections.abc import Sequence

import orjson
from flask import Blueprint, Response, request

from inference.codec import HEAD, Image, decode_all, images_of_request, top, weight
from inference.context import Api, api
from inference.loaded import Served
from inference.scores import PRODUCTION, many, model_called, scores
from inference.statistics import Timing
from inference.steps import WRITE, Steps, finish
from shared.errors import Refused
from shared.jobs import check_id

bp = Blueprint("predict", __name__)
RULE = "/v1/models/<name>/predict"
TOP_K = 5
MOST = 10**8  # of a number in the query
QUERY = frozenset(("alias", "version", "variant", "top_k"))


@bp.post(RULE)
def predict(name: str) -> Response:
    context = api()
    check_id(name, "name")
    if unknown := sorted(set(request.args) - QUERY):
        raise Refused(f"predict knows no {unknown[0][:100]!r}: expected some of {', '.join(sorted(QUERY))}",
                      "bad_request")
    k = _number("top_k") or TOP_K
    images = images_of_request(context.intake, context.settings.request_limit_mib << 20)
    alias = check_id(request.args.get("alias", PRODUCTION), "alias")
    with context.statistics.request(model_called(name, alias), request.headers.get("traceparent", "")) as timing:
        version, variant = _number("version"), request.args.get("variant")
        steps = label(context, timing, name, images, alias, version, variant, k)
        return Response(finish(steps), mimetype="application/json")


def label(context: Api, timing: Timing, name: str, images: Sequence[Image], alias: str = PRODUCTION,
          version: int | None = None, variant: str | None = None, k: int = TOP_K) -> Steps[bytes]:
    """The answer as JSON. Raises as `scores` does, and Refused for an image that can't be decoded."""
    work = sum(weight(data[:HEAD], len(data)) for _, data in images)
    served, found = yield from scores(context, timing, name, alias, version, variant,
                                      lambda size: decode_all(images, size), work, len(images))
    if many(found, k):
        yield WRITE
    body = render(begin(name, served), top(found, served.loaded.entries, k))
    context.meters.encode.observe(timing.encoding_s())
    return body


def begin(name: str, served: Served) -> bytes:
    """Of every answer of what is served now, as JSON, up to the predictions."""
    loaded = served.loaded
    return orjson.dumps({"model": name, "version": served.version, "variant": loaded.variant, "digest": loaded.digest,
                         "device": loaded.device})[:-1] + b',"predictions":['


def render(beginning: bytes, predictions: Sequence[bytes]) -> bytes:
    """The answer as JSON. predictions: each as `top` writes it."""
    return b"%b%b]}" % (beginning, b",".join(predictions))


def _number(name: str) -> int | None:
    text = request.args.get(name)
    if text is None:
        return None
    if not text.isascii() or not text.isdigit() or not 1 <= int(text[:9]) <= MOST or len(text) > 9:
        raise Refused(f"{name} is {text[:100]!r}, expected a whole number from 1 to {MOST:,}", "bad_request")
    return int(text)
