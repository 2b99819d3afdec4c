"""The thin coat over RQ: connect, and deliver a job by name. RQ is delivery, the ledger is the record."""

from contextlib import suppress
from pathlib import Path
from typing import Any

from redis import Redis, RedisError
from redis.backoff import ExponentialBackoff
from redis.retry import Retry
from rq import Queue
from rq.exceptions import DuplicateJobError
from rq.job import Job as RQJob
from rq.job import JobStatus
from rq.serializers import JSONSerializer

from shared.ledger import Ledger, Request
from shared.settings import Settings

NUDGE = "lanner:nudge"
LEASE = "lanner:keeper"  # held by the keeper that works
OVER = (JobStatus.FINISHED, JobStatus.FAILED, JobStatus.STOPPED, JobStatus.CANCELED)
KEEP_S = 86400  # how long RQ remembers a delivery; the ledger does not depend on it


class SafeJob(RQJob):  # type: ignore[misc]
    """A delivery that can only be `<service>.jobs.run(job_id)`: JSON alone would still let `os.system` be named."""

    @property
    def func(self) -> Any:
        allowed = f"{self.origin}.jobs.run"
        if self.func_name != allowed or self.instance is not None:
            raise PermissionError(f"refused to run {self.func_name!r}: the queue {self.origin} runs {allowed} alone")
        return super().func

    @property
    def success_callback(self) -> None:
        return None

    @property
    def failure_callback(self) -> None:
        return None

    @property
    def stopped_callback(self) -> None:
        return None


def connect(settings: Settings, timeout_s: float | None = None) -> "Redis":
    """A client of the settings' server. `timeout_s` bounds every answer, for callers that must not wait."""
    password = Path(settings.redis_password_file).read_text().strip() if settings.redis_password_file else None
    extra: dict[str, Any] = {}
    if timeout_s is not None:
        extra = {"socket_timeout": timeout_s, "socket_connect_timeout": timeout_s,
                 "retry": Retry(ExponentialBackoff(cap=0.1), 1)}
    return Redis.from_url(settings.redis_url, username=settings.redis_user or None, password=password,
                          socket_keepalive=True, health_check_interval=30, **extra)


def queue_of(service: str, redis: "Redis") -> Queue:
    return Queue(service, connection=redis, serializer=JSONSerializer, job_class=SafeJob)


def delivery_id(request: Request, number: int) -> str:
    return f"{request.id}_{number}"


def deliver(ledger: Ledger, request: Request) -> str:
    """Put a job on its service's queue under a fresh delivery id; returns that id.

    Delivering the same number twice is one delivery. Raises RedisError when the server does not answer.
    """
    redis = ledger.redis
    queue = queue_of(request.job.SERVICE, redis)
    number = int(ledger.read_live(request.id).get("delivery", 0))
    while True:
        number += 1
        rq_id = delivery_id(request, number)
        try:
            queue.enqueue_call(f"{request.job.SERVICE}.jobs.run", args=(request.id,), timeout=request.job.TIMEOUT_S,
                               job_id=rq_id, unique=True, result_ttl=KEEP_S, failure_ttl=KEEP_S, description=request.id)
        except DuplicateJobError:
            # Accepted before, by another caller or by this one with the reply lost, unless it has run already.
            job = SafeJob.fetch(rq_id, connection=redis, serializer=JSONSerializer)
            if job.get_status() in OVER:
                continue
        ledger.live(request.id, state="queued", delivery=number)
        return rq_id


def nudge(redis: "Redis") -> None:
    """Wake the keeper. Losing a nudge costs it one second."""
    with suppress(RedisError):
        redis.lpush(NUDGE, "1")
        redis.ltrim(NUDGE, 0, 0)
