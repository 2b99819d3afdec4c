"""`python -m shared.keeper`: sees to it that every accepted job ends, whatever died.

It looks at the open records about once a second, starts a stage when its parent has succeeded, delivers again what RQ
no longer knows or whose process is gone, ends what was cancelled or keeps dying, and sweeps what nobody needs. Whether
a job runs is told by its run lock, which the kernel frees with the process: so a killed worker's job is back within
seconds, long before RQ misses its heartbeat. It deletes what the API was asked to delete, since that may not write
there, and once a day it hashes what was published. Several keepers may be up: a lease in Redis lets one work.
"""

import json
import logging
import shutil
import signal
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from redis import RedisError
from rq.command import send_stop_job_command
from rq.exceptions import InvalidJobOperation, NoSuchJobError
from rq.job import JobStatus
from rq.serializers import JSONSerializer

from shared import disk
from shared.deletions import carry_out
from shared.ledger import WAITS, Ledger, Request, spent_of, waits_of
from shared.queue import LEASE, NUDGE, SafeJob, connect, deliver, delivery_id, queue_of
from shared.scrub import Scrub
from shared.settings import Settings, load

log = logging.getLogger("lanner.keeper")
LEASE_MS = 10_000
ACCEPT_GRACE_S = 2.0  # between a record and its first delivery stands only the API's next line
CANCEL_GRACE_S = 30.0  # for a job to see that it was cancelled; then its process is killed
FAIL_DELAY_S = 5.0  # before the second try of what raised; four times as long before each next
FULL_DELAY_S, FULL_DELAY_MOST_S = 60.0, 600.0  # till the next try of what found no disk space or no GPU; the same
FULL_TRIES = 144  # about a day
FRUITLESS = 10  # deliveries that never became an attempt, after which the job fails
STAGING_S = 3600.0


