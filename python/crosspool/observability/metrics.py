"""The deployment's state as Prometheus metrics, ``crosspool_*``."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import get_args

from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from crosspool.transport.inspection import (
    DeviceCounters,
    DeviceStatus,
    ModelState,
    ModelStatus,
    RankSnapshot,
    Status,
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
    ("steps_in_flight", "crosspool_steps_in_flight", "Steps sent to the rank and not finished."),
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
_SGLANG_GAUGES: tuple[tuple[str, str, Callable[[ModelStatus], float]], ...] = (
    ("num_running_reqs", "Requests admitted and not finished.", lambda m: m.running),
    ("num_queue_reqs", "Requests queued.", lambda m: m.waiting - m.compiling),
    ("num_grammar_queue_reqs", "Requests whose grammar is compiled.", lambda m: m.compiling),
    ("num_used_tokens", "Tokens of KV memory promised to requests.", lambda m: m.used_tokens),
    ("max_total_num_tokens", "Tokens that the KV pool could hold.", lambda m: m.pool_tokens),
    ("token_usage", "Share of the KV pool promised to requests.", lambda m: m.token_usage),
    ("gen_throughput", "Tokens sampled per second.", lambda m: m.tokens_per_second),
    ("cache_hit_rate", "Share of prompt tokens found cached.", lambda m: m.cache_hit_rate),
)
"""Gauges of SGLang's scheduler that its dashboards and routers look for."""
_SGLANG_RANKS = {"engine_type": "unified", "tp_rank": "0", "pp_rank": "0", "moe_ep_rank": "0"}
"""Labels that SGLang's scheduler gives each of them beside ``model_name``; there is one of ours."""


def render(status: Status | None, counters: Sequence[DeviceCounters]) -> bytes:
    """Metrics in Prometheus' text format.

    ``status`` is None until the scheduler process has told it; ``counters`` has one entry for each
    device, and none while devices start."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Snapshot(status, counters))
    return generate_latest(registry)


def of_all_processes(models: Collection[str]) -> bytes:
    """SGLang's own metrics of ``models``, summed over all processes, which share
    ``PROMETHEUS_MULTIPROC_DIR``. The processes' files have those of models that have gone, too."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_OfModels(models))
    try:
        return generate_latest(registry)
    except FileNotFoundError:  # a process has died after its files were listed, and they are gone
        return generate_latest(registry)


def sglang_gauges(status: Status | None) -> bytes:
    """What a scheduler of SGLang's own would have told of each model, under its names."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_SGLangGauges(status.models if status else []))
    return generate_latest(registry)


class _OfModels(Collector):
    def __init__(self, models: Collection[str]) -> None:
        self._models = {None, *models}

    def collect(self) -> Iterator[Metric]:
        for metric in MultiProcessCollector(None).collect():
            metric.samples = [
                sample
                for sample in metric.samples
                if sample.labels.get("model_name") in self._models
            ]
            if metric.samples:
                yield metric


class _SGLangGauges(Collector):
    def __init__(self, models: Sequence[ModelStatus]) -> None:
        self._models = models

    def collect(self) -> Iterator[Metric]:
        labels = ["model_name", *_SGLANG_RANKS]
        for name, text, value in _SGLANG_GAUGES:
            gauge = GaugeMetricFamily(f"sglang:{name}", text, labels=labels)
            for model in self._models:
                gauge.add_metric([model.name, *_SGLANG_RANKS.values()], value(model))
            yield gauge


class _Snapshot(Collector):
    def __init__(self, status: Status | None, counters: Sequence[DeviceCounters]) -> None:
        self._status = status
        self._counters = counters

    def collect(self) -> Iterator[Metric]:
        ready = GaugeMetricFamily("crosspool_ready", "1 while requests are taken.")
        ready.add_metric([], float(self._status is not None and self._status.ready))
        yield ready
        yield from self._models(self._status.models if self._status else [])
        yield from self._residency(self._status.models if self._status else [])
        yield from self._ranks(self._status.ranks if self._status else [])
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

    def _residency(self, models: Sequence[ModelStatus]) -> Iterator[Metric]:
        state = GaugeMetricFamily(
            "crosspool_model_state", "1 for the state of the model.", labels=["model", "state"]
        )
        weights = GaugeMetricFamily(
            "crosspool_weight_bytes", "Memory of the model's weights.", labels=["model", "pool"]
        )
        for model in models:
            for name in get_args(ModelState):
                state.add_metric([model.name, name], float(model.residency.state == name))
            is_there = model.residency.state != "asleep"
            for pool, key in _WEIGHTS:
                size = getattr(model.residency, key) if is_there else 0
                weights.add_metric([model.name, pool], size)
        yield from (state, weights)
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
