"""Every error of the API is {"error": {"code", "message"}} with the status that fits; under /v2 {"error": message}."""

import errno
import logging

import orjson
from flask import Flask, Response, request
from redis import RedisError
from werkzeug.exceptions import HTTPException, MethodNotAllowed

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
        case LannerError(code="timeout"):
            return 408
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


def form(path: str, status: int, code: str, message: str) -> tuple[int, bytes, list[tuple[str, str]]]:
    """Status, body and headers of an error's answer."""
    if path == "/v2" or path.startswith("/v2/"):
        status, told = TRITON.get(status, status), {"error": message}
    else:
        told = {"error": {"code": code, "message": message}}  # type: ignore[dict-item]
    headers = [("Content-Type", "application/json"), *([("Retry-After", str(RETRY_AFTER_S))] if status == 503 else [])]
    return status, orjson.dumps(told), headers


def explain(error: Exception, method: str, path: str) -> tuple[int, str, str]:
    """Status, code and message of any error; what a client can do nothing about is logged."""
    match error:
        case LannerError():
            return status_of(error), error.code, str(error)
        case OSError(errno=errno.ENOSPC | errno.EDQUOT):
            log.error("%s %s: %s", method, path, error)
            return 507, "disk_full", ("the volume is full: delete uploads or datasets, or enlarge it, then send it "
                                       "again, with another Idempotency-Key if it had one")
        case RedisError():
            log.warning("%s %s: Redis does not answer: %s", method, path, error)
            return 503, "queue_unavailable", "the job queue does not answer now: send the same request again later"
        case _:
            log.error("%s %s", method, path, exc_info=error)
            return 500, "internal", "the API failed at this request; its log says why"


def answer(status: int, code: str, message: str) -> Response:
    status, body, headers = form(request.path, status, code, message)
    return Response(body, status, headers)


def register(app: Flask) -> None:
    @app.errorhandler(Exception)
    def failed(error: Exception) -> Response:
        return answer(*explain(error, request.method, request.path))

    @app.errorhandler(HTTPException)
    def http(error: HTTPException) -> Response:
        status = error.code or 500
        code = CODES.get(status, error.name.lower().replace(" ", "_"))
        known = request.url_rule is not None or status != 404
        message = (error.description or error.name) if known else f"{request.path} is no route of this API"
        if isinstance(error, MethodNotAllowed):
            able = ", ".join(sorted(set(error.valid_methods or ()) - {"HEAD", "OPTIONS"}))
            message = f"{request.method} can't be asked of {request.path}: expected {able}"
        response = answer(status, code, message)
        for name, value in error.get_headers():
            if name != "Content-Type":
                response.headers[name] = value
        return response
