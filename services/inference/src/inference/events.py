"""/v1/jobs/<id>/events: what happened to a job, as Server-Sent Events until it ends, or as one JSON list."""

import json
import re
import threading
import time
from collections.abc import Iterator
from typing import Any

from flask import Blueprint, Response, jsonify, request

from inference import closing
from inference.context import api
from shared.errors import Refused, Unavailable
from shared.ledger import Ledger

bp = Blueprint("events", __name__)
STREAMS = 32  # each holds a thread; the other threads that granian has beyond its body slots stay free
LOOK_S, ALIVE_S = 0.3, 5.0  # a client that went away is noticed at the next thing told, so something is
_streams = threading.BoundedSemaphore(STREAMS)


@bp.get("/v1/jobs/<job_id>/events")
def get(job_id: str) -> Response:
    ledger = api().ledger
    ledger.request(job_id)
    after = request.headers.get("Last-Event-ID") or request.args.get("after") or "-"
    if not re.fullmatch(r"-|\d{1,20}-\d{1,20}", after):
        raise Refused(f"Last-Event-ID or after is {after[:100]!r}, expected the id of an event", "bad_request")
    if request.args.get("format") == "json":
        return jsonify(events=[{"id": i, **event} for i, event in ledger.events(job_id, after)])
    if not _streams.acquire(blocking=False):
        raise Unavailable(f"{STREAMS} event streams are open already: ask with ?format=json", "busy")
    response = Response(_follow(ledger, job_id, after), mimetype="text/event-stream")
    response.headers["Cache-Control"] = "no-store"
    response.call_on_close(_streams.release)
    return response


def _follow(ledger: Ledger, job_id: str, after: str) -> Iterator[str]:
    """Every event as a message, a comment while nothing happens, and `end` with the record's last word."""
    told = time.monotonic()
    yield ": events of the job\n\n"
    while True:
        end = ledger.ended(job_id)  # read before the events, so that those of the end are told before it
        for event_id, event in ledger.events(job_id, after):
            yield _message(event, event_id)
            after, told = event_id, time.monotonic()
        if end:
            yield _message(end, kind="end")
            return
        if time.monotonic() - told > ALIVE_S:
            yield ": still here\n\n"
            told = time.monotonic()
        if closing.wait(LOOK_S):
            return  # the client asks again, with the id of the last event it saw


def _message(value: dict[str, Any], event_id: str = "", kind: str = "") -> str:
    head = (f"id: {event_id}\n" if event_id else "") + (f"event: {kind}\n" if kind else "")
    return f"{head}data: {json.dumps(value)}\n\n"
