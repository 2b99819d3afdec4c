"""Tells trainings on this device how slow predictions are: the p99 of what was answered in the last two seconds."""

import threading
import time

from redis import Redis

from inference.statistics import Statistics
from shared import gpu, serving

WINDOW_S = 2.0
EVERY_S = 0.25


def tell(statistics: Statistics, redis: "Redis", device: str) -> None:
    """Start the thread that says it for as long as the process lives, whenever something was answered.

    device: gpu or cpu, as in the settings; a process of the API has one GPU.
    """
    cards = gpu.find() if device == "gpu" else []
    name = cards[0].uuid if cards else "cpu"
    threading.Thread(target=_tell, args=(statistics, redis, name), name="latency", daemon=True).start()


def _tell(statistics: Statistics, redis: "Redis", device: str) -> None:
    while True:
        time.sleep(EVERY_S)
        p99_ms = statistics.p99_ms(WINDOW_S)
        if p99_ms is not None:
            serving.say(redis, device, p99_ms)
