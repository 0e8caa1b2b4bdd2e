"""The deployment's state as Prometheus metrics, ``crosspool_*``."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple, get_args

from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

from crosspool.observability.families import add_histogram
from crosspool.observability.histograms import ModelHistograms
from crosspool.observability.sglang_metrics import OfAllProcesses, SGLangNames
from crosspool.transport.inspection import (
    DeviceCounters,
    DeviceStatus,
    ModelState,
    ModelStatus,
    RankSnapshot,
    Status,
    WeightUse,
)

_MODEL_GAUGES = (
    ("waiting", "crosspool_requests_waiting", "Requests queued."),
    ("running", "crosspool_requests_running", "Requests admitted and not finished."),
    ("paused", "crosspool_requests_paused", "Running requests that wait for more KV memory."),
    ("mapped_bytes", "crosspool_kv_mapped_bytes", "KV memory mapped for the model."),
    ("promised_bytes", "crosspool_kv_promised_bytes", "KV memory promised to running requests."),
    ("cached_bytes", "crosspool_kv_cached_bytes", "KV memory of cached prefixes not in use."),
)
_MODEL_COUNTERS = (
    ("requests", "crosspool_requests", "Requests received, refused ones included."),
    ("admitted", "crosspool_requests_admitted", "Requests admitted to the KV pool."),
    ("prompt_tokens", "crosspool_prompt_tokens", "Prompt tokens computed."),
    ("cached_tokens", "crosspool_cached_tokens", "Prompt tokens found in the prefix cache."),
    ("prefix_hits", "crosspool_prefix_hits", "Requests admitted with cached prompt tokens."),
    ("evicted_pages", "crosspool_evicted_pages", "Cached KV pages given up for requests."),
    ("pauses", "crosspool_pauses", "Times that a running request waited for more KV memory."),
    ("replayed_requests", "crosspool_replayed_requests", "Requests admitted again after a loss."),
    ("replayed_tokens", "crosspool_replayed_tokens", "Tokens computed again after a loss."),
    ("output_tokens", "crosspool_output_tokens", "Tokens sampled."),
    ("steps", "crosspool_steps", "Steps: passes of a batch through all layers."),
    ("decode_rows", "crosspool_decode_rows", "Rows that fed back a sampled token."),
)
_RESIDENCY_GAUGES = (
    ("priority", "crosspool_priority", "Of models without requests, larger ones stay longer."),
    ("last_wake_seconds", "crosspool_last_wake_seconds", "Seconds that the last wake took."),
    ("idle_seconds", "crosspool_idle_seconds", "Seconds since the model last had a request."),
)
_RESIDENCY_COUNTERS = (
    ("wakes", "crosspool_wakes", "Times that the model's weights were read."),
    ("failed_wakes", "crosspool_failed_wakes", "Times that its weights could not be read."),
    ("sleeps", "crosspool_sleeps", "Times that its weights were given up."),
    ("waking_seconds", "crosspool_waking_seconds", "Seconds of all wakes together."),
)
_WEIGHTS = (("kv", "attention_bytes"), ("weight", "ffn_bytes"))
"""The pools, and what a model takes of the weights' memory in each."""
_RANK_GAUGES = (
    ("budget_bytes", "crosspool_kv_budget_bytes", "KV budget of the attention rank."),
    ("free_bytes", "crosspool_kv_free_bytes", "KV memory neither promised nor cached."),
    ("promised_bytes", "crosspool_kv_rank_promised_bytes", "KV memory promised to requests."),
    ("cached_bytes", "crosspool_kv_rank_cached_bytes", "KV memory of cached prefixes not in use."),
    ("mapped_bytes", "crosspool_kv_rank_mapped_bytes", "KV memory mapped for all models."),
    ("steps_in_flight", "crosspool_steps_in_flight", "Steps sent to the rank and not finished."),
    ("lanes", "crosspool_lanes", "Steps that can be in flight at once."),
)
_DEVICE_COUNTERS = (
    ("restarts", "crosspool_restarts", "Restarts of the rank's device process."),
    ("seconds_away", "crosspool_away_seconds", "Seconds without the rank, since the start."),
)
_LINK_COUNTERS = (
    ("rows", "crosspool_hidden_state_rows", "Token rows dispatched to FFN ranks."),
    ("dispatch_bytes", "crosspool_dispatch_bytes", "Hidden-state bytes dispatched."),
    ("combine_bytes", "crosspool_combine_bytes", "Hidden-state bytes combined."),
)
_EXPERT_COUNTERS = (
    ("hits", "crosspool_expert_hits", "Routed experts on demand that a step found in memory."),
    ("misses", "crosspool_expert_misses", "Routed experts on demand that a step waited for."),
    ("early", "crosspool_experts_read_early", "Experts that were read before a step needed them."),
    ("early_used", "crosspool_early_experts_used", "Experts read early that a step then needed."),
    ("read_bytes", "crosspool_expert_read_bytes", "Bytes read of routed experts on demand."),
    ("evictions", "crosspool_expert_evictions", "Times that an expert went for another one."),
    ("stall_seconds", "crosspool_expert_stall_seconds", "Seconds that steps waited for experts."),
)
_HISTOGRAMS = (
    ("queue_seconds", "crosspool_queue_seconds", "Time until a request was admitted."),
    (
        "first_token_seconds",
        "crosspool_time_to_first_token_seconds",
        "Time until the first token of a request was sampled.",
    ),
    (
        "between_tokens_seconds",
        "crosspool_time_between_tokens_seconds",
        "Time from each token of a request to its next one.",
    ),
    (
        "end_to_end_seconds",
        "crosspool_end_to_end_seconds",
        "Time until the end of requests that ended by themselves.",
    ),
    ("prompt_tokens", "crosspool_request_prompt_tokens", "Lengths of their prompts."),
    ("output_tokens", "crosspool_request_output_tokens", "Lengths of their outputs."),
)


