"""What /metrics shows. One registry per app, so that two apps in a process do not share counts."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector
from redis import RedisError

from shared.jobs import KINDS
from shared.ledger import TERMINAL, Ledger
from shared.queue import queue_of

SECONDS = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
IMAGES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
STATES = ("waiting", "queued", "running", *TERMINAL)


class Meters:
    """Counters and histograms that the request path writes."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("lanner_requests_total", "requests answered", ["method", "route", "code"],
                                registry=self.registry)
        seconds = Histogram("lanner_predict_seconds", "time in decode and queue per request, in compute per batch",
                                 ["stage"], buckets=SECONDS, registry=self.registry)
        self.decode, self.queue, self.compute = (seconds.labels(s) for s in ("decode", "queue", "compute"))
        self.batch = Histogram("lanner_batch_images", "images run together", buckets=IMAGES, registry=self.registry)
        self.images = Counter("lanner_images_total", "images predicted", ["model"], registry=self.registry)
        self.loaded = Gauge("lanner_loaded_variants", "variants in memory", registry=self.registry)


class Jobs(Collector):
    """Job counts by state from the ledger, queue lengths from Redis; read at the scrape."""

    def __init__(self, ledger: Ledger):
        self._ledger = ledger
        self._over: dict[str, str] = {}  # terminal states never change, so each is read once

    def collect(self) -> Iterator[GaugeMetricFamily]:
        counts = dict.fromkeys(STATES, 0)
        for job_id in self._ledger.ids():
            state = self._over.get(job_id) or self._ledger.state(job_id)
            if state in TERMINAL:
                self._over[job_id] = state
            counts[state] += 1
        jobs = GaugeMetricFamily("lanner_jobs", "accepted jobs by state", labels=["state"])
        for state, count in counts.items():
            jobs.add_metric([state], count)
        yield jobs
        queues = GaugeMetricFamily("lanner_queue_length", "deliveries waiting for a worker", labels=["queue"])
        try:
            for cls in KINDS.values():
                length = self._ledger.redis.llen(queue_of(cls.SERVICE, self._ledger.redis).key)
                queues.add_metric([cls.SERVICE], float(length))
        except RedisError:
            return
        yield queues
