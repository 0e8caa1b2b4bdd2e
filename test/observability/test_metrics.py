from pathlib import Path
from typing import get_args

import pytest
from crosspool.observability.histograms import ModelHistograms
from crosspool.observability.metrics import Measured, of_model, render
from crosspool.transport.inspection import (
    DeviceCounters,
    ExpertCounts,
    LinkCounts,
    ModelResidency,
    ModelState,
    ModelStatus,
    RankSnapshot,
    Status,
    WeightUse,
)
from prometheus_client import Metric
from prometheus_client.mmap_dict import MmapedDict, mmap_key
from prometheus_client.parser import text_string_to_metric_families

MODEL = {
    "name": 'odd "name"\\',
    "model": 0,
    "waiting": 3,
    "running": 2,
    "paused": 1,
    "mapped_bytes": 4 << 20,
    "promised_bytes": 6 << 20,
    "cached_bytes": 5 << 20,
    "requests": 9,
    "admitted": 5,
    "prompt_tokens": 100,
    "cached_tokens": 60,
    "prefix_hits": 4,
    "evicted_pages": 11,
    "pauses": 8,
    "replayed_requests": 6,
    "replayed_tokens": 77,
    "output_tokens": 40,
    "steps": 30,
    "decode_rows": 38,
    "finished": {"stop": 1, "length": 2},
    "aborted": {"429": 1},
    "largest_batch": 2,
    "compiling": 1,
    "waiting_tokens": 12,
    "tokens_per_second": 2.5,
    "cache_hit_rate": 0.375,
    "pool_tokens": 1 << 20,
    "promised_chunks": 3,
    "cached_chunks": 2,
    "mapped_chunks": 2,
    "path": "/models/odd",
    "context": 256,
    "dtype": "float32",
    "kv_dtype": "float32",
    "kv_bytes_per_token": 64,
    "max_tokens": 256,
    "ffn_ranks": (0,),
    "residency": ModelResidency(
        state="waking",
        keep="demand",
        ttl=60.0,
        priority=7,
        attention_bytes=11 << 20,
        ffn_bytes=13 << 20,
        read_bytes=6 << 20,
        total_bytes=24 << 20,
        wakes=12,
        failed_wakes=14,
        sleeps=15,
        waking_seconds=16.5,
        idle_seconds=0,
    ),
    "attached": 0,
}
RANK = {
    "device": "cpu:0",
    "away": False,
    "budget_bytes": 64 << 20,
    "free_bytes": 58 << 20,
    "promised_bytes": 4 << 20,
    "cached_bytes": 2 << 20,
    "steps_in_flight": 1,
    "lanes": 2,
    "busy_seconds": 34.5,
    "running": 2,
    "paused": 1,
    "mapped_bytes": 4 << 20,
    "budget_chunks": 32,
    "free_chunks": 29,
    "promised_chunks": 2,
    "cached_chunks": 1,
    "mapped_chunks": 2,
    "models": [],
}
LINK = {
    "attention_rank": 0,
    "lane": 1,
    "ffn_rank": 2,
    "dispatches": 7,
    "rows": 70,
    "dispatch_bytes": 7000,
    "combine_bytes": 7001,
}
EXPERTS = {
    "model": MODEL["name"],
    "hits": 21,
    "misses": 22,
    "early": 23,
    "early_used": 24,
    "read_bytes": 25 << 20,
    "evictions": 26,
    "stall_seconds": 27.5,
    "present_bytes": 28 << 20,
}


def histograms(name: str = str(MODEL["name"])) -> ModelHistograms:
    """Those of a model that has had a request of 3 tokens, and begun another one."""
    made = ModelHistograms(name=name)
    for value in (0.002, 0.5):
        made.queue_seconds.observe(value)
    made.first_token_seconds.observe(0.04)
    for value in (0.01, 700.0):
        made.between_tokens_seconds.observe(value)
    made.end_to_end_seconds.observe(700.05)
    made.prompt_tokens.observe(100)
    made.output_tokens.observe(3)
    return made


def told(measured: Measured) -> dict[str, Metric]:
    text = render(measured, (), collects=False).decode()
    return {family.name: family for family in text_string_to_metric_families(text)}


