"""/v1/jobs: one stage, what became of it, its events, and its end on request."""

import logging
from itertools import islice
from typing import Any

from flask import Blueprint, Response, jsonify, request

from inference.body import read_json
from inference.context import api
from inference.submit import submit_job
from shared.errors import Conflict, NotFound, Refused
from shared.jobs import KINDS
from shared.ledger import TERMINAL, Ledger, Request
from shared.queue import nudge

bp = Blueprint("jobs", __name__)
log = logging.getLogger("lanner.api")
STATES = ("waiting", "queued", "running", *TERMINAL)


@bp.post("/v1/jobs")
def post() -> tuple[Response, int]:
    context = api()
    accepted, new = submit_job(context.ledger, context.settings.artifacts, read_json(context.intake),
                               request.headers.get("Idempotency-Key", ""), request.headers.get("traceparent", ""))
    links = {"job": f"/v1/jobs/{accepted.id}", "events": f"/v1/jobs/{accepted.id}/events"}
    return jsonify({**context.ledger.view(accepted.id), "links": links}), 202 if new else 200


@bp.get("/v1/jobs")
def index() -> Response:
    ledger, state, kind = api().ledger, request.args.get("state"), request.args.get("kind")
    if state not in (None, *STATES) or kind not in (None, *KINDS):
        raise Refused(f"state is one of {', '.join(STATES)}; kind is one of {', '.join(KINDS)}", "bad_request")
    found = (accepted.id for accepted in recent(ledger)
             if (kind is None or accepted.kind == kind) and (state is None or ledger.state(accepted.id) == state))
    return jsonify(jobs=[ledger.view(job_id) for job_id in islice(found, limit_of())])


@bp.get("/v1/jobs/<job_id>")
def get(job_id: str) -> Response:
    return jsonify(api().ledger.view(job_id))


@bp.get("/v1/jobs/<job_id>/log")
def log_of(job_id: str) -> Response:
    """What an attempt logged, its last one unless `attempt` says which."""
    ledger = api().ledger
    ledger.request(job_id)
    text, attempts = request.args.get("attempt", ""), ledger.attempts(job_id)
    if text and not (text.isascii() and text.isdigit() and len(text) <= 6):
        raise Refused(f"attempt is {text!r}, expected a number", "bad_request")
    number = int(text) if text else len(attempts)
    path = ledger.log_of(job_id, number)
    if not path.is_file():
        raise NotFound(f"attempt {number} of job {job_id} has no log: it has {len(attempts)} attempts")
    return Response(path.read_bytes(), mimetype="text/plain")


@bp.post("/v1/jobs/<job_id>/cancel")
def cancel(job_id: str) -> tuple[Response, int]:
    ledger = api().ledger
    ledger.request(job_id)
    end: dict[str, Any] | None = ledger.ended(job_id)
    if end:
        raise Conflict(f"job {job_id} has {end['state']} already", "already_ended")
    ledger.ask_cancel(job_id)
    nudge(ledger.redis)
    return jsonify(ledger.view(job_id)), 202


def recent(ledger: Ledger) -> list[Request]:
    """Every accepted job whose record can be read, the latest first."""
    return sorted(ledger.requests(), key=lambda r: r.accepted_at, reverse=True)


def limit_of() -> int:
    """?limit= of a list, 50 by default. Raises Refused."""
    text = request.args.get("limit", "50")
    if not (text.isascii() and text.isdigit() and 1 <= len(text) <= 3 and 1 <= int(text) <= 500):
        raise Refused(f"limit is {text!r}, expected 1 to 500", "bad_request")
    return int(text)
