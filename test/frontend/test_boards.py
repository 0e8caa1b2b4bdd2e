"""What boards and rules ask for is in the metrics of a server whose models have been used, and the
page about metrics names them all."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families
from support.front_end import MODELS, FrontEndServer
from support.server import ROOT

SGLANG_BOARD = Path(__file__).parents[1] / "observability" / "sglang_board.json"


MONITORING = ROOT / "examples" / "monitoring"
PAGE = ROOT / "docs" / "metrics.md"
OF_PROMETHEUS = {"instance", "job"}
"""Labels that Prometheus gives each metric that it reads."""
HAPPENS = {"crosspool_requests_aborted_total"}
"""Metrics without samples until something goes wrong."""
OPERATORS = {"or", "and", "unless", "bool"}


@pytest.fixture(scope="module")
def labels(server: FrontEndServer) -> dict[str, set[str]]:
    """The labels of each sample's name, once each model has ended a request."""
    for name in MODELS:
        body = {"model": name, "prompt": "x", "max_tokens": 3, "ignore_eos": True}
        assert server.request("/v1/completions", body)[0] == 200
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(server.request("/metrics")[1]):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


def told_name(family: Metric) -> str:
    return f"{family.name}_total" if family.type == "counter" else family.name


def test_sglangs_board_finds_every_metric(labels: dict[str, set[str]]) -> None:
    board = json.loads(SGLANG_BOARD.read_text())
    assert set(board["metrics"]) <= labels.keys()
    for name in board["metrics"]:
        wanted = set(board["labels"]) if name.endswith("_bucket") else {"model_name"}
        assert wanted <= labels[name], name


def test_the_histograms_have_what_a_client_has_seen(server: FrontEndServer) -> None:
    def read() -> dict[str, float]:
        """The histograms' counts and sums of the first model, by name."""
        return {
            sample.name: sample.value
            for family in text_string_to_metric_families(server.request("/metrics")[1])
            for sample in family.samples
            if sample.labels.get("model", sample.labels.get("model_name")) == MODELS[0]
            and sample.name.endswith(("_count", "_sum"))
        }

    body = {"model": MODELS[0], "prompt": "x", "max_tokens": 5, "ignore_eos": True}
    assert server.request("/v1/completions", body)[0] == 200
    before = read()
    status, answer, _ = server.request("/v1/completions", body)
    assert status == 200
    after = read()
    grown = {name: after[name] - before[name] for name in after}
    usage = answer["usage"]
    for prefix in ("crosspool_request_prompt_tokens", "sglang:prompt_tokens_histogram"):
        assert grown[f"{prefix}_sum"] == usage["prompt_tokens"]
    for prefix in ("crosspool_request_output_tokens", "sglang:generation_tokens_histogram"):
        assert grown[f"{prefix}_sum"] == usage["completion_tokens"] == 5
    assert grown["crosspool_queue_seconds_count"] == 1
    assert grown["crosspool_time_to_first_token_seconds_count"] == 1
    assert grown["crosspool_time_between_tokens_seconds_count"] == 4
    assert grown["sglang:inter_token_latency_seconds_count"] == 4
    parts = ("time_to_first_token", "time_between_tokens")
    whole = grown["crosspool_end_to_end_seconds_sum"]
    assert whole >= sum(grown[f"crosspool_{part}_seconds_sum"] for part in parts) > 0


def test_the_histograms_are_told_as_json(server: FrontEndServer) -> None:
    body = {"model": MODELS[1], "prompt": "x", "max_tokens": 2, "ignore_eos": True}
    assert server.request("/v1/completions", body)[0] == 200
    told = {each["name"]: each for each in server.request("/crosspool/histograms")[1]}
    assert set(told) == set(MODELS)
    first = told[MODELS[1]]["first_token_seconds"]
    assert len(first["counts"]) == len(first["bounds"]) + 1
    assert sum(first["counts"]) >= 1 and first["sum"] > 0


def board_queries(node: Any) -> Iterator[str]:
    """Every query of a board of Grafana's."""
    if isinstance(node, dict):
        yield from (value for key, value in node.items() if key == "expr")
        yield from (query for value in node.values() for query in board_queries(value))
    elif isinstance(node, list):
        yield from (query for value in node for query in board_queries(value))


def queries() -> list[str]:
    board = json.loads((MONITORING / "grafana" / "crosspool.json").read_text())
    rules = yaml.safe_load((MONITORING / "rules.yaml").read_text())
    alerts = [rule["expr"] for group in rules["groups"] for rule in group["rules"]]
    found = [*board_queries(board), *alerts]
    assert len(found) > 40 and len(alerts) >= 8
    return found


def words(query: str) -> tuple[set[str], set[str]]:
    """The metrics and the labels that a query in PromQL names."""
    bare = re.sub(r'"[^"]*"', '""', query)
    named: set[str] = set()
    for matchers in re.findall(r"{([^}]*)}", bare):
        named.update(re.findall(r"(\w+)\s*[=!]", matchers))
    for grouping in re.findall(r"\b(?:by|without|on|ignoring)\s*\(([^)]*)\)", bare):
        named.update(re.findall(r"\w+", grouping))
    bare = re.sub(r"{[^}]*}|\[[^\]]*\]|\b(?:by|without|on|ignoring)\s*\([^)]*\)", " ", bare)
    metrics = set(re.findall(r"(?<![\w:])[a-zA-Z_:][\w:]*(?!\s*\(|[\w:])", bare))
    return metrics - OPERATORS, named


def test_the_words_of_a_query() -> None:
    query = (
        'histogram_quantile(0.9, sum by (le) (rate(a:b_bucket{x=~"y{1}"}[5m]))) > 1e3 or vector(0)'
    )
    assert words(query) == ({"a:b_bucket"}, {"le", "x"})


@pytest.mark.parametrize("query", queries())
def test_every_query_names_metrics_and_labels_that_there_are(
    query: str, labels: dict[str, set[str]]
) -> None:
    metrics, named = words(query)
    assert metrics
    if metrics == {"up"}:
        return
    assert metrics <= labels.keys() | HAPPENS
    if metrics.isdisjoint(HAPPENS):
        assert named <= OF_PROMETHEUS.union(*(labels[metric] for metric in metrics))


def test_what_the_compose_file_mounts_exists() -> None:
    compose = yaml.safe_load((MONITORING / "docker-compose.yaml").read_text())
    mounts = [
        mount.split(":")[0]
        for service in compose["services"].values()
        for mount in service["volumes"]
        if mount.startswith("./")
    ]
    assert len(mounts) == 5
    assert all((MONITORING / mount).is_file() for mount in mounts)
    source = yaml.safe_load((MONITORING / "grafana" / "datasource.yaml").read_text())
    board = (MONITORING / "grafana" / "crosspool.json").read_text()
    uids = set(re.findall(r'"type": "prometheus",\s*"uid": "(\w+)"', board))
    assert uids == {source["datasources"][0]["uid"]}


def test_the_page_names_every_metric_and_no_other(server: FrontEndServer) -> None:
    text = server.request("/metrics")[1]
    told = {told_name(family) for family in text_string_to_metric_families(text)}
    page = set(re.findall(r"`((?:crosspool_|sglang:)\w+)", PAGE.read_text()))
    assert page == told
