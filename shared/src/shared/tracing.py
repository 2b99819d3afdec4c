"""OpenTelemetry spans over OTLP/HTTP, where OTEL_EXPORTER_OTLP_ENDPOINT names a collector; else nothing is begun.

Spans are recorded when what they tell of is over: whoever did it knows the times. What the SDK reads from the
environment, as OTEL_TRACES_SAMPLER, holds here too. A collector that does not answer costs spans, and nobody waits.
"""

import hashlib
import logging
import re
import time
from collections.abc import Mapping
from typing import Any

from shared.settings import Settings, SettingsError

TRACEPARENT = re.compile("00-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")  # www.w3.org/TR/trace-context
TIMEOUT_S = 2.0  # of one call to the collector
Context = Any  # opentelemetry.context.Context
Attributes = Mapping[str, str | int | float | bool]


def check(settings: Settings) -> None:
    """Raises SettingsError: a collector is named, and the extra `tracing` is not installed."""
    if settings.otel_exporter_otlp_endpoint:
        try:
            import opentelemetry.exporter.otlp.proto.http.trace_exporter
            import opentelemetry.sdk.trace  # noqa: F401
        except ImportError as e:
            raise SettingsError(f"OTEL_EXPORTER_OTLP_ENDPOINT is set, and {e.name} is not installed: install the "
                                "extra `tracing` of this service, or unset it") from None


def start(settings: Settings, service: str) -> "Tracer | None":
    """The Tracer of this process; None without a collector. Begins a thread: call it in the process that is traced.

    Raises SettingsError as `check`.
    """
    check(settings)
    endpoint = settings.otel_exporter_otlp_endpoint
    return Tracer(endpoint, service) if endpoint else None


class Tracer:
    """Safe to share among threads."""

    def __init__(self, endpoint: str, service: str):
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        logging.getLogger("opentelemetry.exporter").setLevel(logging.CRITICAL)  # one line for each lost batch
        self._propagator = TraceContextTextMapPropagator()
        self._provider = TracerProvider(resource=Resource.create({"service.name": f"lanner-{service}"}),
                                        shutdown_on_exit=False)
        exporter = OTLPSpanExporter(f"{endpoint.rstrip('/')}/v1/traces", timeout=TIMEOUT_S)
        self._provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=1000))
        self._tracer = self._provider.get_tracer("lanner")

    def span(self, name: str, began_ns: int, ended_ns: int, parent: Context, attributes: Attributes | None = None,
             error: str = "") -> Context:
        """Record what is over, times since the epoch; returns the context that makes other spans its children."""
        from opentelemetry.trace import SpanKind, StatusCode, set_span_in_context

        span = self._tracer.start_span(name, parent, SpanKind.INTERNAL, attributes, start_time=began_ns)
        if error:
            span.set_status(StatusCode.ERROR, error)
        span.end(ended_ns)
        return set_span_in_context(span, parent)

    def context_of(self, traceparent: str) -> Context:
        """Of a W3C traceparent header; of "" or a malformed one that of a new trace."""
        from opentelemetry.context import Context as Empty

        return self._propagator.extract({"traceparent": traceparent}, Empty())

    def flush(self) -> None:
        """Send what is recorded, for at most TIMEOUT_S; before a process ends."""
        self._provider.force_flush(int(1000 * TIMEOUT_S))


def traceparent_of(name: str) -> str:
    """The traceparent of what every process knows by the same name: its spans meet there without being told."""
    digest = hashlib.sha256(name.encode()).hexdigest()
    return f"00-{digest[:32]}-{digest[32:48]}-01"


def epoch_ns(monotonic_ns: int) -> int:
    """A time of this process' monotonic clock, since the epoch."""
    return time.time_ns() - time.monotonic_ns() + monotonic_ns
