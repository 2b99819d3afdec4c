"""The factory: settings in, a Flask app out. granian calls `serve`."""

import ctypes
import logging
import signal
import sys
from functools import partial
from urllib.parse import urlsplit

from flask import Flask, Response, request

from inference import (
    bundle,
    catalogue,
    deletion,
    errors,
    events,
    examples,
    health,
    jobs,
    openapi,
    page,
    pipelines,
    predict,
    retry,
    system,
    uploads,
)
from inference.body import Intake
from inference.closing import notice_signals
from inference.context import Api, api
from inference.fast import FastPath
from inference.front import Front, behind
from inference.healing import queue_rebuild
from inference.hosts import is_known
from inference.latency import tell
from inference.loaded import LoadedModels
from inference.metrics import Jobs, Meters
from inference.patience import impatient
from inference.peers import Peers
from inference.shadow import Shadow
from inference.statistics import Statistics
from inference.traces import trace
from inference.v2 import routes as v2
from inference.v2.gpu_metrics import GpuMetrics
from inference.v2.shared_memory import Regions
from inference.v2.statistics import ModelMetrics
from shared import gpu, tracing
from shared.errors import Refused
from shared.ledger import Ledger
from shared.settings import Settings, load, threads

log = logging.getLogger("lanner.api")
PAGE_POLICY = "default-src 'self'; img-src 'self' blob:; object-src 'none'; base-uri 'none'; frame-ancestors 'none'"
SAFE_HEADERS = {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}
METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH")
PR_SET_PDEATHSIG = 1  # <sys/prctl.h>
SWITCH_S = 0.001  # after which Python code of another thread, one that loads, lets the one that answers go on


def create_app(settings: Settings, peers: Peers | None = None) -> Flask:
    """The API. It starts following the aliases; `app.extensions["lanner"].loaded.close()` ends that.

    peers: its other processes, if there are any.
    """
    app = Flask(__name__)
    app.json.sort_keys = False  # type: ignore[attr-defined]
    app.url_map.merge_slashes = False  # a path is a route or it is not: no redirects
    errors.register(app)
    # Before the watcher begins: on CPython 3.11 two threads in ast.parse at once may fail (gh-106905). Werkzeug
    # makes its routes with it, and numpy reads the header of a golden batch with it.
    for part in (bundle, catalogue, deletion, events, examples, health, jobs, openapi, page, pipelines, predict,
                 retry, system, uploads, v2):
        app.register_blueprint(part.bp)
    app.before_request(_refuse_other_sites)
    app.before_request(_refuse_odd_queries)
    app.after_request(_safe_headers)
    app.after_request(_count)
    meters = Meters()
    redis = impatient(settings)
    ledger = Ledger(settings.artifacts, redis)
    meters.host.register(Jobs(ledger, settings))
    rebuild = partial(queue_rebuild, ledger) if settings.device == "gpu" else None
    loaded = LoadedModels(settings.artifacts, meters, threads(settings), settings.refresh_s, rebuild, settings.device,
                          settings.loaded_mib << 20, settings.http_processes)
    intake = Intake(memory=8 * settings.request_limit_mib << 20)
    statistics = Statistics()
    meters.registry.register(ModelMetrics(statistics))
    meters.host.register(GpuMetrics())
    app.extensions["lanner"] = context = Api(settings, redis, ledger, loaded, meters, intake, statistics,
                                   Regions(settings.system_shared_memory == "on", settings.request_limit_mib << 20),
                                   Shadow(loaded, meters, settings.shadow_share), peers or Peers())
    context.peers.serve(context.actions())
    if settings.serving_p99_ms:
        tell(statistics, impatient(settings), settings.device)
    if tracer := tracing.start(settings, "inference"):
        trace(statistics, tracer)
    app.wsgi_app = FastPath(app, {**SAFE_HEADERS, "Content-Security-Policy": PAGE_POLICY})  # type: ignore[method-assign]
    return app


def serve() -> Flask:
    """In granian's worker process: listen, and end when the process that started it ends, whatever ended that."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    notice_signals()
    sys.setswitchinterval(SWITCH_S)
    settings = load()
    logging.basicConfig(level=settings.log_level, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    several = settings.http_processes > 1
    if settings.device == "gpu":
        log.info("predictions run on %s", gpu.share(behind().parent, settings.http_processes))
    app = create_app(settings, Peers(behind().parent if several else None))
    assert isinstance(app.wsgi_app, FastPath)
    Front(app.wsgi_app, behind()).start(settings.host, settings.port, several)
    return app


def _refuse_other_sites() -> Response | None:
    """A page of another site may not use a browser that can reach this API.

    Browsers say where a page is from by Sec-Fetch-Site; over plain HTTP to another host by Origin alone.
    """
    host = request.environ.get("HTTP_HOST", "")  # as it came: Werkzeug takes an odd one for none
    if not is_known(host, api().settings.allowed_hosts):
        return errors.answer(403, "unknown_host", f"the API is not known as {host[:200]}: ask for it by an address, or "
                                                  "list the name in ALLOWED_HOSTS")
    site, origin = request.headers.get("Sec-Fetch-Site"), request.headers.get("Origin")
    foreign = site not in ("same-origin", "none") if site else origin and urlsplit(origin).netloc != request.host
    if foreign and request.method not in ("GET", "HEAD", "OPTIONS"):
        return errors.answer(403, "cross_site", "requests from pages of other sites are refused; a proxy before this "
                                                "API must hand on the Host that it was asked for")
    return None


def _refuse_odd_queries() -> None:
    """A parameter that nobody reads is a mistake that would go unseen. `predict` looks at its own."""
    rule = request.url_rule
    if not request.args or rule is None or not rule.rule.startswith("/v1/") or rule.rule == predict.RULE:
        return
    method = "get" if request.method == "HEAD" else request.method.lower()
    known = openapi.QUERY.get((method, openapi.path_of(rule.rule)), ())
    if odd := [name for name in request.args if name not in known]:
        expected = f"expected {', '.join(known)}" if known else "it takes none"
        raise Refused(f"{request.method} {request.path} has no query parameter {odd[0][:100]!r}: {expected}",
                      "bad_request")


def _safe_headers(response: Response) -> Response:
    response.headers.update(SAFE_HEADERS)
    response.headers.setdefault("Content-Security-Policy", PAGE_POLICY)
    return response


def _count(response: Response) -> Response:
    route = request.url_rule.rule if request.url_rule else "none"
    method = request.method if request.method in METHODS else "other"
    api().meters.answered(method, route, response.status_code)
    return response
