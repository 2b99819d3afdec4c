"""How work that nobody waits for gives way to live images."""

import time
from collections.abc import Callable

LOOK_S = 0.001


def give_way(busy: Callable[[], bool], until: float) -> None:
    """Return once it is not busy, or at `until` (time.monotonic())."""
    while busy() and time.monotonic() < until:
        time.sleep(LOOK_S)


class Pace:
    """Between two pieces of a long work: rest for as long as the last one took, while live images run."""

    def __init__(self, busy: Callable[[], bool]):
        self._busy, self._since = busy, time.monotonic()

    def rest(self) -> None:
        now = time.monotonic()
        give_way(self._busy, now + (now - self._since))
        self._since = time.monotonic()
