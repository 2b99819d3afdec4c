"""A prediction's spans: the request, and in it decode, queue, compute and encode."""

import time
from functools import partial

from inference.statistics import Statistics, Timing
from shared.tracing import Tracer


def trace(statistics: Statistics, tracer: Tracer) -> None:
    """Record every request that is timed from now on, whichever way it came."""
    statistics.ended = partial(_record, tracer)


def _record(tracer: Tracer, timing: Timing, error: BaseException | None) -> None:
    now = time.monotonic_ns()
    epoch = time.time_ns() - now
    said = "" if error is None else f"{type(error).__name__}: {error}"
    request = tracer.span("predict", epoch + timing.began, epoch + now, tracer.context_of(timing.traceparent),
                          {"lanner.model": timing.model, "lanner.images": timing.images}, said)
    answer = timing.answer
    if answer is None or answer.run is None:
        return
    decoded = int(1e9 * answer.since)
    ran = decoded + answer.waited_ns
    took = sum(ns for _, ns in answer.run.pieces)
    for stage, began, ended in (("decode", decoded - timing.input_ns, decoded), ("queue", decoded, ran),
                                ("compute", ran, ran + took), ("encode", timing.answered, now)):
        tracer.span(stage, epoch + began, epoch + ended, request,
                    {"lanner.batch": sum(n for n, _ in answer.run.pieces)} if stage == "compute" else None)
