"""The deployment's state under the names of SGLang's metrics, which its dashboards and routers look
for, and SGLang's own metrics."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from crosspool.observability.families import add_histogram
from crosspool.observability.histograms import Histogram, ModelHistograms
from crosspool.transport.inspection import ModelStatus

_GAUGES: tuple[tuple[str, str, Callable[[ModelStatus], float]], ...] = (
    ("num_running_reqs", "Requests admitted and not finished.", lambda m: m.running),
    ("num_queue_reqs", "Requests queued.", lambda m: m.waiting - m.compiling),
    ("num_grammar_queue_reqs", "Requests whose grammar is compiled.", lambda m: m.compiling),
    ("num_used_tokens", "Tokens of KV memory promised to requests.", lambda m: m.used_tokens),
    ("max_total_num_tokens", "Tokens that the KV pool could hold.", lambda m: m.pool_tokens),
    ("token_usage", "Share of the KV pool promised to requests.", lambda m: m.token_usage),
    ("gen_throughput", "Tokens sampled per second.", lambda m: m.tokens_per_second),
    ("cache_hit_rate", "Share of prompt tokens found cached.", lambda m: m.cache_hit_rate),
)
"""Gauges of SGLang's scheduler."""
_ENGINE = {"engine_type": "unified"}
_RANKS = {**_ENGINE, "tp_rank": "0", "pp_rank": "0", "moe_ep_rank": "0"}
"""Labels that SGLang's scheduler gives each of its metrics beside ``model_name``; there is one of
ours. Its tokenizer manager gives the first alone."""
_QUEUE = ("queue_time_seconds", "Time until the request was admitted.")

_HistogramOf = Callable[[ModelHistograms], Histogram]
_HISTOGRAMS: tuple[tuple[str, str, _HistogramOf], ...] = (
    ("time_to_first_token_seconds", "Time to first token.", lambda m: m.first_token_seconds),
    ("inter_token_latency_seconds", "Time between tokens.", lambda m: m.between_tokens_seconds),
    ("e2e_request_latency_seconds", "End-to-end time.", lambda m: m.end_to_end_seconds),
    ("prompt_tokens_histogram", "Lengths of prompts.", lambda m: m.prompt_tokens),
    ("generation_tokens_histogram", "Lengths of outputs.", lambda m: m.output_tokens),
)
_COUNTERS: tuple[tuple[str, str, Callable[[ModelHistograms], float]], ...] = (
    ("prompt_tokens", "Prompt tokens of requests that ended.", lambda m: m.prompt_tokens.sum),
    ("generation_tokens", "Tokens sampled for them.", lambda m: m.output_tokens.sum),
    ("num_requests", "Requests that ended.", lambda m: m.end_to_end_seconds.count),
)
"""Histograms and counters of SGLang's tokenizer manager."""


class OfAllProcesses(Collector):
    """What SGLang's own collectors have counted of ``models``, summed over all processes, which
    share ``PROMETHEUS_MULTIPROC_DIR``. The processes' files have that of models that have gone,
    too."""

    def __init__(self, models: Collection[str]) -> None:
        self._models = {None, *models}

    def collect(self) -> Iterator[Metric]:
        try:
            found = list(MultiProcessCollector(None).collect())
        except FileNotFoundError:  # a process died after its files were listed, and they are gone
            found = list(MultiProcessCollector(None).collect())
        for metric in found:
            metric.samples = [
                sample
                for sample in metric.samples
                if sample.labels.get("model_name") in self._models
            ]
            if metric.samples:
                yield metric


class SGLangNames(Collector):
    """What SGLang's scheduler and tokenizer managers would have told of each model. With
    ``collects``, SGLang's own collectors tell what tokenizer managers do."""

    def __init__(
        self,
        models: Sequence[ModelStatus],
        histograms: Sequence[ModelHistograms],
        *,
        collects: bool,
    ) -> None:
        self._models = models
        self._histograms = histograms
        self._collects = collects

    def collect(self) -> Iterator[Metric]:
        labels = ["model_name", *_RANKS]
        for name, text, value in _GAUGES:
            gauge = GaugeMetricFamily(f"sglang:{name}", text, labels=labels)
            for model in self._models:
                gauge.add_metric([model.name, *_RANKS.values()], value(model))
            yield gauge
        name, text = _QUEUE
        queue = HistogramMetricFamily(f"sglang:{name}", text, labels=labels)
        for of in self._histograms:
            add_histogram(queue, [of.name, *_RANKS.values()], of.queue_seconds)
        yield queue
        if not self._collects:
            yield from self._of_tokenizers()

    def _of_tokenizers(self) -> Iterator[Metric]:
        labels = ["model_name", *_ENGINE]
        for name, text, histogram in _HISTOGRAMS:
            family = HistogramMetricFamily(f"sglang:{name}", text, labels=labels)
            for of in self._histograms:
                add_histogram(family, [of.name, *_ENGINE.values()], histogram(of))
            yield family
        for name, text, value in _COUNTERS:
            counter = CounterMetricFamily(f"sglang:{name}", text, labels=labels)
            for of in self._histograms:
                if of.end_to_end_seconds.count:
                    counter.add_metric([of.name, *_ENGINE.values()], value(of))
            yield counter
