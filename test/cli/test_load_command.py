"""What `crosspool load` and `crosspool unload` ask of the server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from crosspool.cli import load, managing, unload
from crosspool.config.deployment_file import to_model_options
from crosspool.config.device import Device
from crosspool.config.errors import ConfigError

TOLD = {"name": "m", "state": "falling_asleep", "attention_bytes": 1 << 20, "ffn_bytes": 1 << 20}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    made: list[tuple[Any, ...]] = []

    def call(port: int | None, method: str, path: str, body: Any = None) -> dict[str, Any]:
        made.append((port, method, path, body))
        return TOLD

    monkeypatch.setattr(managing, "call", call)
    return made


def test_flags_become_the_options_of_the_model(
    calls: list[tuple[Any, ...]], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["models/qwen", "--name", "org/qwen", "--port", "7", "--keep", "pinned", "--ttl", "9"]
    words += ["--weight-pool-devices", "cpu:0,cpu:1", "--kv-ceiling-bytes", "64MiB"]
    words += ["--tool-call-parser", "qwen25", "--trust-remote-code", "--priority", "3"]
    words += ["--default-chat-template-kwargs", '{"enable_thinking": false}']
    assert load.run(words, "crosspool load") == 0
    assert capsys.readouterr().out == "m is falling asleep; its weights take 2.0 MiB\n"
    ((port, method, path, body),) = calls
    assert (port, method, path) == (7, "POST", "")
    options = to_model_options(body, "body")  # as the server reads it
    assert options.path == str(Path.cwd() / "models/qwen")
    assert (options.name, options.keep) == ("org/qwen", "pinned")
    assert (options.ttl, options.priority) == (9.0, 3)
    assert options.weight_pool_devices == (Device("cpu:0"), Device("cpu:1"))
    assert options.kv_ceiling_bytes == 64 << 20
    assert options.sglang == {
        "tool_call_parser": "qwen25",
        "trust_remote_code": True,
        "default_chat_template_kwargs": {"enable_thinking": False},
    }


def test_only_what_is_given_is_said(calls: list[tuple[Any, ...]]) -> None:
    load.run(["/models/qwen"], "crosspool load")
    assert calls == [(None, "POST", "", {"path": "/models/qwen", "sglang": {}})]


@pytest.mark.parametrize("words", [[], ["a", "b"], ["a", "--api-key", "x"], ["a", "--keep", "no"]])
def test_wrong_words_are_a_mistake(calls: list[tuple[Any, ...]], words: list[str]) -> None:
    with pytest.raises(ConfigError):
        load.run(words, "crosspool load")
    assert not calls


def test_unload_names_the_model_and_the_time(calls: list[tuple[Any, ...]]) -> None:
    unload.run(["org/a b", "--timeout", "2.5"], "crosspool unload")
    unload.run(["m"], "crosspool unload")
    assert calls == [
        (None, "DELETE", "/org/a%20b?timeout=2.5", None),
        (None, "DELETE", "/m", None),
    ]
