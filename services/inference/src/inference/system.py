"""GET /v1/system: who works, what waits, and how full the volume is."""

import shutil
from datetime import datetime, timezone
from typing import Any

from flask import Blueprint, Response, jsonify
from redis import RedisError

from inference.context import Api, api
from inference.jobs import recent
from shared.at_work import has_keeper, workers_of
from shared.disk import free
from shared.jobs import SERVICES
from shared.scrub import report_of

bp = Blueprint("system", __name__)


@bp.get("/v1/system")
def get() -> Response:
    return jsonify(system(api()))


def system(context: Api) -> dict[str, Any]:
    """{redis, keeper, queues: {service: {queued, oldest_s, workers}}, disk: {free, total}, scrub, trouble}.

    trouble: a sentence on each thing that keeps jobs from running. Where Redis does not answer nothing is known of
    keeper and workers: they are None. oldest_s: seconds since the job was accepted that waits longest. scrub: what the
    last check of every file found.
    """
    settings, queues, trouble = context.settings, _queued(context), []
    redis, keeper = True, None
    try:
        keeper = has_keeper(context.redis)
        for service, queue in queues.items():
            queue["workers"] = workers_of(context.redis, service, settings.worker_ttl_s)
            if not queue["workers"]:
                trouble.append(f"no {service} worker is there")
        if not keeper:
            trouble.append("no keeper is there")
    except RedisError:
        redis = False
        trouble = ["the queue does not answer"]
    room = free(settings.artifacts)
    if not room:
        trouble.append("the volume is full")
    scrub = report_of(settings.artifacts)
    trouble += [f"{found['target']} is damaged: {found['reason']}" for found in (scrub or {}).get("damaged", [])]
    disk = {"free": room, "total": shutil.disk_usage(settings.artifacts).total}
    return {"redis": redis, "keeper": keeper, "queues": queues, "disk": disk, "scrub": scrub,
            "trouble": trouble}


def _queued(context: Api) -> dict[str, dict[str, Any]]:
    queues: dict[str, dict[str, Any]] = {s: {"queued": 0, "oldest_s": None, "workers": None} for s in SERVICES}
    now = datetime.now(timezone.utc)
    for request in recent(context.ledger):  # the latest first
        if context.ledger.state(request.id) == "queued":
            queue = queues[request.job.SERVICE]
            queue["queued"] += 1
            queue["oldest_s"] = round((now - datetime.fromisoformat(request.accepted_at)).total_seconds(), 1)
    return queues
