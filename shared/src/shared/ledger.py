"""The record of every accepted job. Files are the truth, Redis the live view that can be lost and is rebuilt.

jobs/<id>/request.json    written whole before the job is enqueued
jobs/<id>/attempt-<n>.json  one per attempt: worker, host, times, outcome (none if the process died)
jobs/<id>/attempt-<n>.log   what it logged, its first MiB
jobs/<id>/cancel          somebody asked to cancel it
jobs/<id>/end.json        written once, before the terminal state is shown; terminal states never change
jobs/<id>/run.lock        held (flock) by the process that runs it
"""

import contextlib
import fcntl
import itertools
import json
import logging
import os
import socket
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from redis import Redis, RedisError

from shared.artifacts import alias_seq, fsync_dir, now, read_json, write_json
from shared.errors import Conflict, Damaged, LannerError, NotFound, Refused
from shared.jobs import Job, OptimizeJob, check_id, kind_of, parse, payload

log = logging.getLogger("lanner.ledger")
TERMINAL = ("succeeded", "failed", "cancelled")
# How an attempt may end that is not the job's fault, which waits and is tried again; and what for.
WAITS = {"disk_full": "waiting for disk space", "gpu_missing": "waiting for a GPU"}
EVENTS_KEPT = 1000


@dataclass(frozen=True)
class Request:
    """An accepted job as it was written; immutable.

    alias_seq: the number of the last move of the alias that it is to move, 0 for none.
    """

    id: str
    kind: str
    job: Job
    parent: str
    pipeline: str
    accepted_at: str
    traceparent: str = ""
    alias_seq: int | None = None


