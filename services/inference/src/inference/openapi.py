"""GET /openapi.json: the routes for tools. A test holds the table to the app's own routes."""

import re
from typing import Any

from flask import Blueprint, Response, jsonify

from inference.schemas import body_of

bp = Blueprint("openapi", __name__)

QUERY = {
    ("get", "/v1/jobs"): ("state", "kind", "limit"), ("get", "/v1/pipelines"): ("limit",),
    ("get", "/v1/jobs/{job_id}/events"): ("format", "after"), ("get", "/v1/jobs/{job_id}/log"): ("attempt",),
    ("put", "/v1/uploads/{upload_id}"): ("filename",),
    ("post", "/v1/models/{name}/predict"): ("alias", "version", "variant", "top_k"),
}
KEY = ("Idempotency-Key",)
HEADERS = {
    ("post", "/v1/jobs"): KEY, ("post", "/v1/pipelines"): KEY,
    ("put", "/v1/uploads/{upload_id}"): ("X-Content-SHA256", "Content-Digest"),
    **{("post", f"/v2/models/{{model}}{version}/infer"): ("Inference-Header-Content-Length",)
       for version in ("", "/versions/{version}")},
}
AGAIN = {("post", "/v1/jobs"), ("post", "/v1/jobs/{job_id}/retry"), ("post", "/v1/pipelines"),
         ("put", "/v1/uploads/{upload_id}")}  # 200: it stands already
JSON = "application/json"
IMAGES = ("image/jpeg", "image/png", "image/webp", "application/octet-stream", "multipart/form-data", JSON)
# The Open Inference Protocol: clients that speak it need no description. A model is NAME, or NAME@ALIAS.
V2 = (
    ("get", "/v2", "The server's name and its extensions", 200, JSON, ()),
    ("get", "/v2/health/live", "Whether the process answers", 200, JSON, ()),
    ("get", "/v2/health/ready", "Whether a model answers", 200, JSON, ()),
    ("get", "/v2/models/stats", "Statistics of every model that was asked", 200, JSON, ()),
    *((method, f"/v2/models/{{model}}{version}{path}", summary, 200, JSON, bodies)
      for version in ("", "/versions/{version}") for method, path, summary, bodies in (
          ("get", "", "Inputs, outputs, versions", ()),
          ("get", "/ready", "Whether it answers without being loaded first", ()),
          ("get", "/config", "Its configuration, as Triton writes it", ()),
          ("get", "/stats", "Its statistics", ()),
          ("post", "/infer", "Label images", (JSON, "application/octet-stream")))),
    ("post", "/v2/repository/index", "Every model, and whether it answers", 200, JSON, (JSON,)),
    ("post", "/v2/repository/models/{model}/load", "Let a name answer again", 200, JSON, (JSON,)),
    ("post", "/v2/repository/models/{model}/unload", "Give a name's memory back", 200, JSON, (JSON,)),
    ("get", "/v2/systemsharedmemory/status", "Every region of shared memory", 200, JSON, ()),
    ("get", "/v2/systemsharedmemory/region/{region}/status", "One region", 200, JSON, ()),
    ("post", "/v2/systemsharedmemory/region/{region}/register", "Register a region", 200, JSON, (JSON,)),
    ("post", "/v2/systemsharedmemory/region/{region}/unregister", "Forget a region", 200, JSON, ()),
    ("post", "/v2/systemsharedmemory/unregister", "Forget every region", 200, JSON, ()),
)
# method, path, what it does, status on success, what it answers, forms of its body
ROUTES = (
    ("get", "/", "The page for people", 200, "text/html", ()),
    ("get", "/openapi.json", "This description", 200, JSON, ()),
    ("get", "/livez", "Whether the process answers", 200, JSON, ()),
    ("get", "/readyz", "Which models answer; 503 while there is none", 200, JSON, ()),
    ("get", "/metrics", "Measurements for Prometheus", 200, "text/plain", ()),
    ("get", "/v1/system", "Who works, what waits, and how full the volume is", 200, JSON, ()),
    ("get", "/v1/uploads", "Every upload", 200, JSON, ()),
    ("put", "/v1/uploads/{upload_id}", "Send a zip or tar of images", 201, JSON, ("application/octet-stream",)),
    ("get", "/v1/uploads/{upload_id}", "Size and SHA-256 of an upload", 200, JSON, ()),
    ("delete", "/v1/uploads/{upload_id}", "Delete an upload", 204, "", ()),
    ("post", "/v1/pipelines", "Data to endpoint: preprocess, train, optimize", 202, JSON, (JSON,)),
    ("get", "/v1/pipelines", "The latest pipelines", 200, JSON, ()),
    ("get", "/v1/pipelines/{pipeline_id}", "A pipeline with its jobs", 200, JSON, ()),
    ("post", "/v1/jobs", "Submit one stage", 202, JSON, (JSON,)),
    ("get", "/v1/jobs", "The latest jobs", 200, JSON, ()),
    ("get", "/v1/jobs/{job_id}", "A job: state, progress, attempts, result", 200, JSON, ()),
    ("get", "/v1/jobs/{job_id}/events", "What happened to a job, live", 200, "text/event-stream", ()),
    ("get", "/v1/jobs/{job_id}/log", "What an attempt at it logged, the last one by default", 200, "text/plain", ()),
    ("post", "/v1/jobs/{job_id}/cancel", "Ask a job to end", 202, JSON, ()),
    ("post", "/v1/jobs/{job_id}/retry", "Try again what failed, and what failed with it", 202, JSON, ()),
    ("post", "/v1/pipelines/{pipeline_id}/cancel", "Ask its jobs to end", 202, JSON, ()),
    ("get", "/v1/datasets", "Every dataset", 200, JSON, ()),
    ("get", "/v1/datasets/{dataset_id}", "A dataset: manifest and statistics", 200, JSON, ()),
    ("get", "/v1/datasets/{dataset_id}/images/{split}/{number}", "One image of a dataset", 200, "image/png", ()),
    ("delete", "/v1/datasets/{dataset_id}", "Delete a dataset", 204, "", ()),
    ("get", "/v1/models", "Every name with its versions and aliases", 200, JSON, ()),
    ("get", "/v1/models/{name}", "A name: versions, variants, aliases", 200, JSON, ()),
    ("get", "/v1/models/{name}/versions/{number}", "One version", 200, JSON, ()),
    ("get", "/v1/models/{name}/versions/{number}/variants/{variant}.zip", "A variant with what runs it elsewhere", 200,
     "application/zip", ()),
    ("get", "/v1/models/{name}/versions/{number}/model.keras", "What was trained, as Keras wrote it", 200,
     "application/octet-stream", ()),
    ("delete", "/v1/models/{name}/versions/{number}", "Delete a version with its model and variants", 204, "", ()),
    ("delete", "/v1/models/{name}/aliases/{alias}", "Delete an alias", 204, "", ()),
    ("put", "/v1/models/{name}/aliases/{alias}", "Point an alias at a variant of a version", 200, JSON, (JSON,)),
    ("post", "/v1/models/{name}/aliases/{alias}/rollback", "Point an alias back", 200, JSON, ()),
    ("get", "/v1/models/{name}/shadow", "How its candidate answers live images beside production", 200, JSON, ()),
    ("post", "/v1/models/{name}/predict", "Label images", 200, JSON, IMAGES),
    ("get", "/v1/predictions", "Every set of predictions", 200, JSON, ()),
    ("get", "/v1/predictions/{predictions_id}", "A set of predictions: manifest and summary", 200, JSON, ()),
    ("get", "/v1/predictions/{predictions_id}/predictions.parquet", "Its table", 200, "application/vnd.apache.parquet",
     ()),
    ("delete", "/v1/predictions/{predictions_id}", "Delete a set of predictions", 204, "", ()),
    ("get", "/v1/cards/{model_id}", "The release card, as JSON or HTML", 200, JSON, ()),
    *V2,
)


