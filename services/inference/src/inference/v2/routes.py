"""/v2: the routes of the Open Inference Protocol. A model is NAME, which means its production, or NAME@ALIAS."""

import json
from dataclasses import asdict

from flask import Blueprint, Response, jsonify

from inference.body import JSON_LIMIT, read
from inference.context import api
from inference.loaded import Found
from inference.scores import model_called
from inference.statistics import Figures, added_up
from inference.v2 import repository
from inference.v2.infer import RULE, VERSION_RULE, infer, known, place
from inference.v2.messages import Object, count, field
from inference.v2.metadata import config, metadata
from inference.v2.shared_memory import Region
from inference.v2.statistics import model_stats
from shared import artifacts
from shared.errors import Refused
from shared.jobs import check_id

EXTENSIONS = ("binary_tensor_data", "classification", "model_configuration", "model_repository", "parameters",
              "statistics")

bp = Blueprint("v2", __name__, url_prefix="/v2")
bp.post(RULE.removeprefix("/v2"))(infer)
bp.post(VERSION_RULE.removeprefix("/v2"))(infer)


@bp.get("")
def server() -> Response:
    shared_memory = ["system_shared_memory"] if api().regions.allowed else []
    return jsonify(name="lanner", version="1", extensions=[*EXTENSIONS, *shared_memory])


@bp.get("/health/live")
def live() -> Response:
    return jsonify(live=True)


@bp.get("/health/ready")
def ready() -> tuple[Response, int]:
    """As /readyz, without asking Redis."""
    serving, _ = api().loaded.state()
    return jsonify(ready=bool(serving)), 200 if serving else 400


@bp.get("/models/<model>/ready")
@bp.get("/models/<model>/versions/<int:version>/ready")
def model_ready(model: str, version: int | None = None) -> tuple[Response, int]:
    found = api().loaded.is_ready(*place(model), version)
    return jsonify(name=model, ready=found), 200 if found else 400


@bp.get("/models/<model>")
@bp.get("/models/<model>/versions/<int:version>")
def model_metadata(model: str, version: int | None = None) -> Response:
    name, _ = place(model)
    found = _find(model, version)
    versions = [version] if version is not None else list(artifacts.versions(api().settings.artifacts, name))
    return jsonify(metadata(model, found, versions))


@bp.get("/models/<model>/config")
@bp.get("/models/<model>/versions/<int:version>/config")
def model_config(model: str, version: int | None = None) -> Response:
    return jsonify(config(model, _find(model, version)))


@bp.get("/models/stats")
@bp.get("/models/<model>/stats")
@bp.get("/models/<model>/versions/<int:version>/stats")
def stats(model: str | None = None, version: int | None = None) -> Response:
    """Of every model that was asked; of one, which has figures of zero until then."""
    context = api()
    asked = added_up([context.statistics.snapshot(), *context.peers.ask("figures")])
    if model is not None:
        called, found = model_called(*place(model)), _find(model, version)
        asked = {key: figures for key, figures in asked.items() if key[0] == called and version in (None, key[1])}
        asked.setdefault((called, found.version), Figures())
    return jsonify(model_stats=[model_stats(key, figures) for key, figures in sorted(asked.items())])


@bp.post("/repository/index")
def index() -> Response:
    context = api()
    entries = repository.index(context.settings.artifacts, context.loaded)
    ready_alone = field(_json(), "ready", bool, False)
    return jsonify([entry for entry in entries if not ready_alone or entry["state"] == "READY"])


@bp.post("/repository/models/<model>/load")
def load(model: str) -> Response:
    """Answers when the model does; it is loaded as it was published."""
    check_id(model, "model name")
    if field(_json(), "parameters", dict, {}):
        raise Refused("a model is loaded as it was published: load takes no parameters", "malformed")
    with known(model):
        api().everywhere("load", model)
    return jsonify({})


@bp.post("/repository/models/<model>/unload")
def unload(model: str) -> Response:
    """Answers when the model's memory is free. No model depends on another, so `unload_dependents` changes nothing."""
    check_id(model, "model name")
    field(field(_json(), "parameters", dict, {}), "unload_dependents", bool, False)
    with known(model):
        api().everywhere("unload", model)
    return jsonify({})


@bp.get("/systemsharedmemory/status")
@bp.get("/systemsharedmemory/region/<region>/status")
def region_status(region: str | None = None) -> Response:
    return jsonify([asdict(found) for found in api().regions.status(region)])


@bp.post("/systemsharedmemory/region/<region>/register")
def register_region(region: str) -> Response:
    body = _json()
    api().everywhere("register", Region(region, field(body, "key", str), count(body, "offset"),
                                        count(body, "byte_size")))
    return jsonify({})


@bp.post("/systemsharedmemory/unregister")
@bp.post("/systemsharedmemory/region/<region>/unregister")
def unregister_region(region: str | None = None) -> Response:
    api().everywhere("unregister", region)
    return jsonify({})


def _find(model: str, version: int | None) -> Found:
    with known(model, version):
        return api().loaded.find(*place(model), version)


def _json() -> Object:
    """The body as an object; an empty body is an empty one. Clients send it with any Content-Type, or none."""
    body = read(api().intake, JSON_LIMIT, inflate=True)
    try:
        value = json.loads(body or b"{}")
    except (ValueError, RecursionError) as e:
        raise Refused(f"failed to parse the request JSON buffer: {e}", "malformed") from None
    if not isinstance(value, dict):
        raise Refused("failed to parse the request JSON buffer: it is no object", "malformed")
    return value
