"""Spans on their way to a collector, whatever that does: nobody waits for it, and what is lost is
counted."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence

import pytest
from crosspool.observability import request_spans
from crosspool.observability.request_spans import (
    MOST_WAITING,
    RequestSpans,
    read_traceparent,
    service_name,
)
from crosspool.scheduler.request_timeline import Phase

pytest.importorskip("opentelemetry.sdk", reason="needs the extra otel")

from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

PARENT = f"00-{1:032x}-{2:016x}-01"
PHASES = [Phase("queue", 1.0, 1.5), Phase("prefill", 1.5, 3.0)]


class Stuck(SpanExporter):
    """A collector that does not answer until it is let go."""

    def __init__(self) -> None:
        self.go = threading.Event()

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.go.wait(60)
        return SpanExportResult.SUCCESS

    def shutdown(self) -> None:
        self.go.set()


class Refusing(SpanExporter):
    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        return SpanExportResult.FAILURE


def test_phases_become_spans_of_the_clients_trace() -> None:
    kept = InMemorySpanExporter()
    spans = RequestSpans(kept, "here")
    spans.add(PARENT, PHASES, {"rid": "r"}, "it broke")
    spans.close()
    queue, prefill = kept.get_finished_spans()
    assert [queue.name, prefill.name] == ["queue", "prefill"]
    for span in (queue, prefill):
        assert span.context.trace_id == 1 and span.parent and span.parent.span_id == 2
        assert span.attributes == {"rid": "r"}
        assert span.resource.attributes["service.name"] == "here"
    assert queue.start_time and prefill.end_time and queue.end_time
    assert prefill.end_time - queue.start_time == pytest.approx(2.0e9, abs=1e6)
    assert queue.start_time + time.monotonic_ns() == pytest.approx(time.time_ns() + 1e9, abs=1e8)
    assert queue.status.is_unset and prefill.status.description == "it broke"
    assert spans.dropped == 0


def test_a_trace_that_is_not_sampled_has_no_spans() -> None:
    kept = InMemorySpanExporter()
    spans = RequestSpans(kept, "here")
    spans.add(PARENT[:-1] + "0", PHASES, {}, None)
    spans.close()
    assert not kept.get_finished_spans() and spans.dropped == 0


def test_nobody_waits_for_a_collector_that_is_stuck(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(request_spans, "FLUSH_SECONDS", 0.2)
    stuck = Stuck()
    spans = RequestSpans(stuck, "here")
    with caplog.at_level(logging.WARNING):
        for _ in range(MOST_WAITING):
            spans.add(PARENT, PHASES, {}, None)
    assert not stuck.go.is_set()
    assert spans.dropped == MOST_WAITING
    assert [record.name for record in caplog.records] == [request_spans.__name__]
    spans.close()
    assert not stuck.go.is_set()
    stuck.go.set()


def test_spans_that_the_collector_refuses_are_counted() -> None:
    spans = RequestSpans(Refusing(), "here")
    spans.add(PARENT, PHASES, {}, None)
    spans.close()
    assert spans.dropped == 2


@pytest.mark.parametrize(
    "data", [b"", b"\\x80\\x04pickled", PARENT.encode() + b"x", PARENT[1:].encode()]
)
def test_what_is_no_traceparent_is_none(data: bytes) -> None:
    assert read_traceparent(data) is None
    assert read_traceparent(PARENT.encode()) == PARENT


def test_the_service_has_the_name_that_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OTEL_SERVICE_NAME", raising=False)
    assert service_name({}) == "crosspool"
    monkeypatch.setenv("OTEL_SERVICE_NAME", "ours")
    assert service_name({}) == "ours"
    assert service_name({"otlp_service_name": "given"}) == "given"
