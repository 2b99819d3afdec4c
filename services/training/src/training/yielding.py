"""One GPU for all: a training gives way while predictions on its device are slower than SERVING_P99_MS.

A GPU shares its time among processes by itself, also within a program, so that predictions within the target leave a
training alone. Once they are over it programs get short, and after each the training pauses as long as that took: it
computes for half of the time at least, whatever is asked of the server. A server that is idle slows nobody down.
"""

import time
from collections.abc import Callable

from redis import RedisError

from shared import gpu, serving
from shared.queue import connect
from shared.settings import Settings

ANSWER_S = 0.4  # that Redis may take for an answer
LOOK_S = 0.1  # between two looks
REST_S = 5.0  # until the next one, when Redis did not answer
MOST_S = 1.0  # of a pause
# Of a program while predictions are too slow. Not less: on an H100 programs of 2.5 ms did a seventh of the steps, and
# predictions beside them had twice the p99 of those beside programs of a second (docs/benchmarks/gpu.md).
SHORT_S = 0.05
HOLD_S = 10.0  # pauses go on for so long after the last time over the target: without them it would be over again


class Yielding:
    """What one training knows of the predictions beside it. `seconds`: how long it has paused for them."""

    def __init__(self, settings: Settings):
        self.seconds = 0.0
        self._target_ms = settings.serving_p99_ms
        self._devices = _devices(settings.device) if self._target_ms else []
        self._redis = connect(settings, ANSWER_S) if self._devices else None
        self._p99_ms: float | None = None
        self._look_at = self._slow_until = 0.0
        self._resumed = time.monotonic()

    def call_s(self, usual: float) -> float:
        """How long one program may take now."""
        return min(usual, SHORT_S) if self.is_wanted else usual

    def give_way(self, check: Callable[[], None]) -> None:
        """Pause if predictions are or were too slow, at most as long as was computed since the last pause.

        check: called about ten times a second meanwhile; may raise.
        """
        began = now = time.monotonic()
        until = began + min(began - self._resumed, MOST_S)
        while now < until and self.is_wanted:
            check()
            time.sleep(min(LOOK_S, until - now))
            now = time.monotonic()
        self.seconds += now - began
        self._resumed = now

    @property
    def is_wanted(self) -> bool:
        """Whether predictions are too slow, or were HOLD_S ago."""
        self._look()
        return self._p99_ms is not None and time.monotonic() < self._slow_until

    def _look(self) -> None:
        now = time.monotonic()
        if self._redis is None or now < self._look_at:
            return
        try:
            self._p99_ms, self._look_at = serving.p99_ms(self._redis, self._devices), now + LOOK_S
        except RedisError:
            self._p99_ms, self._look_at = None, now + REST_S
        if self._p99_ms is not None and self._p99_ms > self._target_ms:
            self._slow_until = now + HOLD_S


def _devices(device: str) -> list[str]:
    """As the API names them: the GPUs of this job's lease, or the CPU."""
    return [card.uuid for card in gpu.find()] if device == "gpu" else ["cpu"]
