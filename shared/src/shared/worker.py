"""The one worker: `python -m shared.worker <service>` takes jobs of one queue, one at a time, each in a forked child.

The parent imports no TensorFlow, cuDF, CuPy or TensorRT: CUDA can't be re-initialised after a fork, and a fork after
TensorFlow ran hangs. The next job's child may be forked ahead and import them while it waits: see `standby`. One queue,
so that RQ moves jobs by BLMOVE, which loses none.
"""

import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from importlib import import_module
from typing import Any

from rq import Worker
from rq.executions import Execution
from rq.serializers import JSONSerializer

from shared import gpu, tracing
from shared.attempt import ask_stop
from shared.errors import LannerError
from shared.ledger import Ledger
from shared.queue import SafeJob, connect, queue_of
from shared.settings import load
from shared.standby import Standby


class LannerWorker(Worker):  # type: ignore[misc]
    """RQ's forking worker that hands SIGTERM on to the job as SIGUSR1: it saves and goes back to the queue. It ends
    where it can't see a GPU any more, so that none of the jobs that wait is lost to it.

    With `ahead`, modules that its jobs import, a process with these imported waits for each next job. light: whether
    a delivery's job needs few of them, and is begun sooner without that process while it still imports. missed_gpu:
    whether a delivery's attempt has ended since it saw no GPU.
    """

    ahead: Sequence[str] = ()
    light: Callable[[str], bool] = staticmethod(lambda delivery: False)
    standby: Standby | None = None
    missed_gpu: Callable[[str], bool] = staticmethod(lambda delivery: False)
    is_blind = False

    def look_ahead(self) -> None:
        """Have a process wait for the next job; where none can be had, that job is forked when it comes."""
        if self.ahead:
            with suppress(OSError):
                self.standby = Standby(self.ahead, self._begin_ahead, self._run_ahead)

    def execute_job(self, job: Any, queue: Any) -> None:
        super().execute_job(job, queue)  # type: ignore[no-untyped-call]
        if self.missed_gpu(job.id) and not gpu.find():
            self.log.error("no GPU can be seen any more: this worker ends, and takes jobs again when it began with one")
            self.is_blind = self._stop_requested = True
        if not self._stop_requested and self.standby is None:
            self.look_ahead()

    def fork_work_horse(self, job: Any, queue: Any) -> None:
        standby, self.standby = self.standby, None
        if standby and not standby.is_ready and self.light(job.id):
            standby, self.standby = None, standby
        if standby and self.execution and standby.hand_over(job=job.id, execution=self.execution.id):
            self._horse_pid = standby.pid
        else:
            super().fork_work_horse(job, queue)  # type: ignore[no-untyped-call]
        if self._stop_requested or self._shutdown_requested_date:  # asked while there was no process to tell it to
            self._tell_horse()

    def _begin_ahead(self) -> None:
        """In the process that is to wait: nothing of the worker's is kept, so that Redis sees it end when it does."""
        self.setup_work_horse_signals()
        self.connection.connection_pool.reset()

    def _run_ahead(self, told: dict[str, str]) -> None:
        """In the process that waited: what RQ does in one that it has just forked."""
        os.environ |= {"RQ_WORKER_ID": self.name, "RQ_JOB_ID": told["job"]}
        job = self.job_class.fetch(told["job"], connection=self.connection, serializer=self.serializer)
        self.execution = Execution.fetch(told["execution"], job.id, connection=self.connection)
        self.execution._job = job  # else it would fetch one by RQ's own class and serializer
        self.main_work_horse(job, self.queues[0])  # type: ignore[no-untyped-call]

    def teardown(self) -> None:
        if self.standby and not self.is_horse:
            self.standby.end()
            self.standby = None
        super().teardown()  # type: ignore[no-untyped-call]

    def handle_warm_shutdown_request(self) -> None:
        super().handle_warm_shutdown_request()  # type: ignore[no-untyped-call]
        self._tell_horse()

    def _tell_horse(self) -> None:
        if self.horse_pid:
            with suppress(ProcessLookupError):
                os.kill(self.horse_pid, signal.SIGUSR1)

    def setup_work_horse_signals(self) -> None:
        super().setup_work_horse_signals()  # type: ignore[no-untyped-call]
        signal.signal(signal.SIGUSR1, ask_stop)


def _is_light(ledger: Ledger, kinds: Sequence[str], delivery: str) -> bool:
    with suppress(LannerError):  # the job's attempt will tell
        return ledger.request(delivery.rsplit("_", 1)[0]).kind in kinds
    return False


def _missed_gpu(ledger: Ledger, delivery: str) -> bool:
    attempts = ledger.attempts(delivery.rsplit("_", 1)[0])
    return bool(attempts) and attempts[-1].get("outcome") == "gpu_missing"


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
    signal.signal(signal.SIGUSR1, ask_stop)  # of a job's process from its first moment on, which is forked from here
    logging.getLogger("rq.worker").setLevel(logging.WARNING)  # it calls every job that ended well a success
    jobs = import_module(f"{service}.jobs")  # once, and not in each job's fork; it imports nothing of a GPU by itself
    worker.light = partial(_is_light, Ledger(settings.artifacts, redis), getattr(jobs, "LIGHT", ()))
    worker.ahead = getattr(jobs, "AHEAD", ()) if settings.import_ahead == "on" else ()
    worker.missed_gpu = partial(_missed_gpu, Ledger(settings.artifacts, redis))
    worker.look_ahead()
    log.info("%s takes jobs of %s", worker.name, service)
    worker.work(logging_level="WARNING")
    if worker.is_blind:
        sys.exit(1)  # whoever starts it again does so until it sees one


if __name__ == "__main__":
    main(sys.argv[1])
