"""Most requests, before Flask sees them: images to /v1, a tensor to /v2. What is odd in any way is Flask's.

Both go through the same functions and get the same answers. What is saved is Flask's own work on a request, which takes
several times as long as a small model.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from flask import Flask
from werkzeug.http import parse_options_header

from inference import errors, predict
from inference.body import read_declared
from inference.codec import FEW, FORM, images_of, is_of_images, is_one_image
from inference.context import Api
from inference.hosts import is_known
from inference.reply import STATUS, Headers
from inference.scores import LIGHT, PRODUCTION, model_called
from inference.steps import WRITE, Steps, finish
from inference.v2 import infer
from shared.errors import Unavailable

NAME = "[a-z0-9][a-z0-9_-]{0,62}"
PREDICT = re.compile(f"/v1/models/({NAME})/predict")
INFER = re.compile(f"/v2/models/({NAME}(?:@{NAME})?)(?:/versions/([0-9]{{1,9}}))?/infer")
NUMBER = re.compile("[1-9][0-9]{0,7}")
QUERY = {"alias": re.compile(NAME), "variant": re.compile(NAME), "version": NUMBER, "top_k": NUMBER}
LENGTH = re.compile("[1-9][0-9]{0,11}")
UNUSUAL = frozenset(("HTTP_CONTENT_ENCODING", "HTTP_TRANSFER_ENCODING", "HTTP_SEC_FETCH_SITE", "HTTP_ORIGIN"))
JSON, BINARY = "application/json", "application/octet-stream"
IS_JSON: Headers = [("Content-Type", JSON)]
LONG_TYPE = 256  # characters of a Content-Type; a longer one takes long to take apart, and is Flask's
ALIGNED = 64  # bytes: a processor's line
Start = Callable[[str, Headers], Any]


@dataclass(frozen=True)
class Route:
    """What answers a request. size: of its body. steps: what the body goes through, to the answer and its headers.

    is_full: whether any request would be turned away now, whatever its body. room: where the body had best be read to,
    JSON with the bytes of a tensor behind it. name, asked: of the prediction of one image by what an alias points at,
    None where the request is another. ends: the connection does, behind the answer.
    """

    size: int
    path: str
    rule: str
    steps: Callable[[bytes | memoryview], Steps[tuple[bytes, Headers]]]
    is_full: Callable[[], bool] = lambda: False
    room: Callable[[], memoryview] | None = None
    name: str = ""
    asked: "Asked | None" = None
    ends: bool = False


@dataclass(frozen=True)
class Asked:
    """What a query of predict says."""

    alias: str = PRODUCTION
    top_k: int = predict.TOP_K
    version: int | None = None
    variant: str | None = None

    @property
    def is_pointed(self) -> bool:
        """Whether what the alias points at answers."""
        return self.version is None and self.variant is None


PLAIN = Asked()


class FastPath:
    """A WSGI application around that of Flask."""

    def __init__(self, app: Flask, headers: Mapping[str, str]):
        """headers: of every answer."""
        self._flask, self._extensions = app.wsgi_app, app.extensions
        self.headers = tuple(headers.items())

    @property
    def api(self) -> Api:
        api: Api = self._extensions["lanner"]
        return api

    def __call__(self, environ: dict[str, Any], start: Start) -> Iterable[bytes]:
        route = self.route(environ)
        if route is None:
            return self._flask(environ, start)
        try:
            body, headers = finish(route.steps(read_declared(self.api.intake, environ["wsgi.input"], route.size)))
            status = 200
        except Exception as e:  # as Flask: whatever happens is an answer
            status, body, headers = errors.form(route.path, *errors.explain(e, "POST", route.path))
        self.api.meters.answered("POST", route.rule, status)
        start(STATUS[status], [*headers, ("Content-Length", str(len(body))), *self.headers])
        return [body]

    def route(self, environ: Mapping[str, Any]) -> Route | None:
        """What answers a request without Flask; None where Flask must."""
        if not is_known(environ.get("HTTP_HOST", ""), self.api.settings.allowed_hosts):
            return None
        path, size, trace = environ["PATH_INFO"], self._size(environ), environ.get("HTTP_TRACEPARENT", "")
        if size and (found := PREDICT.fullmatch(path)):
            told, asked = environ.get("CONTENT_TYPE", ""), _asked(environ.get("QUERY_STRING", ""))
            if asked is None or len(told) > LONG_TYPE:
                return None
            kind, params = parse_options_header(told)
            if not is_of_images(kind := kind.lower()):
                return None
            route = Route(size, path, predict.RULE, partial(self._predict, found[1], asked, trace, kind, params))
            if not asked.is_pointed:
                return route
            return replace(route, is_full=partial(self._is_full, found[1], asked), name=found[1],
                           asked=asked if is_one_image(kind) and asked.top_k <= FEW else None)
        if size and (found := INFER.fullmatch(path)):
            version = int(found[2]) if found[2] else None
            header = environ.get("HTTP_INFERENCE_HEADER_CONTENT_LENGTH")
            return Route(size, path, infer.RULE if version is None else infer.VERSION_RULE,
                         partial(self._infer, found[1], version, header, environ.get("HTTP_ACCEPT_ENCODING", ""),
                                 trace), room=partial(self._room, found[1], size, header) if header else None)
        return None

    def _size(self, environ: Mapping[str, Any]) -> int:
        """Bytes of the body of a POST without anything that Flask must look at; else 0."""
        length = environ.get("CONTENT_LENGTH", "")
        if environ["REQUEST_METHOD"] != "POST" or not LENGTH.fullmatch(length) or not UNUSUAL.isdisjoint(environ):
            return 0
        return size if (size := int(length)) <= self.api.settings.request_limit_mib << 20 else 0

    def _is_full(self, name: str, asked: Asked) -> bool:
        served, queue_ms = self.api.loaded.pointed(name, asked.alias), self.api.settings.queue_ms
        if served is None or not queue_ms or not served.loaded.predictor.is_full(queue_ms / 1000):
            return False
        self._refused(name, asked)
        return True

    def _refused(self, name: str, asked: Asked) -> None:
        if served := self.api.loaded.pointed(name, asked.alias):
            self.api.statistics.refused((model_called(name, asked.alias), served.version))

    def _room(self, model: str, size: int, header: str) -> memoryview:
        """For a whole body; the tensor lies at a multiple of ALIGNED."""
        before = -int(header) % ALIGNED if header.isdecimal() and len(header) < 10 else 0
        served = self.api.loaded.pointed(*infer.place(model))
        whole = before + size
        found = served.loaded.predictor.room(whole) if served else np.empty(whole, np.uint8).data
        return found[before:]

    def _predict(self, name: str, asked: Asked, traceparent: str, kind: str, params: Mapping[str, str],
                 body: bytes | memoryview) -> Steps[tuple[bytes, Headers]]:
        if kind == FORM or (len(body) > LIGHT and not is_one_image(kind)):  # to read that takes long, too
            try:
                yield None
            except Unavailable:
                self._refused(name, asked)
                raise
        images = images_of(kind, params, bytes(body))
        del body  # it may be large, and what waits from here on has the images
        with self.api.statistics.request(model_called(name, asked.alias), traceparent) as timing:
            return (yield from predict.label(self.api, timing, name, images, asked.alias, asked.version, asked.variant,
                                             asked.top_k)), IS_JSON

    def _infer(self, model: str, version: int | None, header: str | None, accepted: str, traceparent: str,
               body: bytes | memoryview) -> Steps[tuple[bytes, Headers]]:
        with self.api.statistics.request(model_called(*infer.place(model)), traceparent) as timing:
            answer, json_size = yield from infer.ask(self.api, timing, model, version, body, header)
        if accepted and len(answer) > LIGHT:
            yield WRITE  # compressing takes long, too
        answer, encoded = infer.compressed(answer, accepted)
        if json_size is None:
            return answer, [*IS_JSON, *encoded]
        return answer, [("Content-Type", BINARY), (infer.HEADER, str(json_size)), *encoded]


def _asked(query: str) -> Asked | None:
    """What a query asks for; None where it is odd in any way, which Flask then answers."""
    if not query:
        return PLAIN
    found: dict[str, str] = {}
    for name, _, value in (pair.partition("=") for pair in query.split("&")):
        if name in found or name not in QUERY or not QUERY[name].fullmatch(value):
            return None
        found[name] = value
    return Asked(found.get("alias", PRODUCTION), int(found.get("top_k", predict.TOP_K)),
                 int(found["version"]) if "version" in found else None, found.get("variant"))
