"""Which workers and keeper are there, as Redis knows it."""

from datetime import datetime, timezone
from typing import Any

from redis import Redis
from rq import Worker
from rq.serializers import JSONSerializer

from shared.queue import LEASE, SafeJob, queue_of


def has_keeper(redis: Redis) -> bool:
    """Raises RedisError."""
    return bool(redis.exists(LEASE))


def workers_of(redis: Redis, service: str, ttl_s: float) -> list[dict[str, Any]]:
    """{name, host, heard_s, job} of the queue's workers that were heard of within two of their lives (ttl_s, seconds).

    job: the id of what it runs, or None. Raises RedisError.
    """
    now, found = datetime.now(timezone.utc), []
    for worker in Worker.all(queue=queue_of(service, redis), job_class=SafeJob, serializer=JSONSerializer):
        heard = (now - worker.last_heartbeat).total_seconds() if worker.last_heartbeat else float("inf")
        if heard <= 2 * ttl_s:
            delivery = worker.get_current_job_id() or ""
            found.append({"name": worker.name, "host": worker.hostname, "heard_s": round(heard, 1),
                          "job": delivery.rsplit("_", 1)[0] or None})
    return sorted(found, key=lambda worker: str(worker["name"]))
