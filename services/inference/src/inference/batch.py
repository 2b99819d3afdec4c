"""Images that were asked about, and what runs together."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from shared.runtimes import Begun


@dataclass
class Run:
    """One batch: (images, ns) of each piece that the Session ran. `counted` by whoever adds it up first."""

    pieces: list[tuple[int, int]]
    counted: bool = False


@dataclass(slots=True, eq=False)
class Answer:
    """Images that were asked about; once `done`, their scores, float32 [N, classes], how long they waited, and where.

    since: when the request began to wait; also: when others did, whose images these are as well.
    turn: held until it is done, or until its thread shall run what waits (`leads`). None where no thread waits for it.
    told: called instead, when it is done, or is `gone` because its deadline passed.
    """

    images: np.ndarray
    deadline: float = float("inf")
    since: float = field(default_factory=time.monotonic)
    also: Sequence[float] = ()
    scores: np.ndarray | None = None
    error: Exception | None = None
    run: Run | None = None
    waited_ns: int = 0
    done: bool = False
    leads: bool = False
    gone: bool = False
    turn: Any = None
    told: "Callable[[Answer], None] | None" = None


@dataclass(slots=True)
class Batch:
    """What runs together, once it has begun. began: of time.monotonic()."""

    answers: Sequence[Answer]
    count: int
    began: float
    run: Run
    begun: Begun | None = None
    error: Exception | None = None

    def is_over(self) -> bool:
        return self.begun is None or self.begun.is_over()
