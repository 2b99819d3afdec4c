"""What /metrics shows. One registry per app, so that two apps in a process do not share counts."""

import itertools
import threading
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Metric
from prometheus_client.core import GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector
from redis import RedisError

from shared.at_work import has_keeper, workers_of
from shared.disk import free
from shared.errors import LannerError
from shared.jobs import SERVICES
from shared.ledger import TERMINAL, Ledger
from shared.queue import queue_of
from shared.scrub import report_of
from shared.settings import Settings

SECONDS = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
IMAGES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
UNREADABLE = "unreadable"  # of a job: its record is none that this version wrote
STATES = ("waiting", "queued", "running", *TERMINAL, UNREADABLE)


class Histogram:
    """Counts of values up to each bound. prometheus_client's own takes ten times as long for one value."""

    def __init__(self, bounds: Sequence[float]):
        self._bounds = bounds
        self._counts, self._sum = [0] * (len(bounds) + 1), 0.0
        self._lock = threading.Lock()

    def observe(self, *values: float) -> None:
        with self._lock:
            for value in values:
                self._counts[bisect_left(self._bounds, value)] += 1
                self._sum += value

    def read(self) -> tuple[list[tuple[str, float]], float]:
        """(bound, count up to it) of each bound, and the sum, of one moment."""
        with self._lock:
            counts, total = list(self._counts), self._sum
        bounds = [*(str(float(bound)) for bound in self._bounds), "+Inf"]
        return list(zip(bounds, map(float, itertools.accumulate(counts)), strict=True)), total


class Histograms(Collector):
    """Of one name: by stage, or what else `label` says; or one alone under "" without a label."""

    def __init__(self, name: str, what: str, bounds: Sequence[float], stages: Sequence[str] = ("",),
                 label: str = "stage"):
        self._name, self._what, self._label = name, what, label
        self.of = {stage: Histogram(bounds) for stage in stages}

    def collect(self) -> Iterator[HistogramMetricFamily]:
        family = HistogramMetricFamily(self._name, self._what, labels=[self._label] if "" not in self.of else [])
        for stage, histogram in self.of.items():
            family.add_metric([stage] if stage else [], *histogram.read())
        yield family


class Total(Collector):
    """What several processes counted, added up."""

    def __init__(self, parts: Iterable[Iterable[Metric]]):
        self._parts = parts

    def collect(self) -> Iterator[Metric]:
        families: dict[str, Metric] = {}
        values: dict[str, dict[tuple[str, tuple[tuple[str, str], ...]], float]] = {}
        for part in self._parts:
            for family in part:
                families.setdefault(family.name, family)
                counted = values.setdefault(family.name, {})
                for sample in family.samples:
                    key = sample.name, tuple(sorted(sample.labels.items()))
                    first = sample.name.endswith("_created")  # when the first of them began to count
                    counted[key] = (min(counted.get(key, sample.value), sample.value) if first else
                                    counted.get(key, 0.0) + sample.value)
        for name, family in families.items():
            total = Metric(family.name, family.documentation, family.type)
            for (sample_name, labels), value in values[name].items():
                total.add_sample(sample_name, dict(labels), value)
            yield total