class Keeper:
    def __init__(self, settings: Settings, ledger: Ledger):
        self.settings, self.ledger, self.redis = settings, ledger, ledger.redis
        self.over: set[str] = set()
        self.odd: set[str] = set()  # jobs that could not be looked at
        self.short: set[str] = set()  # jobs that wait for disk space
        self.heard: dict[str, tuple[str, float]] = {}  # running jobs: when they told something, and when that was seen
        self.since: dict[tuple[str, str], float] = {}  # (job, what looks wrong) -> since when

    def step(self) -> None:
        """Look once at every open job, oldest first. Raises RedisError when the server does not answer.

        One that can't be looked at, such as a record that another version wrote, keeps no other waiting.
        """
        open_jobs = []
        for job in self.ledger.ids():
            if job not in self.over:
                with self._alone(job):
                    open_jobs.append(self.ledger.request(job))
        for request in sorted(open_jobs, key=lambda r: r.accepted_at):
            with self._alone(request.id):
                self.look(request)
                self.odd.discard(request.id)

    @contextmanager
    def _alone(self, job: str) -> Iterator[None]:
        """Whatever fails is of this job alone, and logged the first time."""
        try:
            yield
        except RedisError:
            raise
        except Exception:
            if job not in self.odd:
                self.odd.add(job)
                log.exception("%s can't be kept", job)

    def look(self, request: Request) -> None:
        ledger, job = self.ledger, request.id
        attempts = ledger.attempts(job)  # before the lock is asked for: one seen here that does not hold it is over
        if ledger.is_running(job):
            if ledger.cancel_asked(job) and self._lasts(job, "cancel", CANCEL_GRACE_S):
                del self.since[job, "cancel"]  # it is killed again after as long
                self._kill(request, f"did not stop within {CANCEL_GRACE_S:g} s of being cancelled")
            elif self._stalls(job, ledger.read_live(job)):
                self._kill(request, f"showed no progress for {self.settings.stall_s:g} s")
            return
        self.heard.pop(job, None)
        if ledger.ended(job):  # asked after the lock: a job ends before it lets go of it
            self.over.add(job)
            shutil.rmtree(self.settings.artifacts / "work" / job, ignore_errors=True)
            self.since = {key: at for key, at in self.since.items() if key[0] != job}
            return
        parent = ledger.ended(request.parent) if request.parent else None
        if ledger.cancel_asked(job):
            ledger.end(job, "cancelled", code="cancelled", message="cancelled on request")
        elif parent and parent["state"] != "succeeded":
            state = "cancelled" if parent["state"] == "cancelled" else "failed"
            ledger.end(job, state, code=f"parent_{parent['state']}", message=f"{request.parent}: {parent['message']}")
        elif request.parent and not parent:
            return
        else:
            self._deliver(request, attempts)

    def _deliver(self, request: Request, attempts: list[dict[str, Any]]) -> None:
        ledger, job = self.ledger, request.id
        spent = spent_of(attempts)
        last = attempts[-1] if attempts else {}
        live = ledger.read_live(job)
        if spent >= self.settings.max_attempts:
            how = (last.get("message") or live.get("lost") or
                   "its process was killed (out of memory, or this input kills it)")
            ledger.end(job, "failed", code="poison", message=f"gave up after {spent} attempts; the last: {how}")
            return
        waits = waits_of(attempts)
        if waits >= FULL_TRIES:
            how = f"gave up after {waits} attempts: {last['message']}"
            ledger.end(job, "failed", code=last["outcome"], message=how)
            return
        number = int(live.get("delivery", 0))
        if number == 0:
            wait, what = 0.0 if request.parent or attempts else ACCEPT_GRACE_S, "undelivered"
        else:
            rq_id = delivery_id(request, number)
            status = self._status(rq_id)
            what = f"{number} {status}"
            queue = queue_of(request.job.SERVICE, self.redis)
            if status == JobStatus.QUEUED and queue.get_job_position(rq_id) is not None:
                return
            if last.get("delivery") == rq_id or status == "lost":  # it ran, and its process is gone
                if waits:
                    wait = min(FULL_DELAY_S * 4 ** (waits - 1), FULL_DELAY_MOST_S)
                elif last.get("outcome") == "error" or live.get("lost"):
                    wait = FAIL_DELAY_S * 4 ** (spent - 1)
                else:
                    wait = 0.0
            elif status in (JobStatus.QUEUED, JobStatus.STARTED):  # popped, and not running yet or no more
                wait = self.settings.silence_s
            elif number - len(attempts) < FRUITLESS:
                wait = FAIL_DELAY_S
            else:
                ledger.end(job, "failed", code="undeliverable", message=(
                    f"delivered {number} times to the {queue.name} queue and never begun: see its worker's log"))
                return
        if self._lasts(job, what, wait) and self._has_room(job):
            rq_id = deliver(ledger, request)
            log.info("delivered %s (%s)", rq_id, what)
            ledger.event(job, "queued", delivery=rq_id, because=_because(number, last))

    def _has_room(self, job: str) -> bool:
        """Whether there is disk space to begin it; if not it is said where people look."""
        room = disk.free(self.settings.artifacts) > 0
        if not room:
            if job not in self.short:
                log.warning("%s waits: the volume is full", job)
            self.ledger.live(job, progress=json.dumps({"stage": WAITS["disk_full"]}))
            self.short.add(job)
        elif job in self.short:
            self.short.discard(job)
            self.ledger.live(job, progress="null")
        return room

    def _status(self, rq_id: str) -> str:
        try:
            return str(SafeJob.fetch(rq_id, connection=self.redis, serializer=JSONSerializer).get_status().value)
        except (NoSuchJobError, InvalidJobOperation):
            return "lost"

    def _lasts(self, job: str, what: str, seconds: float) -> bool:
        """Whether this has looked so for that long; for 0 seconds it has at the first look."""
        now = time.monotonic()
        return now - self.since.setdefault((job, what), now) >= seconds

    def _stalls(self, job: str, live: dict[str, str]) -> bool:
        """Whether a running job has told nothing for as long as it may, by this keeper's clock."""
        at, now = live.get("at", ""), time.monotonic()
        known, since = self.heard.setdefault(job, (at, now))
        if known != at:
            self.heard[job] = (at, now)
            return False
        if not self.settings.stall_s or now - since < self.settings.stall_s:
            return False
        del self.heard[job]  # a kill that did not reach it is tried again after as long
        return True

    def _kill(self, request: Request, why: str) -> None:
        delivery = self.ledger.attempts(request.id)[-1]["delivery"]  # the one that runs; a later one may be queued
        log.warning("%s %s: its process is killed", request.id, why)
        self.ledger.live(request.id, lost=why)
        self.ledger.event(request.id, "killed", because=why)
        try:
            send_stop_job_command(self.redis, delivery, serializer=JSONSerializer)
        except (NoSuchJobError, InvalidJobOperation) as e:
            log.warning("%s: %s", request.id, e)

    def sweep(self) -> None:
        """Remove staging folders whose job is not running and that are over an hour old."""
        folder = self.settings.artifacts / ".staging"
        for path in folder.iterdir() if folder.is_dir() else []:
            job = path.name.split(".")[0]
            with suppress(FileNotFoundError):  # it was published meanwhile
                if time.time() - path.stat().st_mtime > STAGING_S and not self._runs(job):
                    log.info("swept %s", path.name)
                    shutil.rmtree(path, ignore_errors=True)

    def _runs(self, job: str) -> bool:
        return (self.ledger.folder / job).is_dir() and self.ledger.is_running(job)

    def hold_lease(self, token: str) -> bool:
        """Whether this keeper is the one that works now."""
        if self.redis.set(LEASE, token, nx=True, px=LEASE_MS):
            return True
        if self.redis.get(LEASE) != token.encode():
            return False
        self.redis.pexpire(LEASE, LEASE_MS)
        return True


def _because(number: int, last: dict[str, Any]) -> str:
    """Why a job is delivered after `number` deliveries, of which `last` was the last attempt."""
    if not number:
        return "accepted"
    if not last:
        return "its delivery was lost"
    outcome = last.get("outcome")
    attempt = f"attempt {last['number']}"
    return f"{attempt} ended as {outcome}" if outcome else f"the process of {attempt} died"


def main() -> None:
    settings = load()
    logging.basicConfig(level=settings.log_level, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    stop: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda n, _: stop.append(n))
    settings.artifacts.mkdir(parents=True, exist_ok=True)
    keeper = Keeper(settings, Ledger(settings.artifacts, connect(settings, timeout_s=5)))
    told: set[str] = set()
    token, swept, scrub = uuid.uuid4().hex, 0.0, Scrub(settings.artifacts, settings.scrub_s)
    log.info("keeping %s", settings.artifacts)
    while not stop:
        try:
            if keeper.hold_lease(token):
                keeper.step()
                carry_out(settings.artifacts, told)
                if time.monotonic() - swept > 60:
                    keeper.sweep()
                    scrub.begin_if_due()
                    swept = time.monotonic()
            _sleep(keeper.redis)
        except RedisError as e:
            log.warning("no answer from Redis (%s): the records wait", e)
            time.sleep(1)


def _sleep(redis: Any) -> None:
    """A second, or less when something ended."""
    redis.brpop([NUDGE], timeout=1)


if __name__ == "__main__":
    main()
