"""A fleet of the bundled models in a pool for two of them, and what is asked of it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from support.server import DEMO, TINY_MODELS, Server

QWEN, DEEPSEEK, GLM = TINY_MODELS
FFN_BYTES = {QWEN: 6_307_840, DEEPSEEK: 5_025_792, GLM: 4_583_520}
FOR_TWO = FFN_BYTES[QWEN] + FFN_BYTES[DEEPSEEK]
"""Bytes of the smallest weight pool that holds any two of the models."""
FLAGS = ("--dtype", "float32", "--kv-pool-bytes", "64MiB", "--packed-cache-bytes", "1GiB")
PROMPT = "The import statement combines two operations; it searches for the named module. " * 4


def told_of(server: Server) -> dict[str, Any]:
    """What the server tells of each model, by its name."""
    return {model["name"]: model for model in server.get("/crosspool/models")}


def state_of(server: Server, model: str) -> str:
    return str(told_of(server)[model]["state"])


def restarts(server: Server) -> int:
    return sum(device["restarts"] for device in server.get("/crosspool/status")["devices"])


def do(server: Server, what: str, model: str, body: Any = None) -> Any:
    """Wakes a model, has it sleep or pins it; returns what is told of it then."""
    status, text = server.manage(f"/crosspool/models/{model}/{what}", body)
    assert status == 200, text
    return json.loads(text)


def bring(server: Server, name: str, path: str | Path, /, **options: Any) -> tuple[int, Any]:
    """Status and body of the answer to a load of a bundled model, or of a checkpoint elsewhere."""
    body = {"path": str(DEMO / path), "name": name, "dtype": "float32", **options}
    with server.admin() as client:
        answer = client.post("/crosspool/models", json=body, timeout=120)
        return answer.status_code, answer.json()


def take(server: Server, name: str) -> tuple[int, Any]:
    """Status and body of the answer to an unload."""
    with server.admin() as client:
        answer = client.delete(f"/crosspool/models/{name}", timeout=120)
        return answer.status_code, answer.json()


def ask(server: Server, model: str, prompt: str = PROMPT) -> tuple[int, Any]:
    """Status and body of the answer to a greedy request for eight tokens."""
    sampling = {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True}
    return server.post(f"/m/{model}/generate", {"text": prompt, "sampling_params": sampling})


def generate(server: Server, model: str, prompt: str = PROMPT) -> Any:
    """The answer to :func:`ask`. Raises AssertionError unless it is a good one."""
    status, answer = ask(server, model, prompt)
    assert status == 200, (answer, server.log[-3000:])
    return answer


def wait_for(server: Server, condition: Callable[[], bool], seconds: float = 60) -> None:
    """Returns once the condition holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, server.log[-3000:]
        time.sleep(0.02)