class Measured(NamedTuple):
    """What metrics are made of."""

    status: Status | None
    """None until the scheduler process has told it."""
    counters: Sequence[DeviceCounters] = ()
    """One entry for each device, and none while devices start."""
    histograms: Sequence[ModelHistograms] = ()


def render(measured: Measured, models: Collection[str], *, collects: bool) -> bytes:
    """Metrics in Prometheus' text format, under CrossPool's names and SGLang's. With ``collects``,
    SGLang's own collectors work in the processes, and what they have counted of ``models`` is
    told."""
    return _text(_sources(measured, models, collects))


def of_model(name: str, measured: Measured, *, collects: bool) -> bytes:
    """What :func:`render` tells of one model. A router adds up what it reads of each model, so
    nothing is here that the server has once for all of them."""
    return _text([_OfOne(name, _sources(measured, [name], collects))])


def _sources(measured: Measured, models: Collection[str], collects: bool) -> list[Collector]:
    of_models = measured.status.models if measured.status else []
    return [
        _Snapshot(measured),
        SGLangNames(of_models, measured.histograms, collects=collects),
        *([OfAllProcesses(models)] if collects else []),
    ]


def _text(sources: Sequence[Collector]) -> bytes:
    registry = CollectorRegistry(auto_describe=False)
    for source in sources:
        registry.register(source)
    return generate_latest(registry)


class _OfOne(Collector):
    """What ``sources`` tell of the model ``name``."""

    def __init__(self, name: str, sources: Sequence[Collector]) -> None:
        self._name = name
        self._sources = sources

    def collect(self) -> Iterator[Metric]:
        for metric in itertools.chain.from_iterable(s.collect() for s in self._sources):
            metric.samples = [
                sample
                for sample in metric.samples
                if self._name in (sample.labels.get("model"), sample.labels.get("model_name"))
            ]
            if metric.samples:
                yield metric


