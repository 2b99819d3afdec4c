"""/v1/pipelines: a dataset in, a served model out, in one request."""

from typing import Any

from flask import Blueprint, Response, jsonify, request

from inference.body import read_json
from inference.context import api
from inference.jobs import limit_of, recent
from inference.submit import submit_pipeline
from shared.errors import Conflict, NotFound
from shared.jobs import check_id
from shared.ledger import Ledger, Request
from shared.queue import nudge

bp = Blueprint("pipelines", __name__)


@bp.post("/v1/pipelines")
def post() -> tuple[Response, int]:
    context = api()
    pipeline = submit_pipeline(context.ledger, context.settings.artifacts, read_json(context.intake),
                               request.headers.get("Idempotency-Key", ""), request.headers.get("traceparent", ""))
    jobs = {stage: accepted.id for stage, accepted in pipeline.jobs.items()}
    name = pipeline.jobs["train"].job.name
    links = {"pipeline": f"/v1/pipelines/{pipeline.id}", "jobs": {stage: f"/v1/jobs/{i}" for stage, i in jobs.items()},
             "dataset": f"/v1/datasets/{pipeline.dataset_id}", "card": f"/v1/cards/{pipeline.model_id}",
             "predict": f"/v1/models/{name}/predict"}
    body = {"pipeline": pipeline.id, "name": name, "jobs": jobs, "dataset_id": pipeline.dataset_id,
            "model_id": pipeline.model_id, "links": links}
    return jsonify(body), 202 if pipeline.new else 200


@bp.get("/v1/pipelines")
def index() -> Response:
    ledger = api().ledger
    groups: dict[str, list[Request]] = {}
    for accepted in recent(ledger):
        if accepted.pipeline:
            groups.setdefault(accepted.pipeline, []).append(accepted)
    return jsonify(pipelines=[view(ledger, i, group) for i, group in list(groups.items())[:limit_of()]])


@bp.get("/v1/pipelines/<pipeline_id>")
def get(pipeline_id: str) -> Response:
    ledger = api().ledger
    return jsonify(view(ledger, pipeline_id, _group(ledger, pipeline_id)))


@bp.post("/v1/pipelines/<pipeline_id>/cancel")
def cancel(pipeline_id: str) -> tuple[Response, int]:
    """Ask every job of it that has not ended to end."""
    ledger = api().ledger
    group = _group(ledger, pipeline_id)
    still = [accepted for accepted in group if ledger.ended(accepted.id) is None]
    if not still:
        raise Conflict(f"every job of pipeline {pipeline_id} has ended already", "already_ended")
    for accepted in still:
        ledger.ask_cancel(accepted.id)
    nudge(ledger.redis)
    return jsonify(view(ledger, pipeline_id, group)), 202


def _group(ledger: Ledger, pipeline_id: str) -> list[Request]:
    """Its jobs, the latest first. Raises NotFound."""
    group = [accepted for accepted in recent(ledger) if accepted.pipeline == check_id(pipeline_id, "pipeline id")]
    if not group:
        raise NotFound(f"pipeline {pipeline_id} does not exist")
    return group


def view(ledger: Ledger, pipeline_id: str, group: list[Request]) -> dict[str, Any]:
    """A pipeline as its jobs stand: {pipeline, name, state, accepted_at, jobs: {stage: job}}; of a stage that was tried
    again the latest.
    """
    jobs = {accepted.kind: ledger.view(accepted.id) for accepted in reversed(group)}
    return {"pipeline": pipeline_id, "name": group[0].job.name, "state": overall([j["state"] for j in jobs.values()]),
            "accepted_at": min(j["accepted_at"] for j in jobs.values()), "jobs": jobs}


def overall(states: list[str]) -> str:
    """One state for several jobs: the first that failed or was cancelled decides, success is everybody's."""
    for state in ("failed", "cancelled"):
        if state in states:
            return state
    if set(states) == {"succeeded"}:
        return "succeeded"
    return "running" if {"running", "succeeded"} & set(states) else "queued"
