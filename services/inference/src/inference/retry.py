"""What failed or was cancelled, once more: the job with the same fields, and those that failed with it."""

import hashlib
from pathlib import Path

from flask import Blueprint, Response, jsonify, request

from inference.context import api
from inference.jobs import recent
from inference.submit import deliver_first, maker, told
from shared.errors import Conflict
from shared.jobs import Job, OptimizeJob, TrainJob, TuneJob, new_id
from shared.ledger import Ledger, Request

bp = Blueprint("retry", __name__)


@bp.post("/v1/jobs/<job_id>/retry")
def post(job_id: str) -> tuple[Response, int]:
    context = api()
    jobs, new = retry(context.ledger, context.settings.artifacts, job_id, request.headers.get("traceparent", ""))
    body = {**context.ledger.view(jobs[0].id), "jobs": {accepted.kind: accepted.id for accepted in jobs}}
    return jsonify(body), 202 if new else 200


def retry(ledger: Ledger, root: Path, job_id: str, traceparent: str = "") -> tuple[list[Request], bool]:
    """Accept the job again, in its pipeline, and the jobs that did not run since it had failed; that job first.

    What they make keeps its id. Where it was accepted again already, and that has not ended, it is that one.

    Raises:
        NotFound: there is no such job, or what it reads is not there and no job that still runs makes it.
        Conflict: it has not ended, or it, or the same job later, has succeeded.
        RedisError: the queue does not answer; nothing was accepted.
    """
    old, end = ledger.request(job_id), ledger.ended(job_id)
    if end is None:
        raise Conflict(f"job {job_id} has not ended: cancel it first", "still_open")
    known = sorted(recent(ledger), key=lambda r: r.accepted_at)
    alike = [other for other in known if other.job == old.job and other.accepted_at >= old.accepted_at]
    for other in alike:
        over = ledger.ended(other.id)
        if over is None:
            return [other], False
        if over["state"] == "succeeded":
            raise Conflict(f"job {other.id} has succeeded: there is nothing to try again", "already_ended")
    parent = _parent(ledger, root, old.job)
    ledger.redis.ping()
    accepted = {job_id: _again(ledger, old, len(alike), parent, traceparent)}
    for child in known:
        over = ledger.ended(child.id)
        if child.parent in accepted and (over is None or over["code"] == "cancelled"
                                         or over["code"].startswith("parent_")):
            accepted[child.id] = _again(ledger, child, len(alike), accepted[child.parent].id, traceparent)
    deliver_first(ledger, accepted[job_id])
    return list(accepted.values()), True


def _parent(ledger: Ledger, root: Path, job: Job) -> str:
    """The job whose success it waits for."""
    match job:
        case TrainJob() | TuneJob():
            return maker(ledger, root, "datasets", job.dataset_id, {})
        case OptimizeJob():
            return maker(ledger, root, "models", job.model_id, {})
        case _:
            return ""


def _again(ledger: Ledger, old: Request, number: int, parent: str, traceparent: str) -> Request:
    """Its id follows from the old one's and the number of the try: of two requests at once both mean one job."""
    fresh = hashlib.sha256(f"{old.id} {number}".encode()).hexdigest()[:8]
    job_id = f"{new_id('j').rsplit('-', 1)[0]}-{fresh}"
    return ledger.accept(job_id, old.job, parent=parent, pipeline=old.pipeline, traceparent=told(traceparent))[0]