def test_what_sglangs_scheduler_tells_has_its_names_and_labels() -> None:
    status = Status(
        models=[ModelStatus(**MODEL)], ranks=[], failure=None, ready=True, message="", devices=[]
    )
    families = told(Measured(status, (), [histograms()]))
    labels = {
        "model_name": MODEL["name"],
        "engine_type": "unified",
        "tp_rank": "0",
        "pp_rank": "0",
        "moe_ep_rank": "0",
    }
    used = (6 << 20) // 64
    for name, value in {
        "num_running_reqs": 2,
        "num_queue_reqs": 2,
        "num_grammar_queue_reqs": 1,
        "num_used_tokens": used,
        "max_total_num_tokens": 1 << 20,
        "token_usage": used / (1 << 20),
        "gen_throughput": 2.5,
        "cache_hit_rate": 0.375,
    }.items():
        family = families[f"sglang:{name}"]
        assert family.type == "gauge"
        (sample,) = family.samples
        assert (sample.labels, sample.value) == (labels, value)
    queue = families["sglang:queue_time_seconds"]
    assert all({**sample.labels, **labels} == sample.labels for sample in queue.samples)
    assert {sample.name: sample.value for sample in queue.samples if "le" not in sample.labels} == {
        "sglang:queue_time_seconds_count": 2,
        "sglang:queue_time_seconds_sum": 0.502,
    }
    assert not any(family.samples for name, family in told(Measured(None)).items()
                   if name.startswith("sglang:"))  # fmt: skip


def test_what_sglangs_tokenizer_managers_tell_has_its_names_and_labels() -> None:
    families = told(Measured(None, (), [histograms(), ModelHistograms(name="never asked")]))
    labels = {"model_name": MODEL["name"], "engine_type": "unified"}
    values = {}
    for name in (
        *("time_to_first_token_seconds", "inter_token_latency_seconds"),
        *("e2e_request_latency_seconds", "prompt_tokens_histogram", "generation_tokens_histogram"),
    ):
        family = families[f"sglang:{name}"]
        assert family.type == "histogram"
        for sample in family.samples:
            bound = sample.labels.pop("le", "")
            assert sample.labels == labels
            values[name, sample.name.rpartition("_")[2], bound] = sample.value
    assert values["time_to_first_token_seconds", "bucket", "0.03"] == 0
    assert values["time_to_first_token_seconds", "bucket", "0.05"] == 1
    assert values["inter_token_latency_seconds", "bucket", "0.01"] == 1  # bounds are included
    assert values["inter_token_latency_seconds", "bucket", "600.0"] == 1
    assert values["inter_token_latency_seconds", "bucket", "+Inf"] == 2
    assert values["e2e_request_latency_seconds", "sum", ""] == 700.05
    assert values["prompt_tokens_histogram", "bucket", "64.0"] == 0
    assert values["prompt_tokens_histogram", "bucket", "128.0"] == 1
    for name, value in {"prompt_tokens": 100, "generation_tokens": 3, "num_requests": 1}.items():
        (sample,) = families[f"sglang:{name}"].samples
        assert (sample.name, sample.labels, sample.value) == (f"sglang:{name}_total", labels, value)


def test_with_sglangs_own_collectors_its_names_are_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = MmapedDict(str(tmp_path / "counter_1.db"))
    key = ("sglang:num_requests_total", "sglang:num_requests_total", ["model_name"], ["x"], "R.")
    file.write_value(mmap_key(*key), 5.0, 0.0)
    file.close()
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    text = render(Measured(None, (), [histograms("x")]), ["x"], collects=True).decode()
    assert text.count("# TYPE sglang:num_requests_total") == 1
    assert 'sglang:num_requests_total{model_name="x"} 5.0' in text
    assert "sglang:time_to_first_token_seconds" not in text
    assert "crosspool_time_to_first_token_seconds_count" in text


