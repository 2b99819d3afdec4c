"""A TensorRT engine that can't be loaded: the job that builds it anew."""

import dataclasses
from hashlib import sha256

from shared.jobs import OptimizeJob, new_id
from shared.ledger import Ledger, Request
from shared.queue import deliver


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
    ledger.redis.ping()
    # Several processes of the API may ask at one time: all of them mean the job behind that one.
    meant = sha256(f"{model_id} {name} {alias} {before}".encode()).hexdigest()
    request, new = ledger.accept(f"{new_id('j')[:-8]}{meant[:8]}", job)
    if new:
        deliver(ledger, request)
    return request.id
