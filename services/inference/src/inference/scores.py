"""From a request's images to their scores, for every route that predicts: find the Variant, decode, submit, wait."""

import time
from collections.abc import Callable

import numpy as np

from inference.codec import JPEG_PIXELS
from inference.context import Api
from inference.loaded import Served
from inference.predictor import LAST, Closed, NotInTime
from inference.statistics import Timing
from inference.steps import LOAD, Ask, Steps
from shared.errors import Unavailable

DEADLINE_S = 10.0
LIGHT = 32 << 10  # bytes that are read and decoded in less than a millisecond
MANY = 1 << 12  # numbers that take about half a millisecond to be picked and written as text; one written counts 8
PRODUCTION = "production"  # the alias that answers for a Name alone


def model_called(name: str, alias: str) -> str:
    """What statistics call it: NAME, or NAME@ALIAS for another alias than production."""
    return name if alias == PRODUCTION else f"{name}@{alias}"


def many(found: np.ndarray, k: int) -> bool:
    """Whether it takes long to write the k likeliest of each row of float32 [N, classes] as text."""
    return found.size + 8 * len(found) * min(k, found.shape[1]) > MANY


def late(patience_s: float) -> Unavailable:
    return Unavailable(f"no answer within {patience_s:g} s: send fewer images, or later", "deadline")


def scores(context: Api, timing: Timing, name: str, alias: str, version: int | None, variant: str | None,
           batch_of: Callable[[int], np.ndarray], weight: int, images: int, patience_s: float = DEADLINE_S,
           priority: int = LAST) -> Steps[tuple[Served, np.ndarray]]:
    """What answered, and float32 [N, classes]. batch_of(size): the request's images, uint8 [N, size, size, 3], which
    `weight` bytes are made of. images: that are to be brought to that size.

    Raises, beside what `LoadedModels.resolve`, `Predictor.answer` and `batch_of` do:
        Unavailable: no answer within `patience_s`.
    """
    deadline, queue_s = time.monotonic() + patience_s, context.settings.queue_ms / 1000 or float("inf")
    if version is not None or variant is not None:
        yield None  # where that lies is read from the volume
    if not context.loaded.is_at_hand(name, alias, version, variant):
        yield LOAD
    while True:
        served = context.loaded.resolve(name, alias, version, variant)
        timing.found(served.version)
        predictor = served.loaded.predictor
        try:
            predictor.check(deadline, queue_s)
            if weight + images * served.loaded.spec.size ** 2 // JPEG_PIXELS > LIGHT:
                yield None
                predictor.check(deadline, queue_s)
            began = time.monotonic_ns()
            batch = batch_of(served.loaded.spec.size)
            timing.input_ns = time.monotonic_ns() - began
            context.meters.decode.observe(timing.input_ns / 1e9)
            answer = yield Ask(predictor, batch, deadline, priority, queue_s)
        except Closed:  # it was replaced meanwhile: ask for the present one
            if time.monotonic() > deadline:
                raise Unavailable(f"{name} is being replaced", "busy") from None
            yield LOAD
        except NotInTime:
            raise late(patience_s) from None
        else:
            assert answer is not None
            timing.computed(answer, len(batch))
            context.meters.predicted(name, len(batch))
            assert answer.scores is not None
            context.shadow.mirror(name, served, batch, answer, batch_of)
            return served, answer.scores
