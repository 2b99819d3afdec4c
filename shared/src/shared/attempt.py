"""One attempt at a job, in the process that a worker forked for it: lock, record, work, end.

Everything is at-least-once: an attempt may find the job done, running elsewhere, or cancelled.
"""

import json
import logging
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

from rq import get_current_job
from rq.timeouts import JobTimeoutException

from shared import disk, faults, gpu, tracing
from shared.artifacts import open_artifact
from shared.errors import Damaged, LannerError, NotFound, Refused, Unavailable
from shared.joblog import logged
from shared.jobs import TrainJob, TuneJob
from shared.ledger import TERMINAL, WAITS, Ledger, Request
from shared.queue import connect, nudge
from shared.settings import Settings, load

log = logging.getLogger("lanner.attempt")
Result = dict[str, Any]
GPU_WAIT_S = 3600.0
LIVE_S = 60.0
STAGES_KEPT = 1000  # of an attempt, for its trace: stages may alternate
_stop = {"asked": False}


class Stopped(Exception):
    """The worker is shutting down: what is done is saved, the job goes back to the queue."""


class Cancelled(Exception):
    """Somebody cancelled the job."""


def ask_stop(signum: int, frame: object) -> None:
    _stop["asked"] = True


class Attempt:
    """What a job's body sees of the system: where to read and write, how to tell progress, when to stop.

    root: the artifacts volume; work: this job's own folder, kept until the job is terminal (checkpoints, logs, parts).
    """

    def __init__(self, job_id: str, settings: Settings, ledger: Ledger):
        self.job_id, self.settings, self._ledger = job_id, settings, ledger
        self.root = settings.artifacts
        self.work: Path = settings.artifacts / "work" / job_id
        self.request = ledger.request(job_id)
        self._stage, self._began, self._first, self._told = "", 0.0, 0.0, 0.0
        self._began_attempt = time.monotonic()
        self.stages: list[tuple[str, int]] = []  # name, when it began in ns since the epoch

    def came_after(self, by: str) -> bool:
        """Whether this is a job's id, and that was accepted before this one."""
        if not by.startswith("j-"):
            return False
        with suppress(LannerError):
            return self._ledger.request(by).accepted_at <= self.request.accepted_at
        return False

    @property
    def should_stop(self) -> bool:
        """True once the body should save what it has and call `check()`."""
        self._live_on()
        return _stop["asked"] or self._ledger.cancel_asked(self.job_id)

    def check(self) -> None:
        """Leave the job here if the worker shuts down (Stopped) or the job was cancelled (Cancelled)."""
        self._live_on()
        if self._ledger.cancel_asked(self.job_id):
            raise Cancelled
        if _stop["asked"]:
            raise Stopped

    def _live_on(self) -> None:
        """Show once a minute that it goes on: not all that takes long has progress to tell."""
        if time.monotonic() > self._told + LIVE_S:
            self._told = time.monotonic()
            self._ledger.live(self.job_id)

    def wait_for_gpu(self) -> None:
        """Show that the job waits for a GPU, and leave if it should, or after an hour: its time (TIMEOUT_S) passes as
        long as it waits, and begins anew when it is delivered again.
        """
        self.check()
        if time.monotonic() > self._began_attempt + GPU_WAIT_S:
            raise Stopped("no GPU was free for an hour")
        self._ledger.live(self.job_id, state="waiting", progress=json.dumps({"stage": "waiting for a GPU"}))

    def report(self, stage: str, step: float, of: float, **metrics: float | str) -> None:
        """Show progress: `step` of `of` of a named stage, with the latest metrics. Told at most 5 times a second."""
        moment = time.monotonic()
        new = stage != self._stage
        if new:
            self._stage, self._began, self._first = stage, moment, step
            if len(self.stages) < STAGES_KEPT:
                self.stages.append((stage, time.time_ns()))
        if not new and step < of and moment - self._told < 0.2:
            return
        self._told = moment
        done = step - self._first
        eta = (moment - self._began) / done * (of - step) if done > 0 else None
        progress = {"stage": stage, "step": step, "of": of, "percent": round(100 * step / of, 1) if of else None,
                    "eta_s": round(eta, 1) if eta is not None else None, "metrics": metrics}
        self._ledger.live(self.job_id, state="running", progress=json.dumps(progress))
        self._ledger.event(self.job_id, "progress", **progress)


