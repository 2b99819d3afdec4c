"""POST /v1/models/<name>/predict, the hot path: decode, submit, encode. Loading and batching are elsewhere."""

import time
from collections.abc import Sequence
from concurrent.futures import TimeoutError as NotInTime

import numpy as np
from flask import Blueprint, Response, jsonify, request

from inference.codec import Image, decode_all, images_of_request, top
from inference.context import Api, api
from inference.loaded import Served
from inference.predictor import Closed
from shared.errors import Refused, Unavailable
from shared.jobs import check_id

bp = Blueprint("predict", __name__)
DEADLINE_S = 10.0


@bp.post("/v1/models/<name>/predict")
def predict(name: str) -> Response:
    context = api()
    check_id(name, "name")
    k = _number("top_k") or 5
    images = images_of_request(context.intake, context.settings.request_limit_mib << 20)
    served, scores = _scores(context, name, images)
    loaded = served.loaded
    context.meters.images.labels(name).inc(len(images))
    return jsonify(model=name, version=served.version, variant=loaded.variant, digest=loaded.digest,
                   device=loaded.device, predictions=top(scores, loaded.spec.labels, k))


def _scores(context: Api, name: str, images: Sequence[Image]) -> tuple[Served, np.ndarray]:
    alias = check_id(request.args.get("alias", "production"), "alias")
    version, variant = _number("version"), request.args.get("variant")
    deadline = time.monotonic() + DEADLINE_S
    while True:
        served = context.loaded.resolve(name, alias, version, variant)
        began = time.monotonic()
        batch = decode_all(images, served.loaded.spec.size)
        context.meters.decode.observe(time.monotonic() - began)
        try:
            answer = served.loaded.predictor.submit(batch)
            return served, answer.result(max(0.0, deadline - time.monotonic()))
        except Closed:  # it was replaced between the two lines above: ask for the present one
            if time.monotonic() > deadline:
                raise Unavailable(f"{name} is being replaced", "busy") from None
        except NotInTime:
            answer.cancel()
            raise Unavailable(f"no answer within {DEADLINE_S:g} s: send fewer images, or later", "deadline") from None


def _number(name: str) -> int | None:
    text = request.args.get(name)
    if text is None:
        return None
    if not text.isascii() or not text.isdigit() or not 1 <= int(text[:9]) <= 10**8 or len(text) > 9:
        raise Refused(f"{name} is {text!r}, expected a whole number from 1", "bad_request")
    return int(text)
