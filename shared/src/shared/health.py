"""`python -m shared.health <service>`: exit 0 if that worker or the keeper works in this container, else 1 and why."""

import socket
import sys
from datetime import datetime, timezone

from rq import Worker
from rq.serializers import JSONSerializer

from shared.at_work import has_keeper
from shared.errors import Unavailable
from shared.queue import SafeJob, connect, queue_of
from shared.settings import Settings, load

TIMEOUT_S = 3.0


def check_keeper(settings: Settings) -> None:
    if not has_keeper(connect(settings, TIMEOUT_S)):
        raise Unavailable("no keeper holds the lease")


def check_worker(service: str, settings: Settings) -> None:
    """A worker of this host name is registered for the queue and its heartbeat is not older than two of its lives."""
    queue = queue_of(service, connect(settings, TIMEOUT_S))
    workers = Worker.all(queue=queue, job_class=SafeJob, serializer=JSONSerializer)
    heartbeats = [w.last_heartbeat for w in workers if w.hostname == socket.gethostname() and w.last_heartbeat]
    if not heartbeats:
        raise Unavailable(f"no {service} worker of {socket.gethostname()} is registered")
    age = (datetime.now(timezone.utc) - max(heartbeats)).total_seconds()
    if age > 2 * settings.worker_ttl_s:
        raise Unavailable(f"the {service} worker's last heartbeat is {age:.0f} s old")


if __name__ == "__main__":
    try:
        if sys.argv[1] == "keeper":
            check_keeper(load())
        else:
            check_worker(sys.argv[1], load())
    except Exception as e:  # the boundary: whatever it is, the container is not healthy and the log should say why
        sys.exit(f"{type(e).__name__}: {e}")
