"""SGLang's metrics of its tokenizer managers, of which one process has several."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from sglang.srt.observability.metrics_collector import TokenizerMetricsCollector

from crosspool.frontend import private


def _shared(make: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps ``make`` so that it makes a metric once per name and returns the same one later."""
    made: dict[str, Any] = {}

    def get(**arguments: Any) -> Any:
        name = arguments["name"]
        if name not in made:
            made[name] = make(**arguments)
        return made[name]

    return get


@functools.cache
def shared_metrics() -> type[TokenizerMetricsCollector]:
    """SGLang's metrics of a tokenizer manager, with one set of metrics for all models of the
    process. The label ``model_name`` tells them apart."""
    # Here, because it may be imported only once PROMETHEUS_MULTIPROC_DIR is set.
    import prometheus_client

    return private.with_metric_classes(
        TokenizerMetricsCollector,
        _shared(prometheus_client.Counter),
        _shared(prometheus_client.Gauge),
        _shared(prometheus_client.Histogram),
    )