def samples(*, ready: bool = True, counters: bool = True) -> dict[tuple[str, ...], float]:
    status = Status(
        models=[ModelStatus(**MODEL)],
        ranks=[RankSnapshot(**RANK)],
        failure=None,
        ready=ready,
        message="",
        devices=[],
        weights=[
            WeightUse(pool="kv", device="cpu:0", bytes=31 << 20, budget_bytes=None),
            WeightUse(pool="weight", device="cpu:0", bytes=32 << 20, budget_bytes=33 << 20),
        ],
    )
    links = [LinkCounts(**LINK), LinkCounts(**{**LINK, "lane": 0})]
    of_device = DeviceCounters(
        device="cpu:0", links=links, served=links[:1], experts=[ExpertCounts(**EXPERTS)]
    )
    devices = [of_device] if counters else []
    text = render(Measured(status, devices, [histograms()]), (), collects=False).decode()
    return {
        (sample.name, *(f"{k}={v}" for k, v in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name.startswith("crosspool_")
    }


def test_every_number_arrives_under_its_labels() -> None:
    found = samples()
    model = f"model={MODEL['name']}"
    assert found["crosspool_requests_waiting", model] == 3
    assert found["crosspool_kv_mapped_bytes", model] == 4 << 20
    assert found["crosspool_kv_cached_bytes", model] == 5 << 20
    assert found["crosspool_cached_tokens_total", model] == 60
    assert found["crosspool_prefix_hits_total", model] == 4
    assert found["crosspool_evicted_pages_total", model] == 11
    assert found["crosspool_replayed_requests_total", model] == 6
    assert found["crosspool_replayed_tokens_total", model] == 77
    assert found["crosspool_requests_paused", model] == 1
    assert found["crosspool_pauses_total", model] == 8
    assert found["crosspool_requests_total", model] == 9
    assert found["crosspool_decode_rows_total", model] == 38
    assert found["crosspool_requests_finished_total", model, "reason=length"] == 2
    assert found["crosspool_requests_aborted_total", model, "status=429"] == 1
    for state in get_args(ModelState):
        value = found["crosspool_model_state", model, f"state={state}"]
        assert value == (state == "waking")
    assert found["crosspool_weight_bytes", model, "pool=kv"] == 11 << 20
    assert found["crosspool_weight_bytes", model, "pool=weight"] == 13 << 20
    assert found["crosspool_priority", model] == 7
    assert found["crosspool_wakes_total", model] == 12
    assert found["crosspool_failed_wakes_total", model] == 14
    assert found["crosspool_sleeps_total", model] == 15
    assert found["crosspool_waking_seconds_total", model] == 16.5
    assert found["crosspool_idle_seconds", model] == 0
    experts = ("device=cpu:0", model)
    assert found["crosspool_expert_hits_total", *experts] == 21
    assert found["crosspool_expert_misses_total", *experts] == 22
    assert found["crosspool_experts_read_early_total", *experts] == 23
    assert found["crosspool_early_experts_used_total", *experts] == 24
    assert found["crosspool_expert_read_bytes_total", *experts] == 25 << 20
    assert found["crosspool_expert_evictions_total", *experts] == 26
    assert found["crosspool_expert_stall_seconds_total", *experts] == 27.5
    assert found["crosspool_expert_bytes", *experts] == 28 << 20
    assert ("crosspool_last_wake_seconds", model) not in found  # it was never woken
    rank = ("attention_rank=0", "device=cpu:0")
    assert found["crosspool_kv_free_bytes", *rank] == 58 << 20
    device = "device=cpu:0"  # two links, which the device of the attention rank counts
    assert found["crosspool_hidden_state_rows_total", device] == 2 * 70
    assert found["crosspool_dispatch_bytes_total", device] == 2 * 7000
    assert found["crosspool_combine_bytes_total", device] == 2 * 7001
    assert found["crosspool_rank_weight_bytes", device, "pool=kv"] == 31 << 20
    assert found["crosspool_rank_weight_bytes", device, "pool=weight"] == 32 << 20
    assert found["crosspool_rank_weight_budget_bytes", device, "pool=weight"] == 33 << 20
    assert ("crosspool_rank_weight_budget_bytes", device, "pool=kv") not in found
    assert found["crosspool_weight_tier_bytes", model, "tier=pool"] == 24 << 20
    assert found["crosspool_weight_tier_bytes", model, "tier=disk"] == 0
    assert found["crosspool_lanes", *rank] == 2
    assert found["crosspool_lane_busy_seconds_total", *rank] == 34.5
    assert found["crosspool_kv_rank_mapped_bytes", *rank] == 4 << 20
    assert found["crosspool_queue_seconds_sum", model] == 0.502
    assert found["crosspool_time_to_first_token_seconds_bucket", "le=0.05", model] == 1
    assert found["crosspool_time_between_tokens_seconds_count", model] == 2
    assert found["crosspool_end_to_end_seconds_bucket", "le=600.0", model] == 0
    assert found["crosspool_request_prompt_tokens_sum", model] == 100
    assert found["crosspool_request_output_tokens_sum", model] == 3
    assert found["crosspool_ready",] == 1


def test_while_devices_start_there_are_no_links() -> None:
    found = samples(ready=False, counters=False)
    assert found["crosspool_ready",] == 0
    assert not any(name.startswith("crosspool_dispatch") for name, *_ in found)


def test_before_the_scheduler_answers_there_is_only_the_flag() -> None:
    assert [
        (sample.name, sample.value)
        for family in told(Measured(None)).values()
        for sample in family.samples
    ] == [("crosspool_ready", 0.0)]


def test_a_process_that_dies_between_two_looks_at_its_metrics_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its files are listed, and then they are gone."""
    for pid, value in ((1, 2.0), (2, 3.0)):
        file = MmapedDict(str(tmp_path / f"counter_{pid}.db"))
        key = mmap_key("sglang:requests_total", "sglang:requests_total", [], [], "Requests.")
        file.write_value(key, value, 0.0)
        file.close()
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    assert b"sglang:requests_total 5.0" in render(Measured(None), (), collects=True)
    read = MmapedDict.read_all_values_from_file

    def read_after_a_death(name: str):
        (tmp_path / "counter_1.db").unlink(missing_ok=True)
        return read(name)

    monkeypatch.setattr(MmapedDict, "read_all_values_from_file", read_after_a_death)
    assert b"sglang:requests_total 3.0" in render(Measured(None), (), collects=True)


def test_models_that_have_gone_have_no_metrics_of_sglangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = MmapedDict(str(tmp_path / "counter_1.db"))
    for model in ("here", "gone"):
        name = "sglang:requests_total"
        file.write_value(mmap_key(name, name, ["model_name"], [model], "Requests."), 2.0, 0.0)
    file.close()
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    text = render(Measured(None), ["here"], collects=True)
    assert b'model_name="here"' in text and b"gone" not in text
    assert b"sglang:requests_total" not in render(Measured(None), [], collects=True)


def test_the_metrics_of_one_model_have_its_own_samples_alone() -> None:
    name = str(MODEL["name"])
    models = [ModelStatus(**MODEL), ModelStatus(**{**MODEL, "name": "other"})]
    status = Status(
        models=models,
        ranks=[RankSnapshot(**RANK)],
        failure=None,
        ready=True,
        message="",
        devices=[],
    )
    experts = [ExpertCounts(**EXPERTS), ExpertCounts(**{**EXPERTS, "model": "other"})]
    counters = [DeviceCounters(device="cpu:0", links=[], served=[], experts=experts)]

    def found(text: bytes) -> dict[tuple[str, str], float]:
        return {
            (sample.name, str(sample.labels)): sample.value
            for family in text_string_to_metric_families(text.decode())
            for sample in family.samples
            if name in sample.labels.values()
        }

    measured = Measured(status, counters, [histograms(), histograms("other")])
    text = of_model(name, measured, collects=False)
    assert found(text) == found(render(measured, [name, "other"], collects=False))
    assert b'"other"' not in text and b"crosspool_ready" not in text and b"kv_budget" not in text
    assert of_model("third", measured, collects=False) == b""
    assert of_model(name, Measured(None), collects=False) == b""


def test_the_metrics_of_one_model_have_sglangs_too(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    models = [ModelStatus(**MODEL), ModelStatus(**{**MODEL, "name": "other"})]
    status = Status(models=models, ranks=[], failure=None, ready=True, message="", devices=[])
    text = of_model("other", Measured(status), collects=True).decode()
    families = {family.name: family for family in text_string_to_metric_families(text)}
    (running,) = families["sglang:num_running_reqs"].samples
    assert (running.labels["model_name"], running.value) == ("other", 2)
