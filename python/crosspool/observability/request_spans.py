"""OpenTelemetry spans of what requests went through in the scheduler."""

from __future__ import annotations

import logging
import os
import re
import threading
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, cast

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

log = logging.getLogger(__name__)

MODULES = (
    "opentelemetry.sdk",
    "opentelemetry.exporter.otlp.proto.grpc",
    "opentelemetry.exporter.otlp.proto.http",
)
"""What tracing needs: SGLang's front end asks for both exporters, whichever it uses."""
OTLP_ENDPOINT = "localhost:4317"
"""Where SGLang looks for a collector if it is not told."""
MOST_WAITING = 8192
"""Spans that may wait for the collector; further ones are dropped."""
_DELAY_MS = 500
"""Time that a span waits for others to be sent with it, as in SGLang."""
FLUSH_SECONDS = 2.0
"""Time that the last spans of a process have to reach the collector."""
_TRACEPARENT = re.compile(rb"00-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")


class Stretch(Protocol):
    """A part of a request's time. Times are ``time.monotonic()``'s."""

    @property
    def name(self) -> str: ...

    @property
    def begin(self) -> float: ...

    @property
    def end(self) -> float: ...


def read_traceparent(data: bytes) -> str | None:
    """``data`` as the name of a span in W3C's Trace Context; None where it is something else."""
    return data.decode() if _TRACEPARENT.fullmatch(data) else None


def service_name(arguments: Mapping[str, Any]) -> str:
    """The name under which a deployment's processes send spans, from its arguments for SGLang."""
    given: str | None = arguments.get("otlp_service_name")
    return given or os.environ.get("OTEL_SERVICE_NAME") or "crosspool"


class RequestSpans:
    """Hands spans to ``exporter`` in a thread of its own: nobody waits for the collector. One
    thread at a time may call it. What the exporter does not take is counted in :attr:`dropped`, and
    logged once."""

    def __init__(self, exporter: SpanExporter, service: str) -> None:
        from opentelemetry import trace
        from opentelemetry.sdk.resources import SERVICE_NAME, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._exporter = _CountingExporter(exporter)
        resource = Resource.create({SERVICE_NAME: service})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(
            BatchSpanProcessor(
                cast("SpanExporter", self._exporter),
                max_queue_size=MOST_WAITING,
                schedule_delay_millis=_DELAY_MS,
            )
        )
        self._tracer = self._provider.get_tracer("crosspool")
        self._extract = TraceContextTextMapPropagator().extract
        self._error = trace.StatusCode.ERROR
        self._handed = 0
        self._refused = 0
        self._has_told = False

    @property
    def dropped(self) -> int:
        """Spans that will never reach the collector: too many waited for it, or it failed."""
        return self._refused + self._exporter.failed

    def add(
        self,
        traceparent: str,
        stretches: Sequence[Stretch],
        attributes: Mapping[str, str | int],
        error: str | None,
    ) -> None:
        """Makes a span of each of a request's ``stretches``, under the span ``traceparent``.
        ``error`` says why the request failed, if it did: the last of them has it."""
        waiting = self._handed - self._exporter.done
        if waiting + len(stretches) > MOST_WAITING:
            self._refused += len(stretches)
        else:
            context = self._extract({"traceparent": traceparent})
            offset = time.time_ns() - time.monotonic_ns()
            for number, stretch in enumerate(stretches, 1):
                span = self._tracer.start_span(
                    stretch.name,
                    context,
                    attributes=attributes,
                    start_time=offset + int(stretch.begin * 1e9),
                )
                if error is not None and number == len(stretches):
                    span.set_status(self._error, error)
                self._handed += span.is_recording()
                span.end(offset + int(stretch.end * 1e9))
        if self.dropped and not self._has_told:
            self._has_told = True
            log.warning(
                "the collector of traces does not take all spans; crosspool_spans_dropped_total "
                "counts those that are lost"
            )

    def close(self) -> None:
        """Sends what waits, in :data:`FLUSH_SECONDS` at most."""
        shut_down(self._provider)


def shut_down(provider: TracerProvider) -> None:
    """Has ``provider`` send what waits, in :data:`FLUSH_SECONDS` at most; its own bound is that of
    an unreachable collector."""
    thread = threading.Thread(target=provider.shutdown, name="last spans", daemon=True)
    thread.start()
    thread.join(FLUSH_SECONDS)


class _CountingExporter:
    """A ``SpanExporter``, without its class, which is imported only where requests are traced: the
    exporter, with counts of the spans that it is done with and of those that were lost."""

    def __init__(self, exporter: SpanExporter) -> None:
        self._exporter = exporter
        self.done = 0
        self.failed = 0

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        from opentelemetry.sdk.trace.export import SpanExportResult

        result = SpanExportResult.FAILURE
        try:
            result = self._exporter.export(spans)
        finally:
            self.done += len(spans)
            if result is not SpanExportResult.SUCCESS:
                self.failed += len(spans)
        return result

    def shutdown(self) -> None:
        self._exporter.shutdown()

    def force_flush(self, timeout_millis: int = 30000) -> bool:
        flushed: bool = self._exporter.force_flush(timeout_millis)
        return flushed
