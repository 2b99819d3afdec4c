"""How slow predictions are just now: said by the API, heard by trainings that compute on the same device.

A key of Redis for each device, gone a second after it was last said: an API that is idle or dead slows nobody down.
"""

from collections.abc import Iterable
from contextlib import suppress

from redis import Redis, RedisError

KEY = "lanner:serving:{}"  # of a GPU's uuid, or "cpu"
KEPT_MS = 1000


def say(redis: "Redis", device: str, p99_ms: float) -> None:
    """Without an answer from Redis nobody hears it, and trainings go on as if nothing were asked."""
    with suppress(RedisError):
        redis.set(KEY.format(device), f"{p99_ms:.3f}", px=KEPT_MS)


def p99_ms(redis: "Redis", devices: Iterable[str]) -> float | None:
    """Of the slowest of these devices; None where none was asked for a prediction. Raises RedisError."""
    said = redis.mget([KEY.format(device) for device in devices])
    return max((float(value) for value in said if value), default=None)  # type: ignore[union-attr]
