"""Traces of requests, as a collector gets them from a server: spans of SGLang's front end and of
the scheduler in one tree, below the client's own span."""

from __future__ import annotations

import json
import secrets
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from support.fleet import DEEPSEEK, FLAGS, QWEN, do, restarts, state_of, wait_for
from support.server import Server

pytest.importorskip("opentelemetry.sdk", reason="needs the extra otel")

from support.collector import CollectedSpan, Collector


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with Collector() as serving:
        yield serving


@pytest.fixture(scope="module")
def traced(collector: Collector, packed: Path) -> Iterator[Server]:
    flags = ["--enable-trace", "--otlp-traces-endpoint", collector.endpoint, *FLAGS]
    flags += ["--packed-cache-dir", str(packed)]
    with Server(flags, models=(QWEN, DEEPSEEK)) as running:
        yield running


class Asked:
    """A request of a client that has a trace of its own."""

    def __init__(
        self, server: Server, model: str, tokens: int, *, samples: int = 1, regex: str | None = None
    ) -> None:
        self.trace, self.span = secrets.token_hex(16), secrets.token_hex(8)
        sampling: dict[str, Any] = {"temperature": 0, "max_new_tokens": tokens}
        sampling |= {"ignore_eos": regex is None, "n": samples, "regex": regex}
        request = urllib.request.Request(
            f"{server.url}/m/{model}/generate",
            data=json.dumps({"text": "a b c", "sampling_params": sampling}).encode(),
            headers={
                "Content-Type": "application/json",
                "traceparent": f"00-{self.trace}-{self.span}-01",
            },
        )
        self.began = time.time()
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                self.answer: Any = json.loads(answer.read())
        except urllib.error.HTTPError as error:
            self.answer = json.loads(error.read())
        self.ended = time.time()


def by_scheduler(spans: list[CollectedSpan]) -> list[CollectedSpan]:
    return [span for span in spans if span.attributes.get("module") == "crosspool::scheduler"]


def root_of(spans: list[CollectedSpan], asked: Asked) -> CollectedSpan:
    """SGLang's span of the request. FastAPI may have made another one beside it."""
    (root,) = (
        span
        for span in spans
        if span.parent == asked.span and span.attributes.get("module") == "sglang::request"
    )
    return root


def test_the_spans_of_a_request(traced: Server, collector: Collector) -> None:
    asked = Asked(traced, QWEN, tokens=8)
    spans = collector.trace(asked.trace, "decode", f"Req {asked.answer['meta_info']['id'][:8]}")
    root = root_of(spans, asked)
    assert root.attributes["gen_ai.usage.completion_tokens"] == 8
    queue, prefill, decode = by_scheduler(spans)
    assert [queue.name, prefill.name, decode.name] == ["queue", "prefill", "decode"]
    assert {span.parent for span in (queue, prefill, decode)} == {root.span}
    assert {span.service for span in spans} == {"crosspool"}
    assert all(
        span.attributes["gen_ai.request.model"] == QWEN
        and span.attributes["gen_ai.usage.prompt_tokens"]
        == asked.answer["meta_info"]["prompt_tokens"]
        and span.attributes["rid"] == asked.answer["meta_info"]["id"]
        and span.error is None
        for span in (queue, prefill, decode)
    )
    # One clock's readings, each turned into nanoseconds since 1970.
    assert queue.end == pytest.approx(prefill.begin, abs=1e-3)
    assert prefill.end == pytest.approx(decode.begin, abs=1e-3)
    times = [asked.began, root.begin, queue.begin, decode.begin, decode.end, root.end, asked.ended]
    assert all(one <= other + 1e-3 for one, other in pairwise(times)), times
    others = {span.name for span in spans} - {"queue", "prefill", "decode"}
    assert {"tokenize", "api_server_dispatch"} <= others


def test_every_sample_has_a_tree(traced: Server, collector: Collector) -> None:
    asked = Asked(traced, QWEN, tokens=2, samples=2)
    spans = collector.trace(asked.trace, "decode", count=2)
    decodes = [span for span in spans if span.name == "decode"]
    assert len({span.attributes["rid"] for span in decodes}) == 2
    assert len({span.parent for span in decodes}) == 2


def test_a_sleeping_model_has_a_wake_within_the_queue(traced: Server, collector: Collector) -> None:
    do(traced, "sleep", DEEPSEEK)
    wait_for(traced, lambda: state_of(traced, DEEPSEEK) == "asleep")
    asked = Asked(traced, DEEPSEEK, tokens=2)
    spans = {s.name: s for s in by_scheduler(collector.trace(asked.trace, "decode", "wake"))}
    queue, wake = spans["queue"], spans["wake"]
    assert wake.parent == queue.parent
    assert queue.begin - 1e-3 <= wake.begin < wake.end
    assert wake.begin < queue.end
    told = next(m for m in traced.get("/crosspool/models") if m["name"] == DEEPSEEK)
    assert wake.end - wake.begin <= told["last_wake_seconds"] + 1e-3


def test_a_killed_attention_rank_leaves_a_replay(traced: Server, collector: Collector) -> None:
    before = restarts(traced)
    with ThreadPoolExecutor(1) as thread:
        running = thread.submit(Asked, traced, QWEN, 900)
        wait_for(traced, lambda: traced.get("/crosspool/status")["models"][0]["running"] == 1)
        wait_for(traced, lambda: traced.get("/crosspool/status")["models"][0]["decode_rows"] > 20)
        traced.find("crosspool::device ").kill()
        asked = running.result(120)
    assert asked.answer["meta_info"]["completion_tokens"] == 900
    assert restarts(traced) == before + 1
    spans = by_scheduler(collector.trace(asked.trace, "decode", "replay"))
    names = [span.name for span in spans if span.name != "wake"]
    assert names == ["queue", "prefill", "decode", "replay", "decode"]
    ends = [span.end for span in spans if span.name != "wake"]
    begins = [span.begin for span in spans if span.name != "wake"]
    assert begins[1:] == pytest.approx(ends[:-1], abs=1e-3)


def test_the_last_span_says_why_a_request_failed(traced: Server, collector: Collector) -> None:
    asked = Asked(traced, QWEN, tokens=4, regex="(")
    (queue,) = by_scheduler(collector.trace(asked.trace, "queue"))
    assert queue.error is not None and "regex" in queue.error
    assert asked.answer["error"]["message"] == queue.error
