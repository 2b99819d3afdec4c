"""A prediction as a generator: it says what it waits for, and whoever drives it decides how that is waited for.

Flask's routes drive it in their thread, `finish`; the front, which has one thread for all, lets others go on meanwhile.
"""

from collections.abc import Generator
from dataclasses import dataclass
from enum import Enum
from typing import TypeVar

import numpy as np

from inference.batch import Answer
from inference.predictor import LAST, Predictor

T = TypeVar("T")


@dataclass(slots=True)
class Ask:
    """Images for a Predictor; what is sent back is their Answer, or what `Predictor.answer` raises."""

    predictor: Predictor
    images: np.ndarray
    deadline: float = float("inf")
    priority: int = LAST
    queue_s: float = float("inf")


class Aside(Enum):
    """What comes next takes long. None stands for reading and decoding what was sent, the only one that may be refused.

    LOAD: it may load a Variant, or wait for others that load. WRITE: it writes an answer.
    """

    LOAD, WRITE = range(2)


LOAD, WRITE = Aside.LOAD, Aside.WRITE
Steps = Generator[Ask | Aside | None, Answer | None, T]


def finish(steps: Steps[T]) -> T:
    """Go on to the end in this thread. Raises what the steps do."""
    answer: Answer | None = None
    error: Exception | None = None
    while True:
        try:
            ask = steps.send(answer) if error is None else steps.throw(error)
        except StopIteration as e:
            result: T = e.value
            return result
        answer = error = None
        if isinstance(ask, Ask):
            try:
                answer = ask.predictor.answer(ask.images, ask.deadline, ask.priority, ask.queue_s)
            except Exception as e:
                error = e
