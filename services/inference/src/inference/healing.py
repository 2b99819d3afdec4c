"""A TensorRT engine that can't be loaded: the job that builds it anew."""

import dataclasses

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
    for job_id in ledger.ids():
        request = ledger.request(job_id)
        if isinstance(request.job, OptimizeJob) and request.job.model_id == model_id:
            if ledger.ended(job_id) is None:
                return job_id
            known.append((request, request.job))
    job, before = OptimizeJob(model_id, name, alias=alias), ""
    if known:
        last, job = max(known, key=lambda pair: (pair[0].accepted_at, pair[0].id))
        job, before = dataclasses.replace(job, name=name, alias=alias), last.id
    # Several processes of the API may ask at one time, and for several aliases: who comes first queues it for all.
    key, job_id = f"lanner:rebuild:{model_id}:{before}", new_id("j")
    if not ledger.redis.set(key, job_id, nx=True, ex=ONE_S):
        told = ledger.redis.get(key)
        return told.decode() if isinstance(told, bytes) else job_id
    request, _ = ledger.accept(job_id, job)
    deliver(ledger, request)
    return job_id