class Ledger:
    """jobs/ on the shared volume, with Redis beside it for what changes often. Safe to share among threads."""

    def __init__(self, root: Path, redis: "Redis"):
        self.folder = root / "jobs"
        self.redis = redis
        self._requests: dict[str, Request] = {}
        self._unreadable: set[str] = set()
        self._ended: dict[str, dict[str, Any]] = {}

    # Accepting

    def accept(self, job_id: str, job: Job, *, parent: str = "", pipeline: str = "",
               traceparent: str = "") -> tuple[Request, bool]:
        """Write the record of a job. Returns it and whether it is new: the same id with the same job is the old one.

        traceparent: W3C's, of what the job's spans belong to; "" for a trace of its own or of its pipeline.

        Raises:
            Conflict: the id stands for another job.
        """
        folder = self.folder / check_id(job_id, "job id")
        folder.mkdir(parents=True, exist_ok=True)
        body = {"id": job_id, "kind": kind_of(job), "job": payload(job), "parent": parent, "pipeline": pipeline,
                "accepted_at": now(), "traceparent": traceparent, "alias_seq": self._alias_seq(job)}
        new = _create(folder / "request.json", body)
        request = self.request(job_id)
        if not new and payload(request.job) != payload(job):
            raise Conflict(f"job {job_id} was accepted with other values; use another Idempotency-Key", "key_reused")
        if new:
            self.event(job_id, "waiting" if parent else "queued")
        return request, new

    def request(self, job_id: str) -> Request:
        """Raises NotFound for an unknown id, Damaged for a record that can't be read."""
        if job_id not in self._requests:
            path = self.folder / check_id(job_id, "job id") / "request.json"
            if not path.exists():
                raise NotFound(f"job {job_id} does not exist: GET /v1/jobs lists the latest")
            body = read_json(path)
            try:
                self._requests[job_id] = Request(body["id"], body["kind"], parse(body["kind"], body["job"]),
                                                 body["parent"], body["pipeline"], body["accepted_at"],
                                                 body.get("traceparent", ""), body.get("alias_seq"))
            except (AttributeError, KeyError, TypeError, Refused) as e:  # whatever shape it has
                raise Damaged(f"the record of job {job_id} is none that this version wrote ({e}): see "
                              f"jobs/{job_id}/request.json") from e
        return self._requests[job_id]

    def requests(self) -> Iterator[Request]:
        """Every accepted job but those whose record can't be read, as another version's can't; these are logged."""
        for job_id in self.ids():
            try:
                yield self.request(job_id)
            except LannerError as e:
                if job_id not in self._unreadable:
                    self._unreadable.add(job_id)
                    log.error("%s", e)

    def _alias_seq(self, job: Job) -> int | None:
        if not isinstance(job, OptimizeJob):
            return None
        return alias_seq(self.folder.parent, job.name, job.alias)

    def ids(self) -> list[str]:
        """Every accepted job."""
        if not self.folder.is_dir():
            return []
        return [e.name for e in os.scandir(self.folder) if os.path.exists(os.path.join(e.path, "request.json"))]

    # Attempts

    def attempts(self, job_id: str) -> list[dict[str, Any]]:
        paths = sorted((self.folder / job_id).glob("attempt-*.json"), key=lambda p: int(p.stem.split("-")[1]))
        return [read_json(p) for p in paths]

    def begin(self, job_id: str, worker: str, delivery: str = "") -> int:
        """Write down a new attempt, durably, before its work starts. Only the holder of the run lock calls this."""
        number = len(self.attempts(job_id)) + 1
        write_json(self.folder / job_id / f"attempt-{number}.json", {
            "number": number, "worker": worker, "delivery": delivery, "host": socket.gethostname(), "pid": os.getpid(),
            "started_at": now()})
        self.live(job_id, state="running", worker=worker, attempt=number, lost="", progress="null")
        self.event(job_id, "running", worker=worker, attempt=number)
        return number

    def finish_attempt(self, job_id: str, number: int, outcome: str, message: str = "") -> None:
        path = self.folder / job_id / f"attempt-{number}.json"
        write_json(path, {**read_json(path), "ended_at": now(), "outcome": outcome, "message": message})

    def log_of(self, job_id: str, number: int) -> Path:
        """Where an attempt logs."""
        return self.folder / job_id / f"attempt-{number}.log"

    def spent(self, job_id: str) -> int:
        """See `spent_of`."""
        return spent_of(self.attempts(job_id))

    @contextlib.contextmanager
    def run_lock(self, job_id: str) -> Iterator[bool]:
        """Try to hold the job's run lock; yields whether it is ours. The kernel frees it when its holder dies."""
        with open(self.folder / job_id / "run.lock", "ab") as f:
            try:
                fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            yield True

    def is_running(self, job_id: str) -> bool:
        """Whether some process holds the run lock now."""
        if not (self.folder / job_id / "run.lock").exists():
            return False
        with self.run_lock(job_id) as ours:
            return not ours

    # Cancelling and ending

    def ask_cancel(self, job_id: str) -> None:
        self.request(job_id)
        (self.folder / job_id / "cancel").touch()
        fsync_dir(self.folder / job_id)
        self.event(job_id, "cancel asked")

    def cancel_asked(self, job_id: str) -> bool:
        return (self.folder / job_id / "cancel").exists()

    def end(self, job_id: str, state: str, *, code: str = "", message: str = "",
            result: dict[str, Any] | None = None) -> bool:
        """Write the terminal state; the first one stays. Returns whether it was this one."""
        assert state in TERMINAL
        body = {"state": state, "code": code, "message": message, "result": result or {}, "ended_at": now()}
        first = _create(self.folder / job_id / "end.json", body)
        if first:
            self.live(job_id, state=state)
            self.event(job_id, state, code=code, message=message)
        return first

    def ended(self, job_id: str) -> dict[str, Any] | None:
        """How it ended, which never changes; None before that."""
        if job_id not in self._ended:
            try:
                self._ended[job_id] = read_json(self.folder / job_id / "end.json")
            except NotFound:
                return None
        return self._ended[job_id]

    # The live view: losing it costs a progress bar, never a job

    def live(self, job_id: str, **fields: Any) -> None:
        with contextlib.suppress(RedisError):
            values: dict[Any, Any] = {**fields, "at": time.time()}
            self.redis.hset(f"lanner:live:{job_id}", mapping=values)
            self.redis.expire(f"lanner:live:{job_id}", 30 * 86400)

    def read_live(self, job_id: str) -> dict[str, str]:
        try:
            raw: dict[bytes, bytes] = self.redis.hgetall(f"lanner:live:{job_id}")  # type: ignore[assignment]
        except RedisError:
            return {}
        return {k.decode(): v.decode() for k, v in raw.items()}

    def event(self, job_id: str, what: str, **fields: Any) -> None:
        with contextlib.suppress(RedisError):
            self.redis.xadd(f"lanner:events:{job_id}", {"event": json.dumps({"at": now(), "what": what, **fields})},
                            maxlen=EVENTS_KEPT, approximate=True)
            self.redis.expire(f"lanner:events:{job_id}", 30 * 86400)

    def events(self, job_id: str, after: str = "-", count: int = EVENTS_KEPT) -> list[tuple[str, dict[str, Any]]]:
        """(stream id, event) in order, those after the stream id `after`."""
        first = "-" if after == "-" else f"({after}"
        try:
            rows: Any = self.redis.xrange(f"lanner:events:{job_id}", min=first, count=count)
        except RedisError:
            return []
        return [(i.decode(), json.loads(f[b"event"])) for i, f in rows]

    def state(self, job_id: str) -> str:
        """waiting, queued, running, succeeded, failed or cancelled."""
        end = self.ended(job_id)
        if end:
            return str(end["state"])
        state = self.read_live(job_id).get("state", "")
        if state in ("waiting", "running", "queued"):
            return state
        parent = self.request(job_id).parent
        try:
            return "waiting" if parent and self.state(parent) != "succeeded" else "queued"
        except Damaged:  # the parent's record is another version's
            return "waiting"

    def view(self, job_id: str) -> dict[str, Any]:
        """Everything about a job as plain JSON: what the API answers."""
        request, live, state = self.request(job_id), self.read_live(job_id), self.state(job_id)
        end = self.ended(job_id) if state in TERMINAL else None  # never a terminal state without its result
        progress = json.loads(live["progress"]) if "progress" in live else None
        return {"id": job_id, "kind": request.kind, "state": state, "pipeline": request.pipeline,
                "parent": request.parent, "accepted_at": request.accepted_at, "job": payload(request.job),
                "progress": progress, "attempts": self.attempts(job_id), "cancel_asked": self.cancel_asked(job_id),
                "ended_at": end["ended_at"] if end else None, "result": end["result"] if end else None,
                "error": {"code": end["code"], "message": end["message"]} if end and end["code"] else None}


def spent_of(attempts: list[dict[str, Any]]) -> int:
    """Attempts that count against the limit: those that died or failed, not those that were asked to stop, nor those
    for which there was no disk space or no GPU.
    """
    return sum(a.get("outcome") not in ("stopped", "succeeded", *WAITS) for a in attempts)


def waits_of(attempts: list[dict[str, Any]]) -> int:
    """How many attempts, the last ones, ended one after the other since there was no disk space or no GPU."""
    return len(list(itertools.takewhile(lambda a: a.get("outcome") in WAITS, reversed(attempts))))


def _create(path: Path, body: object) -> bool:
    """Write a JSON file that must not exist yet, whole or not at all. Returns False where one stands already."""
    temp = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    write_json(temp, body)
    try:
        os.link(temp, path)
    except FileExistsError:
        return False
    finally:
        temp.unlink()
    fsync_dir(path.parent)
    return True
