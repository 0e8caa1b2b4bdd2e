"""Times that the client takes are those of a server that notes its own."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import numpy as np
import pytest
from crosspool.bench.client import BenchError, Endpoint, Sending, models_of, send
from crosspool.bench.workload import TimedRequest
from support.paced_server import KEY, Paced


@pytest.fixture(scope="module")
def server() -> Iterator[Paced]:
    with Paced() as running:
        yield running


def sent(server: Paced, *requests: tuple[float, str, int], **more: object) -> Sending:
    endpoint = Endpoint(url=server.url, api_key=KEY, **more)  # type: ignore[arg-type]
    server.sent.clear()
    server.bodies.clear()
    workload = [TimedRequest(when, model, "x y", 2, tokens) for when, model, tokens in requests]
    return asyncio.run(send(endpoint, workload))


@pytest.mark.parametrize("chat", [False, True])
def test_times_are_those_of_the_server(server: Paced, chat: bool) -> None:
    """The client sees each token after it was sent, and late by what the machine makes it wait; the
    median of many hides single pauses."""
    load = [(0.05 * number, "ab"[number % 2], 8) for number in range(12)]
    sending = sent(server, *load, chat=chat)
    assert [record.failure for record in sending.records] == [""] * 12
    true_ttft, true_tbt, ttft, tbt = [], [], [], []
    for record, (_, came, times) in zip(sending.records, server.sent, strict=True):
        true_ttft.append(times[0] - came)
        true_tbt += np.diff(times).tolist()
        assert record.ttft is not None and record.e2e is not None
        assert record.ttft >= server.first and record.e2e >= server.first + 7 * server.gap
        assert len(record.tbt) == 7 and record.output_tokens == 8 and record.prompt_tokens == 7
        assert record.tpot == pytest.approx((record.e2e - record.ttft) / 7)
        assert record.finish_reason == "length"
        ttft.append(record.ttft)
        tbt += record.tbt
    slack = 0.005 + np.percentile(sending.lags, 90)
    assert abs(np.median(ttft) - np.median(true_ttft)) < slack
    assert abs(np.median(tbt) - np.median(true_tbt)) < slack


def test_it_is_open_loop(server: Paced) -> None:
    """A request is sent while those before it are open."""
    sending = sent(server, (0.0, "a", 40), (0.0, "b", 40), (0.1, "a", 2), (0.2, "b", 2))
    assert [record.arrival for record in sending.records] == [0.0, 0.0, 0.1, 0.2]
    first = sending.records[0]
    assert first.e2e is not None and first.e2e > 0.8
    for record in sending.records[2:]:
        assert record.arrival <= record.sent < first.sent + first.e2e


def test_failures_have_reasons(server: Paced) -> None:
    loads = [(0.0, name, 4) for name in ("a", "refused", "broken", "silent")]
    sending = sent(server, *loads, timeout=1.5)
    reasons = [record.failure for record in sending.records]
    assert reasons == ["", "HTTP 429", "error in the stream", "timeout"]
    assert "too many" in sending.records[1].error and "lost" in sending.records[2].error
    assert sending.records[1].status == 429


def test_a_server_that_is_not_there(server: Paced) -> None:
    nowhere = Endpoint(url="http://127.0.0.1:1", timeout=5)
    with pytest.raises(BenchError, match="does not answer"):
        asyncio.run(models_of(nowhere))
    records = asyncio.run(send(nowhere, [TimedRequest(0.0, "a", "x", 1, 1)])).records
    assert [record.failure for record in records] == ["connection"]
    with pytest.raises(BenchError, match="401"):
        asyncio.run(models_of(Endpoint(url=server.url, api_key="other")))
    assert "other" not in repr(Endpoint(url=server.url, api_key="other"))


def test_what_is_asked(server: Paced) -> None:
    sent(server, (0.0, "a", 3), ignore_eos=True, more={"top_k": 1})
    (body,) = server.bodies
    assert body == {
        **{"model": "a", "prompt": "x y", "max_tokens": 3, "temperature": 0, "stream": True},
        **{"stream_options": {"include_usage": True}, "ignore_eos": True, "top_k": 1},
    }
