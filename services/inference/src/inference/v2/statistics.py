"""Statistics as Triton tells them, in JSON and for Prometheus."""

from collections.abc import Iterator

from prometheus_client.core import UnknownMetricFamily
from prometheus_client.registry import Collector

from inference.statistics import Figures, Model, Statistics, Sum
from inference.v2.messages import Object

NONE = {"count": 0, "ns": 0}  # there is no cache of answers


def model_stats(model: Model, figures: Figures) -> Object:
    """One entry of `model_stats`. What memory a model takes is not known, so none is told."""
    return {"name": model[0], "version": str(model[1]), "last_inference": figures.last_ms,
            "inference_count": figures.images, "execution_count": figures.executions,
            "inference_stats": {"success": _sum(figures.success), "fail": _sum(figures.fail),
                                "queue": _sum(figures.queue), "compute_input": _sum(figures.input),
                                "compute_infer": _sum(figures.infer), "compute_output": _sum(figures.output),
                                "cache_hit": NONE, "cache_miss": NONE},
            "batch_stats": [{"batch_size": size, "compute_input": _sum(b.input), "compute_infer": _sum(b.infer),
                             "compute_output": _sum(b.output)} for size, b in sorted(figures.batches.items())],
            "memory_usage": []}


def _sum(figure: Sum) -> Object:
    return {"count": figure.count, "ns": figure.ns}


class ModelMetrics(Collector):
    """nv_inference_*, of no type: as counters their names would have to end in _total, and Triton's don't."""

    def __init__(self, statistics: Statistics):
        self._statistics = statistics

    def collect(self) -> Iterator[UnknownMetricFamily]:
        models = self._statistics.snapshot()
        for name, what, value in (
                ("request_success", "requests answered", lambda f: f.success.count),
                ("request_failure", "requests failed", lambda f: f.fail.count),
                ("count", "images predicted", lambda f: f.images),
                ("exec_count", "runs of the model", lambda f: f.executions),
                ("pending_request_count", "requests waiting or running", lambda f: f.pending),
                ("request_duration_us", "time of requests", lambda f: (f.success.ns + f.fail.ns) // 1000),
                ("queue_duration_us", "time of requests in the queue", lambda f: f.queue.ns // 1000),
                ("compute_input_duration_us", "time to decode", lambda f: f.input.ns // 1000),
                ("compute_infer_duration_us", "time of the runs, once per request", lambda f: f.infer.ns // 1000),
                ("compute_output_duration_us", "time to encode", lambda f: f.output.ns // 1000)):
            family = UnknownMetricFamily(f"nv_inference_{name}", what, labels=["model", "version"])
            for (model, version), figures in sorted(models.items()):
                family.add_metric([model, str(version)], value(figures))
            yield family
