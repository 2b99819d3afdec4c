"""POST /v1/models/<name>/predict, the hot path: decode, submit, encode. Loading and batching are elsewhere."""

from flask import Blueprint, Response, jsonify, request

from inference.codec import decode_all, images_of_request, top
from inference.context import api
from inference.scores import PRODUCTION, model_called, scores
from shared.errors import Refused
from shared.jobs import check_id

bp = Blueprint("predict", __name__)


@bp.post("/v1/models/<name>/predict")
def predict(name: str) -> Response:
    context = api()
    check_id(name, "name")
    k = _number("top_k") or 5
    images = images_of_request(context.intake, context.settings.request_limit_mib << 20)
    alias = check_id(request.args.get("alias", PRODUCTION), "alias")
    with context.statistics.request(model_called(name, alias)) as timing:
        served, found = scores(context, timing, name, alias, _number("version"), request.args.get("variant"),
                               lambda size: decode_all(images, size))
        loaded = served.loaded
        return jsonify(model=name, version=served.version, variant=loaded.variant, digest=loaded.digest,
                       device=loaded.device, predictions=top(found, loaded.spec.labels, k))


def _number(name: str) -> int | None:
    text = request.args.get(name)
    if text is None:
        return None
    if not text.isascii() or not text.isdigit() or not 1 <= int(text[:9]) <= 10**8 or len(text) > 9:
        raise Refused(f"{name} is {text!r}, expected a whole number from 1", "bad_request")
    return int(text)