def path_of(rule: str) -> str:
    """A route of Flask as OpenAPI writes it."""
    return re.sub(r"<(?:\w+:)?(\w+)>", r"{\1}", rule)


def describe() -> dict[str, Any]:
    """The API as OpenAPI 3.1."""
    coded = {"type": "object", "required": ["code", "message"],
             "properties": {"code": {"type": "string"}, "message": {"type": "string"}}}
    paths: dict[str, Any] = {}
    for method, path, summary, status, answer, bodies in ROUTES:
        inside = [part.split("}")[0] for part in path.split("{")[1:]]
        asked = QUERY.get((method, path), ())
        integers = ("number", "version", "top_k", "limit")
        parameters = [{"name": n, "in": where, "required": where == "path",
                       "schema": {"type": "integer" if n in integers else "string"}}
                      for where, names in (("path", inside), ("query", asked),
                                           ("header", HEADERS.get((method, path), ()))) for n in names]
        told: dict[str, Any] = {"description": summary} | ({"content": {answer: {}}} if answer else {})
        error = {"type": "object", "properties": {
            "error": {"type": "string"} if path.startswith("/v2") else coded}}
        failed = {"description": "what went wrong, in words", "content": {JSON: {"schema": error}}}
        again = {"200": {**told, "description": "It stands already"}} if (method, path) in AGAIN else {}
        paths.setdefault(path, {})[method] = {
            "summary": summary, "parameters": parameters, "responses": {str(status): told, **again, "default": failed},
            **({"requestBody": {"content": {kind: _content(kind, method, path) for kind in bodies}}} if bodies else {})}
    return {"openapi": "3.1.0", "info": {"title": "Lanner", "version": "1"}, "paths": paths}


def _content(kind: str, method: str, path: str) -> dict[str, Any]:
    schema = body_of(method, path) if kind == JSON else {}
    return {"schema": schema} if schema else {}


@bp.get("/openapi.json")
def get() -> Response:
    return jsonify(describe())
