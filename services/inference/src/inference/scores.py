"""From a request's images to their scores, for every route that predicts: find the Variant, decode, submit, wait."""

import time
from collections.abc import Callable

import numpy as np

from inference.context import Api
from inference.loaded import Served
from inference.predictor import LAST, Closed, NotInTime
from inference.statistics import Timing
from shared.errors import Unavailable

DEADLINE_S = 10.0
PRODUCTION = "production"  # the alias that answers for a Name alone


def model_called(name: str, alias: str) -> str:
    """What statistics call it: NAME, or NAME@ALIAS for another alias than production."""
    return name if alias == PRODUCTION else f"{name}@{alias}"


def scores(context: Api, timing: Timing, name: str, alias: str, version: int | None, variant: str | None,
           batch_of: Callable[[int], np.ndarray], patience_s: float = DEADLINE_S,
           priority: int = LAST) -> tuple[Served, np.ndarray]:
    """What answered, and float32 [N, classes]. batch_of(size): the request's images, uint8 [N, size, size, 3].

    Raises, beside what `LoadedModels.resolve`, `Predictor.answer` and `batch_of` do:
        Unavailable: no answer within `patience_s`.
    """
    deadline = time.monotonic() + patience_s
    while True:
        served = context.loaded.resolve(name, alias, version, variant)
        timing.found(served.version)
        began = time.monotonic_ns()
        batch = batch_of(served.loaded.spec.size)
        timing.input_ns = time.monotonic_ns() - began
        context.meters.decode.observe(timing.input_ns / 1e9)
        try:
            answer = served.loaded.predictor.answer(batch, deadline, priority)
        except Closed:  # it was replaced between the two lines above: ask for the present one
            if time.monotonic() > deadline:
                raise Unavailable(f"{name} is being replaced", "busy") from None
        except NotInTime:
            raise Unavailable(f"no answer within {patience_s:g} s: send fewer images, or later", "deadline") from None
        else:
            timing.computed(answer, len(batch))
            context.meters.predicted(name, len(batch))
            assert answer.scores is not None
            context.shadow.mirror(name, served, batch, answer, batch_of)
            return served, answer.scores
