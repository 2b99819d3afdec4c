"""/v1/datasets, models, cards, predictions: what is published, as it is written there; and where aliases point."""

from pathlib import Path
from typing import Any

from flask import Blueprint, Response, jsonify, request, send_file

from inference.body import read_json
from inference.context import api
from inference.errors import answer
from shared import artifacts
from shared.artifacts import MANIFEST, list_ids, open_artifact
from shared.artifacts import read_json as read_file
from shared.errors import Damaged, NotFound, Refused
from shared.jobs import check_id

bp = Blueprint("catalogue", __name__)
CARD_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; frame-ancestors 'none'"


def _root() -> Path:
    return api().settings.artifacts


@bp.get("/v1/datasets")
def datasets() -> Response:
    root = _root()
    return jsonify(datasets=[_summary(root, f"datasets/{i}") for i in list_ids(root, "datasets")])


@bp.get("/v1/datasets/<dataset_id>")
def dataset(dataset_id: str) -> Response:
    target = f"datasets/{check_id(dataset_id, 'dataset id')}"
    manifest = open_artifact(_root(), target, hashes=False)
    stats = _root() / target / "stats.json"
    return jsonify({**manifest, "stats": read_file(stats) if stats.exists() else None})


@bp.get("/v1/predictions")
def predictions() -> Response:
    root = _root()
    return jsonify(predictions=[_summary(root, f"predictions/{i}") for i in list_ids(root, "predictions")])


@bp.get("/v1/predictions/<predictions_id>")
def prediction(predictions_id: str) -> Response:
    target = f"predictions/{check_id(predictions_id, 'predictions id')}"
    return jsonify({**open_artifact(_root(), target, hashes=False), "table": f"/v1/{target}/predictions.parquet"})


@bp.get("/v1/predictions/<predictions_id>/predictions.parquet")
def predictions_table(predictions_id: str) -> Response:
    target = f"predictions/{check_id(predictions_id, 'predictions id')}"
    open_artifact(_root(), target, hashes=False)
    return send_file(_root() / target / "predictions.parquet", mimetype="application/vnd.apache.parquet",
                     as_attachment=True, download_name=f"{predictions_id}.parquet")


@bp.get("/v1/models")
def models() -> Response:
    root = _root()
    listed = [{"name": name, "versions": versions, "aliases": artifacts.aliases(root, name)}
              for name in artifacts.names(root) if (versions := artifacts.versions(root, name))]
    return jsonify(models=listed)


@bp.get("/v1/models/<name>")
def model(name: str) -> Response:
    root = _root()
    latest_first = sorted(_versions(root, name).items(), reverse=True)
    return jsonify(name=name, aliases=artifacts.aliases(root, name),
                   versions=[_version(root, number, model_id) for number, model_id in latest_first])


@bp.get("/v1/models/<name>/versions/<int:number>")
def version(name: str, number: int) -> Response:
    root = _root()
    versions = _versions(root, name)
    if number not in versions:
        raise NotFound(f"{name} has no version {number}: it has {sorted(versions)}")
    manifest = open_artifact(root, f"models/{versions[number]}", hashes=False)
    return jsonify({**_version(root, number, versions[number]), "manifest": manifest})


@bp.put("/v1/models/<name>/aliases/<alias>")
def move_alias(name: str, alias: str) -> Response:
    context = api()
    body = read_json(context.intake)
    number, variant = body.get("version"), body.get("variant")
    if type(number) is not int or not isinstance(variant, str) or len(body) != 2:
        raise Refused(f'the body is {str(body)[:200]}, expected {{"version": <number>, "variant": '
                      '"<format>-<precision>"}', "malformed")
    try:
        record = artifacts.promote(_root(), name, alias, number, variant, by="api")
    except Damaged as e:  # the client's choice meets a bad state, and another choice works
        return answer(409, e.code, f"{name}@{alias} stays where it is: {e}")
    context.loaded.wake()
    return jsonify({"name": name, "alias": alias, **record})


@bp.post("/v1/models/<name>/aliases/<alias>/rollback")
def roll_back(name: str, alias: str) -> Response:
    """The alias points at what it pointed at before."""
    try:
        record = artifacts.roll_back(_root(), name, alias, by="api")
    except Damaged as e:
        return answer(409, e.code, f"{name}@{alias} stays where it is: {e}")
    api().loaded.wake()
    return jsonify({"name": name, "alias": alias, **record})


@bp.get("/v1/models/<name>/shadow")
def shadow(name: str) -> Response:
    """How the candidate answers live images beside production."""
    _versions(_root(), name)
    return jsonify(api().shadow.report(name, api().peers.ask("shadow", name)))


@bp.get("/v1/cards/<model_id>")
def card(model_id: str) -> Response:
    model_id, _, form = model_id.partition(".")
    check_id(model_id, "model id")
    if form not in ("", "json", "html"):
        raise NotFound(f"a card is .json or .html, not .{form}")
    wanted = request.accept_mimetypes.best_match(["application/json", "text/html"])
    form = form or ("html" if wanted == "text/html" else "json")
    path = _root() / "cards" / f"{model_id}.{form}"
    if not path.is_file():
        raise NotFound(f"model {model_id} has no release card: an optimize job writes it")
    response = Response(path.read_bytes(), mimetype="text/html" if form == "html" else "application/json")
    response.headers["Content-Security-Policy"] = CARD_POLICY
    response.headers["Vary"] = "Accept"
    return response


def _versions(root: Path, name: str) -> dict[int, str]:
    versions = artifacts.versions(root, name)
    if not versions:
        raise NotFound(f"model {name} does not exist: GET /v1/models lists those that do")
    return versions


def _version(root: Path, number: int, model_id: str) -> dict[str, Any]:
    """A version with its Variants: {version, model_id, card, variants}."""
    variants = [{"variant": variant, **_summary(root, f"variants/{model_id}/{variant}"),
                 "digest": artifacts.manifest_digest(root, f"variants/{model_id}/{variant}")}
                for variant in sorted(list_ids(root, f"variants/{model_id}"))]
    return {"version": number, "model_id": model_id, "card": f"/v1/cards/{model_id}", "variants": variants}


def _summary(root: Path, target: str) -> dict[str, Any]:
    """A manifest for a list: its files as one size, without what only a reader of the files needs."""
    manifest = read_file(root / target / MANIFEST)
    files = manifest.pop("files", {})
    return {**manifest, "bytes": sum(entry["size"] for entry in files.values())}
