"""The one worker: `python -m shared.worker <service>` takes jobs of one queue, one at a time, each in a forked child.

The parent imports no TensorFlow, cuDF, CuPy or TensorRT: CUDA can't be re-initialised after a fork, and a fork after
TensorFlow ran hangs. One queue, so that RQ moves jobs by BLMOVE, which loses none.
"""

import logging
import os
import signal
import sys
from contextlib import suppress
from importlib import import_module

from rq import Worker
from rq.serializers import JSONSerializer

from shared import gpu, tracing
from shared.attempt import ask_stop
from shared.queue import SafeJob, connect, queue_of
from shared.settings import load


class LannerWorker(Worker):  # type: ignore[misc]
    """RQ's forking worker that hands SIGTERM on to the job as SIGUSR1: it saves and goes back to the queue."""

    def handle_warm_shutdown_request(self) -> None:
        super().handle_warm_shutdown_request()  # type: ignore[no-untyped-call]
        if self.horse_pid:
            with suppress(ProcessLookupError):
                os.kill(self.horse_pid, signal.SIGUSR1)

    def setup_work_horse_signals(self) -> None:
        super().setup_work_horse_signals()  # type: ignore[no-untyped-call]
        signal.signal(signal.SIGUSR1, ask_stop)


def main(service: str) -> None:
    settings = load()
    os.environ.setdefault("RAPIDS_NO_INITIALIZE", "1")
    logging.basicConfig(level=settings.log_level, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    tracing.check(settings)
    log = logging.getLogger("lanner.worker")
    if settings.device == "gpu":
        for card in gpu.check():
            log.info("%s, %d MiB, capability %s, driver %s", card.name, card.memory_mib, card.capability, card.driver)
    redis = connect(settings)
    worker = LannerWorker(
        [queue_of(service, redis)], connection=redis, serializer=JSONSerializer, job_class=SafeJob,
        worker_ttl=settings.worker_ttl_s, job_monitoring_interval=settings.heartbeat_s,
        maintenance_interval=settings.maintenance_s)
    worker.log_job_description = False
    import_module(f"{service}.jobs")  # once, and not in each job's fork; it imports nothing of a GPU by itself
    worker.work(logging_level=settings.log_level)


if __name__ == "__main__":
    main(sys.argv[1])
