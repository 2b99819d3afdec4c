"""How slow predictions are just now: said by the API, heard by trainings that compute on the same device.

A hash in Redis for each device, an entry for each process that says it, all gone a second after the last one spoke: an
API that is idle or dead slows nobody down.
"""

import os
import socket
import time
from collections.abc import Iterable
from contextlib import suppress

from redis import Redis, RedisError

KEY = "lanner:serving:{}"  # of a GPU's uuid, or "cpu"
KEPT_MS = 1000


def say(redis: "Redis", device: str, p99_ms: float, speaker: str = "") -> None:
    """Without an answer from Redis nobody hears it, and trainings go on as if nothing were asked.

    speaker: whose p99 this is, without it this process.
    """
    key, who = KEY.format(device), speaker or f"{socket.gethostname()}:{os.getpid()}"
    with suppress(RedisError), redis.pipeline() as both:
        both.hset(key, who, f"{p99_ms:.3f} {time.time():.3f}")
        both.pexpire(key, KEPT_MS)
        both.execute()


def p99_ms(redis: "Redis", devices: Iterable[str]) -> float | None:
    """Of the slowest process on these devices; None where none was asked for a prediction. Raises RedisError."""
    with redis.pipeline(transaction=False) as all_:
        for device in devices:
            all_.hvals(KEY.format(device))
        return max((p99 for said in all_.execute() for p99 in _present(said)), default=None)


def _present(said: Iterable[str | bytes]) -> list[float]:
    """What is not older than KEPT_MS beside the latest: an entry of a process that ended stays while others speak."""
    found = [(float(p99), float(at)) for p99, at in (value.split() for value in said)]
    latest = max((at for _, at in found), default=0.0)
    return [p99 for p99, at in found if at > latest - KEPT_MS / 1000]