class Meters:
    """Counters and histograms that the request path writes. `registry` is of this process, `host` of all there is."""

    def __init__(self) -> None:
        self.registry, self.host = CollectorRegistry(), CollectorRegistry()
        self._requests = Counter("lanner_requests_total", "requests answered", ["method", "route", "code"],
                                 registry=self.registry)
        self._images = Counter("lanner_images_total", "images predicted", ["model"], registry=self.registry)
        self._children: dict[tuple[str, ...], Counter] = {}
        seconds = Histograms("lanner_predict_seconds", "time in decode, queue and encode per request, in compute per "
                             "batch", SECONDS, ("decode", "queue", "compute", "encode"))
        batch = Histograms("lanner_batch_images", "images run together", IMAGES)
        self.decode, self._queue, self._compute, self.encode = seconds.of.values()
        self._batch = batch.of[""]
        self.registry.register(seconds)
        self.registry.register(batch)
        shadow = Histograms("lanner_shadow_seconds", "compute of the runs that mirrored images were in", SECONDS,
                            ("production", "candidate"), "alias")
        self.registry.register(shadow)
        self.shadow_seconds = shadow.of
        self._shadowed = Counter("lanner_shadow_images_total", "live images picked for the candidate",
                                 ["model", "outcome"], registry=self.registry)
        self._disagreed = Counter("lanner_shadow_disagreements_total", "compared images with two labels", ["model"],
                                  registry=self.registry)
        self.loaded = Gauge("lanner_loaded_variants", "variants in memory", registry=self.registry)
        self.loaded_bytes = Gauge("lanner_loaded_bytes", "bytes of the files of variants in memory",
                                  registry=self.registry)

    def families(self) -> list[Metric]:
        """What this process counted."""
        return list(self.registry.collect())

    def answered(self, method: str, route: str, code: int, requests: int = 1) -> None:
        """Count requests. The route is a rule of the API, or "none"."""
        self._child(self._requests, method, route, str(code)).inc(requests)

    def predicted(self, model: str, images: int) -> None:
        self._child(self._images, model).inc(images)

    def ran(self, images: int, seconds: float, waited: Sequence[float], succeeded: bool) -> None:
        """Count a run: how many images, how long, and how long each of its requests had waited."""
        self._queue.observe(*waited)
        if succeeded:
            self._compute.observe(seconds)
            self._batch.observe(images)

    def shadowed(self, model: str, outcome: str, images: int, disagreements: int = 0) -> None:
        """Count picked images. outcome: compared, dropped or failed."""
        self._shadowed.labels(model, outcome).inc(images)
        self._disagreed.labels(model).inc(disagreements)

    def _child(self, counter: Counter, *labels: str) -> Counter:
        """Finding a labelled counter takes longer than counting. There are as many as there are in the registry."""
        child = self._children.get(labels)
        if child is None:
            child = self._children[labels] = counter.labels(*labels)
        return child


class Jobs(Collector):
    """Job counts by state from the ledger, queue lengths, workers and keeper from Redis, and the volume's free bytes;
    read at the scrape.
    """

    def __init__(self, ledger: Ledger, settings: Settings):
        self._ledger, self._settings = ledger, settings
        self._over: dict[str, str] = {}  # terminal states never change, so each is read once

    def collect(self) -> Iterator[GaugeMetricFamily]:
        counts = dict.fromkeys(STATES, 0)
        for job_id in self._ledger.ids():
            state = self._over.get(job_id) or self._state(job_id)
            if state in TERMINAL:
                self._over[job_id] = state
            counts[state] += 1
        jobs = GaugeMetricFamily("lanner_jobs", "accepted jobs by state", labels=["state"])
        for state, count in counts.items():
            jobs.add_metric([state], count)
        yield jobs
        yield GaugeMetricFamily("lanner_disk_free_bytes", "that may still be written to the volume",
                                float(free(self._settings.artifacts)))
        damaged = len((report_of(self._settings.artifacts) or {}).get("damaged", []))
        yield GaugeMetricFamily("lanner_damaged_artifacts", "that the last check of every file found", float(damaged))
        queues = GaugeMetricFamily("lanner_queue_length", "deliveries waiting for a worker", labels=["queue"])
        workers = GaugeMetricFamily("lanner_workers", "that were heard of lately", labels=["queue"])
        try:
            for service in SERVICES:
                length = self._ledger.redis.llen(queue_of(service, self._ledger.redis).key)
                queues.add_metric([service], float(length))
                at_work = workers_of(self._ledger.redis, service, self._settings.worker_ttl_s)
                workers.add_metric([service], float(len(at_work)))
            keeper = float(has_keeper(self._ledger.redis))
        except RedisError:
            return
        yield queues
        yield workers
        yield GaugeMetricFamily("lanner_keeper", "1 where a keeper is at work", keeper)

    def _state(self, job_id: str) -> str:
        try:
            return self._ledger.state(job_id)
        except LannerError:
            return UNREADABLE