class _Snapshot(Collector):
    def __init__(self, measured: Measured) -> None:
        self._status, self._counters, self._histograms = measured

    def collect(self) -> Iterator[Metric]:
        ready = GaugeMetricFamily("crosspool_ready", "1 while requests are taken.")
        ready.add_metric([], float(self._status is not None and self._status.ready))
        yield ready
        dropped = CounterMetricFamily(
            "crosspool_spans_dropped", "Spans that will never reach the collector of traces."
        )
        if self._status is not None:
            dropped.add_metric([], self._status.spans_dropped)
        yield dropped
        yield from self._models(self._status.models if self._status else [])
        yield from self._residency(self._status.models if self._status else [])
        yield from self._requests()
        yield from self._ranks(self._status.ranks if self._status else [])
        yield from self._weights(self._status.weights if self._status else [])
        yield from self._devices(self._status.devices if self._status else [])
        yield from self._links()
        yield from self._experts()

    def _models(self, models: Sequence[ModelStatus]) -> Iterator[Metric]:
        for key, name, text in _MODEL_GAUGES:
            gauge = GaugeMetricFamily(name, text, labels=["model"])
            for model in models:
                gauge.add_metric([model.name], getattr(model, key))
            yield gauge
        for key, name, text in _MODEL_COUNTERS:
            counter = CounterMetricFamily(name, text, labels=["model"])
            for model in models:
                counter.add_metric([model.name], getattr(model, key))
            yield counter
        for key, label, text in (
            ("finished", "reason", "Requests that ended by themselves."),
            ("aborted", "status", "Requests refused or aborted, by HTTP status."),
        ):
            by = CounterMetricFamily(f"crosspool_requests_{key}", text, labels=["model", label])
            for model in models:
                for value, number in getattr(model, key).items():
                    by.add_metric([model.name, value], number)
            yield by

    def _requests(self) -> Iterator[Metric]:
        for key, name, text in _HISTOGRAMS:
            family = HistogramMetricFamily(name, text, labels=["model"])
            for of in self._histograms:
                add_histogram(family, [of.name], getattr(of, key))
            yield family

    def _residency(self, models: Sequence[ModelStatus]) -> Iterator[Metric]:
        state = GaugeMetricFamily(
            "crosspool_model_state", "1 for the state of the model.", labels=["model", "state"]
        )
        weights = GaugeMetricFamily(
            "crosspool_weight_bytes", "Memory of the model's weights.", labels=["model", "pool"]
        )
        tiers = GaugeMetricFamily(
            "crosspool_weight_tier_bytes",
            "Bytes of the model's weights, by where they lie now.",
            labels=["model", "tier"],
        )
        for model in models:
            for name in get_args(ModelState):
                state.add_metric([model.name, name], float(model.residency.state == name))
            is_there = model.residency.state != "asleep"
            for pool, key in _WEIGHTS:
                size = getattr(model.residency, key) if is_there else 0
                weights.add_metric([model.name, pool], size)
            size = model.residency.attention_bytes + model.residency.ffn_bytes
            for tier, lies_there in (("pool", is_there), ("disk", not is_there)):
                tiers.add_metric([model.name, tier], size if lies_there else 0)
        yield from (state, weights, tiers)
        for key, name, text in _RESIDENCY_GAUGES:
            gauge = GaugeMetricFamily(name, text, labels=["model"])
            for model in models:
                if (value := getattr(model.residency, key)) is not None:
                    gauge.add_metric([model.name], value)
            yield gauge
        for key, name, text in _RESIDENCY_COUNTERS:
            counter = CounterMetricFamily(name, text, labels=["model"])
            for model in models:
                counter.add_metric([model.name], getattr(model.residency, key))
            yield counter

    def _ranks(self, ranks: Sequence[RankSnapshot]) -> Iterator[Metric]:
        for key, name, text in _RANK_GAUGES:
            gauge = GaugeMetricFamily(name, text, labels=["attention_rank", "device"])
            for index, rank in enumerate(ranks):
                gauge.add_metric([str(index), rank.device], getattr(rank, key))
            yield gauge

        counter = CounterMetricFamily(
            "crosspool_lane_busy_seconds",
            "Seconds of all steps that have ended, added up over the rank's lanes.",
            labels=["attention_rank", "device"],
        )
        for index, rank in enumerate(ranks):
            counter.add_metric([str(index), rank.device], rank.busy_seconds)
        yield counter

    def _weights(self, weights: Sequence[WeightUse]) -> Iterator[Metric]:
        labels = ["pool", "device"]
        held = GaugeMetricFamily(
            "crosspool_rank_weight_bytes", "Memory of all models' weights here.", labels=labels
        )
        budget = GaugeMetricFamily(
            "crosspool_rank_weight_budget_bytes", "Bytes that they may have.", labels=labels
        )
        for use in weights:
            held.add_metric([use.pool, use.device], use.bytes)
            if use.budget_bytes is not None:
                budget.add_metric([use.pool, use.device], use.budget_bytes)
        yield from (held, budget)

    def _devices(self, devices: Sequence[DeviceStatus]) -> Iterator[Metric]:
        labels = ["role", "rank", "device"]
        up = GaugeMetricFamily("crosspool_rank_up", "1 while the rank works.", labels=labels)
        counters = [
            (key, CounterMetricFamily(name, text, labels=labels))
            for key, name, text in _DEVICE_COUNTERS
        ]
        for device in devices:
            for rank in device.ranks:
                values = [rank.role, str(rank.rank), device.name]
                up.add_metric(values, float(device.ready))
                for key, counter in counters:
                    counter.add_metric(values, getattr(device, key))
        yield up
        yield from (counter for _, counter in counters)

    def _links(self) -> Iterator[Metric]:
        for key, name, text in _LINK_COUNTERS:
            counter = CounterMetricFamily(name, text, labels=["device"])
            for device in self._counters:
                total = sum(getattr(link, key) for link in device.links)
                counter.add_metric([device.device], total)
            yield counter

    def _experts(self) -> Iterator[Metric]:
        labels = ["model", "device"]
        found = [(of.device, counts) for of in self._counters for counts in of.experts]
        for key, name, text in _EXPERT_COUNTERS:
            counter = CounterMetricFamily(name, text, labels=labels)
            for device, counts in found:
                counter.add_metric([counts.model, device], getattr(counts, key))
            yield counter
        present = GaugeMetricFamily(
            "crosspool_expert_bytes", "Memory of routed experts on demand.", labels=labels
        )
        for device, counts in found:
            present.add_metric([counts.model, device], counts.present_bytes)
        yield present
