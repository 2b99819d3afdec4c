"""Every error of the API is {"error": {"code", "message"}} with the status that fits; under /v2 {"error": message}."""

import logging

from flask import Flask, Response, jsonify, request
from redis import RedisError
from werkzeug.exceptions import HTTPException

from shared.errors import Conflict, Damaged, LannerError, NotFound, Refused, Unavailable

log = logging.getLogger("lanner.api")
RETRY_AFTER_S = 2
CODES = {400: "malformed", 403: "forbidden", 404: "not_found", 405: "method_not_allowed", 411: "length_required",
         413: "too_large", 415: "unsupported_media_type"}
TRITON = {409: 400, 422: 400}  # the Open Inference Protocol knows no finer difference


def status_of(error: LannerError) -> int:
    """The HTTP status of an error that crosses rooms."""
    match error:
        case LannerError(code="malformed"):
            return 400
        case LannerError(code="disk_full"):
            return 507
        case Refused():
            return 422
        case NotFound():
            return 404
        case Conflict():
            return 409
        case Unavailable():
            return 503
        case Damaged() | _:
            return 500


def answer(status: int, code: str, message: str) -> Response:
    if request.path == "/v2" or request.path.startswith("/v2/"):
        status = TRITON.get(status, status)
        response = jsonify(error=message)
    else:
        response = jsonify(error={"code": code, "message": message})
    response.status_code = status
    if status == 503:
        response.headers["Retry-After"] = str(RETRY_AFTER_S)
    return response


def register(app: Flask) -> None:
    @app.errorhandler(LannerError)
    def known(error: LannerError) -> Response:
        return answer(status_of(error), error.code, str(error))

    @app.errorhandler(RedisError)
    def no_redis(error: RedisError) -> Response:
        log.warning("%s %s: Redis does not answer: %s", request.method, request.path, error)
        return answer(503, "queue_unavailable", "the job queue does not answer now: send the same request again later")

    @app.errorhandler(HTTPException)
    def http(error: HTTPException) -> Response:
        status = error.code or 500
        code = CODES.get(status, error.name.lower().replace(" ", "_"))
        known = request.url_rule is not None or status != 404
        message = (error.description or error.name) if known else f"{request.path} is no route of this API"
        response = answer(status, code, message)
        for name, value in error.get_headers():
            if name != "Content-Type":
                response.headers[name] = value
        return response

    @app.errorhandler(Exception)
    def unknown(error: Exception) -> Response:
        log.exception("%s %s", request.method, request.path)
        return answer(500, "internal", "the API failed at this request; its log says why")
