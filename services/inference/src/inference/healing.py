"""A TensorRT engine that can't be loaded: the job that builds it anew."""

import dataclasses

from shared.errors import Conflict
from shared.jobs import OptimizeJob, new_id
from shared.ledger import Ledger, Request
from shared.queue import deliver

ONE_S = 60  # in which all that ask mean one job: longer than it takes to write that down


def queue_rebuild(ledger: Ledger, name: str, model_id: str, alias: str) -> str:
    """The id of an optimize job of this model: the one that has not ended yet, or a new one, as the last one was.

    The job builds the engines that are missing or unfit here, checks their golden batches, measures every variant
    anew, and the gate decides again.

    Raises RedisError when the queue does not answer; no job is accepted then.
    """
    known: list[tuple[Request, OptimizeJob]] = []
    for request in ledger.requests():
        if isinstance(request.job, OptimizeJob) and request.job.model_id == model_id:
            if ledger.ended(request.id) is None:
                return request.id
            known.append((request, request.job))
    job, before = OptimizeJob(model_id, name, alias=alias), ""
    if known:
        last, job = max(known, key=lambda pair: (pair[0].accepted_at, pair[0].id))
        job, before = dataclasses.replace(job, name=name, alias=alias), last.id
    # Several processes of the API may ask at one time, and for several aliases: all mean the job that is named first.
    key, job_id = f"lanner:rebuild:{model_id}:{before}", new_id("j")
    ledger.redis.set(key, job_id, nx=True, ex=ONE_S)
    told = ledger.redis.get(key)
    job_id = told.decode() if isinstance(told, bytes) else job_id
    try:
        request, new = ledger.accept(job_id, job)  # whoever named it may have ended before it was accepted
    except Conflict:
        return job_id  # it is there, as another alias asked for it
    if new:
        deliver(ledger, request)
    return job_id
