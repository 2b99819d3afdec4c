"""/livez, /readyz, /metrics: for supervisors, load balancers and Prometheus."""

from flask import Blueprint, Response, jsonify
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from redis import RedisError

from inference.context import api
from inference.metrics import Total

bp = Blueprint("health", __name__)


@bp.get("/livez")
def livez() -> Response:
    """The process answers; it asks nobody else, so that a lost Redis restarts no API."""
    return jsonify(alive=True)


@bp.get("/readyz")
def readyz() -> tuple[Response, int]:
    """Whether predictions are answered. Redis is shown and not required: predictions do without it."""
    context = api()
    serving, refused = context.loaded.state()
    try:
        redis = bool(context.redis.ping())
    except RedisError:
        redis = False
    unloaded = context.loaded.unloaded()
    state = {"ready": bool(serving), "models": serving, "refused": refused, "unloaded": unloaded, "redis": redis}
    if serving:
        return jsonify(state), 200
    message = ("every promoted model is refused or unloaded" if refused or unloaded else
               "no model is promoted yet: POST /v1/pipelines makes one")
    return jsonify({"error": {"code": "no_model", "message": message}, "code": "no_model", **state}), 503


@bp.get("/metrics")
def metrics() -> Response:
    """Of all processes of the API: what each counted is added up."""
    context, counted = api(), CollectorRegistry()
    counted.register(Total([context.meters.families(), *context.peers.ask("families")]))
    return Response(generate_latest(counted) + generate_latest(context.meters.host), content_type=CONTENT_TYPE_LATEST)
