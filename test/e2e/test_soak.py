"""Mixed traffic with random aborts and disconnects: nothing may leak.

``CROSSPOOL_SOAK_MINUTES`` sets the length (default 0.3); the figures are printed last."""

from __future__ import annotations

import asyncio
import json
import os
import random
import time
from typing import Any

import aiohttp
import pytest
from support.prompts import sentences
from support.server import TINY_MODELS, Server

MINUTES = float(os.environ.get("CROSSPOOL_SOAK_MINUTES", "0.3"))
CLIENTS = 6
WARM_SHARE = 0.25
"""The first part of the run, in which caches and arenas may still grow."""


def measure(server: Server) -> dict[str, dict[str, int]]:
    """File descriptors, threads and unique memory in KiB of each process."""
    figures = {}
    for process in server.processes():
        name = process.cmdline()[0].split("/")[-1] if process.cmdline() else process.name()
        figures[f"{name}[{process.pid}]"] = {
            "fds": process.num_fds(),
            "threads": process.num_threads(),
            "uss_kib": process.memory_full_info().uss >> 10,
        }
    return figures


def body_of(rng: random.Random, texts: list[str]) -> tuple[str, dict[str, Any]]:
    """A random request: its path and body."""
    model, text = rng.choice(TINY_MODELS), rng.choice(texts)
    tokens = rng.choice((1, 4, 16, 64, 160))
    kind = rng.randrange(6)
    if kind == 0:
        return "/v1/completions", {
            "model": model,
            "prompt": text,
            "max_tokens": tokens,
            "n": 2,
            "temperature": 1.0,
        }
    if kind == 1:
        return "/v1/chat/completions", {
            "model": model,
            "messages": [{"role": "user", "content": text}],
            "max_tokens": tokens,
            "logprobs": True,
            "top_logprobs": 2,
        }
    if kind == 2:
        return f"/m/{model}/generate", {
            "text": text,
            "sampling_params": {"regex": "[a-z ]{4,40}", "max_new_tokens": 60},
        }
    if kind == 3:
        return f"/m/{model}/generate", {
            "text": text,
            "return_logprob": True,
            "logprob_start_len": 0,
            "sampling_params": {"max_new_tokens": 0},
        }
    if kind == 4:
        return "/v1/completions", {
            "model": model,
            "prompt": text * 4,
            "max_tokens": tokens,
            "stop": ["the", "import"],
            "stream": True,
        }
    return "/v1/chat/completions", {
        "model": model,
        "messages": [{"role": "user", "content": text}],
        "max_tokens": 2 * tokens,
        "stream": True,
        "frequency_penalty": 0.4,
    }


async def client(
    server: Server, seed: int, until: float, tally: dict[str, int], texts: list[str]
) -> None:
    rng = random.Random(seed)
    timeout = aiohttp.ClientTimeout(total=120)
    async with aiohttp.ClientSession(server.url, timeout=timeout) as session:
        while time.monotonic() < until:
            path, body = body_of(rng, texts)
            fate = rng.random()
            if path.endswith("/generate") and fate < 0.3:
                body["rid"] = f"soak-{seed}-{rng.random()}"
            call = asyncio.ensure_future(exchange(session, path, body))
            if fate < 0.3:
                await asyncio.sleep(rng.random() * 0.3)
                if "rid" in body:  # an abort by name
                    prefix = path.removesuffix("/generate")
                    await exchange(session, f"{prefix}/abort_request", {"rid": body["rid"]})
                    await asyncio.wait([call])
                    call.exception()
                    tally["aborted"] += 1
                    continue
                if not call.done():  # a disconnect
                    call.cancel()
                    await asyncio.wait([call])
                    tally["disconnected"] += 1
                    continue
            status = await call
            tally[str(status)] = tally.get(str(status), 0) + 1


async def exchange(session: aiohttp.ClientSession, path: str, body: dict[str, Any]) -> int:
    async with session.post(path, json=body) as answer:
        await answer.read()
        return answer.status


def report(tally: dict[str, int], figures: list[dict[str, dict[str, int]]]) -> None:
    print(json.dumps({"minutes": MINUTES, "answers": tally}))
    for name in figures[0] if figures else ():
        rows = [moment[name] for moment in figures if name in moment]
        print(name, json.dumps({key: [row[key] for row in rows] for key in rows[0]}))


def nothing_promised(server: Server) -> bool:
    return not any(rank["promised_bytes"] for rank in server.get("/crosspool/status")["ranks"])


def pools_empty(server: Server) -> bool:
    return all(
        device["free_bytes"] == device["budget_bytes"]
        for device in server.get("/crosspool/pools")
        if device["budget_bytes"]
    )


@pytest.mark.slow
def test_mixed_traffic_leaks_nothing(split_server: Server) -> None:
    texts = sentences(40)
    tally = {"aborted": 0, "disconnected": 0}
    figures: list[dict[str, dict[str, int]]] = []

    async def run(server: Server) -> None:
        start = time.monotonic()
        until = start + 60 * MINUTES
        clients = [
            asyncio.ensure_future(client(server, seed, until, tally, texts))
            for seed in range(CLIENTS)
        ]
        next_look = start + 60 * MINUTES * WARM_SHARE
        while not all(c.done() for c in clients):
            await asyncio.wait(clients, timeout=1)
            if time.monotonic() >= next_look:
                figures.append(await asyncio.to_thread(measure, server))
                next_look += 60 * MINUTES / 12
        for c in clients:
            c.result()

    try:
        asyncio.run(run(split_server))
    finally:
        report(tally, figures)
    deadline = time.monotonic() + 30
    while not nothing_promised(split_server) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert nothing_promised(split_server), split_server.get("/crosspool/status")
    assert split_server.manage("/flush_cache")[0] == 200
    while not pools_empty(split_server) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert pools_empty(split_server), split_server.get("/crosspool/pools")
    figures.append(measure(split_server))
    assert split_server.status("/health") == 200

    assert all(moment.keys() == figures[0].keys() for moment in figures), "a process came or went"
    assert tally.pop("aborted") > 0 and tally.pop("disconnected") > 0
    assert set(tally) <= {"200", "429"} and tally["200"] > 0
    first, last = figures[0], figures[-1]
    for name, before in first.items():
        after = last[name]
        # open connections come and go; a leak grows with the number of requests
        assert after["fds"] <= before["fds"] + 16, (name, before, after)
        assert after["threads"] <= before["threads"] + 8, (name, before, after)
        allowance = 48 << 10
        assert after["uss_kib"] <= before["uss_kib"] + allowance, (name, before, after)