def attempt(job_id: str, body: Callable[[Any, Attempt], Result]) -> Result:
    """Run `body(job, attempt)` under the job's run lock and write how it ended.

    The body publishes the job's target with a `summary` in the manifest and returns that summary; it is not called
    when the target stands already. Refused, NotFound and Damaged fail the job at once with their sentence; a full disk
    and a GPU that is out of sight are waited for; anything else is tried again by the keeper until MAX_ATTEMPTS.
    """
    settings = load()
    redis = connect(settings)
    ledger = Ledger(settings.artifacts, redis)
    signal.signal(signal.SIGUSR1, ask_stop)
    faults.point("after-pop")
    with ledger.run_lock(job_id) as ours:
        if not ours:
            return {"outcome": "busy"}
        if ledger.ended(job_id):
            return {"outcome": "ended before"}
        delivery = get_current_job()
        if delivery:
            number = ledger.begin(job_id, delivery.worker_name or "", delivery.id)
        else:
            number = ledger.begin(job_id, f"pid-{os.getpid()}")
        with logged(ledger.log_of(job_id, number)):
            log.info("%s attempt %d begins", job_id, number)
            began, ctx = time.time_ns(), Attempt(job_id, settings, ledger)
            outcome = _run(ledger, job_id, body, ctx)
            ended = time.time_ns()
            _remove_generated()
            if outcome.word != "succeeded":
                _remove_staged(ctx.root, job_id)
            log.log(logging.WARNING if outcome.code else logging.INFO, "%s %s%s", job_id, outcome.word,
                    f": {outcome.message} [{outcome.code}]" if outcome.code else "")
        try:
            ledger.finish_attempt(job_id, number, outcome.word, outcome.message)
            if outcome.word in TERMINAL:
                ledger.end(job_id, outcome.word, code=outcome.code, message=outcome.message, result=outcome.result)
        except OSError as e:  # a full disk: it is said where it can be, and the keeper tries again later
            ledger.live(job_id, lost=f"{outcome.message or outcome.word}; writing that failed: {e}")
            raise
        if outcome.word not in TERMINAL:
            waits = {"stage": WAITS[outcome.word]} if outcome.word in WAITS else None
            ledger.live(job_id, state="queued", progress=json.dumps(waits))
            ledger.event(job_id, "queued", reason=outcome.word, message=outcome.message)
    nudge(redis)
    if tracer := tracing.start(settings, ledger.request(job_id).job.SERVICE):
        error = "" if outcome.word in ("succeeded", "stopped", "cancelled") else outcome.message
        trace_job(tracer, ledger.request(job_id), number, began, ended, ctx.stages, error)
    return {"outcome": outcome.word}


def _remove_generated() -> None:
    """TensorFlow's AutoGraph removes what it writes to /tmp at exit, to which a job's process never comes."""
    for name, module in list(sys.modules.items()):
        if name.startswith("__autograph_generated_file"):
            with suppress(OSError, TypeError):
                os.unlink(module.__file__)  # type: ignore[arg-type]


def _remove_staged(root: Path, job_id: str) -> None:
    """What the attempt had written and not published: on a full disk nothing else could be written before it goes."""
    for path in (root / ".staging").glob(f"{job_id}.*"):
        shutil.rmtree(path, ignore_errors=True)


def trace_job(tracer: tracing.Tracer, request: Request, number: int, began_ns: int, ended_ns: int,
              stages: list[tuple[str, int]], error: str) -> None:
    """Spans of an attempt that is over: from the job's acceptance or, of a later attempt, its own beginning; the
    stages in it. They belong to the trace that the submitter told; without one all jobs of a pipeline are one.
    """
    accepted = int(1e9 * datetime.fromisoformat(request.accepted_at).timestamp()) if number == 1 else began_ns
    parent = request.traceparent or tracing.traceparent_of(request.pipeline or request.id)
    attempt = tracer.span(request.kind, accepted, ended_ns, tracer.context_of(parent),
                          {"lanner.job": request.id, "lanner.name": request.job.name, "lanner.attempt": number,
                           "lanner.pipeline": request.pipeline}, error)
    if began_ns > accepted:
        tracer.span("queued", accepted, began_ns, attempt)
    for (stage, since), (_, until) in pairwise([*stages, ("", ended_ns)]):
        tracer.span(stage, since, until, attempt)
    tracer.flush()


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended: a terminal state for the job, or what the keeper follows up: `stopped`, `error`, or one of
    ledger.WAITS.
    """

    word: str
    code: str = ""
    message: str = ""
    result: Result | None = None


def _run(ledger: Ledger, job_id: str, body: Callable[[Any, Attempt], Result], ctx: Attempt) -> Outcome:
    job = ledger.request(job_id).job
    try:
        ctx.check()
        result = _published(ctx.root, job.target)
        if result is None:
            ctx.work.mkdir(parents=True, exist_ok=True)
            if ctx.settings.device == "gpu":
                count = ctx.settings.gpus_per_training if isinstance(job, (TrainJob, TuneJob)) else 1
                with gpu.lease(ctx.root, ctx.wait_for_gpu, count):
                    result = body(job, ctx)
            else:
                result = body(job, ctx)
        faults.point("before-record-ends")
        return Outcome("succeeded", result=result)
    except Stopped as e:
        return Outcome("stopped", message=str(e) or "the worker was asked to stop")
    except Cancelled:
        return Outcome("cancelled", "cancelled", "cancelled on request")
    except (Refused, NotFound, Damaged) as e:
        return Outcome("failed", e.code, str(e))
    except JobTimeoutException:
        return Outcome("failed", "timeout", f"ran longer than {job.TIMEOUT_S} s")
    except Exception as e:  # the boundary: whatever a library raises becomes a reason in the record
        log.exception("job %s", job_id)
        code = e.code if isinstance(e, LannerError) else "internal"
        if disk.is_full(e, ctx.root):
            return Outcome("disk_full", "disk_full", f"the volume is full ({e})")
        if isinstance(e, Unavailable) and e.code == "gpu_missing":
            return Outcome("gpu_missing", "gpu_missing", str(e))
        last = ledger.spent(job_id) >= ctx.settings.max_attempts
        return Outcome("failed" if last else "error", code, f"{type(e).__name__}: {e}")


def _published(root: Path, target: str) -> Result | None:
    if not target or not (root / target).exists():
        return None
    return dict(open_artifact(root, target, hashes=False)["summary"])
