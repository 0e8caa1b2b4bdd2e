"""A collector of OpenTelemetry traces: the service of OTLP over gRPC, which keeps what it gets."""

from __future__ import annotations

import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as messages
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as service


@dataclass(frozen=True)
class CollectedSpan:
    """Times are in seconds since 1970."""

    trace: str
    span: str
    parent: str
    name: str
    begin: float
    end: float
    attributes: dict[str, Any]
    error: str | None
    service: str


class Collector:
    """Serves at ``endpoint`` within ``with``."""

    def __init__(self) -> None:
        self._spans: list[CollectedSpan] = []
        self._lock = threading.Lock()
        self._server = grpc.server(ThreadPoolExecutor(2))
        add: Any = service.add_TraceServiceServicer_to_server
        add(self, self._server)
        self.endpoint = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"

    def Export(self, request: Any, context: Any) -> Any:
        for of_process in request.resource_spans:
            name = _attributes(of_process.resource.attributes)["service.name"]
            for of_library in of_process.scope_spans:
                with self._lock:
                    self._spans += [_collected(span, name) for span in of_library.spans]
        return messages.ExportTraceServiceResponse()

    def trace(
        self, identity: str, *names: str, count: int = 1, seconds: float = 60
    ) -> list[CollectedSpan]:
        """The spans of one trace, in the order of their beginnings, once ``count`` of each of
        ``names`` are among them."""
        deadline = time.monotonic() + seconds
        while True:
            with self._lock:
                found = [span for span in self._spans if span.trace == identity]
            there = Counter(span.name.strip() for span in found)
            if all(there[name] >= count for name in names):
                return sorted(found, key=lambda span: span.begin)
            assert time.monotonic() < deadline, found
            time.sleep(0.05)

    def __enter__(self) -> Collector:
        self._server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stop(grace=1).wait(5)


def _attributes(pairs: Any) -> dict[str, Any]:
    return {pair.key: getattr(pair.value, pair.value.WhichOneof("value")) for pair in pairs}


def _collected(span: Any, name: str) -> CollectedSpan:
    return CollectedSpan(
        trace=span.trace_id.hex(),
        span=span.span_id.hex(),
        parent=span.parent_span_id.hex(),
        name=span.name,
        begin=span.start_time_unix_nano / 1e9,
        end=span.end_time_unix_nano / 1e9,
        attributes=_attributes(span.attributes),
        error=span.status.message if span.status.code == span.status.STATUS_CODE_ERROR else None,
        service=name,
    )
