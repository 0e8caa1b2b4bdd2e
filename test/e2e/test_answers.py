"""What answers say: samples, echoes and offsets, stop sequences, Ollama's routes."""

from __future__ import annotations

import json
from typing import Any

import pytest
from support.server import TINY_MODELS, Server

MODEL, OTHER = TINY_MODELS[:2]
PROMPT = "The import statement"


def complete(server: Server, **body: Any) -> list[dict[str, Any]]:
    defaults: dict[str, Any] = {"model": MODEL, "prompt": PROMPT, "max_tokens": 12}
    status, answer = server.post("/v1/completions", {**defaults, **body})
    assert status == 200, answer
    choices: list[dict[str, Any]] = answer["choices"]
    return choices


def events(server: Server, path: str, body: dict[str, Any]) -> list[str]:
    """The lines of a stream that hold something. A stream of one piece, as a slow reader may get,
    is whole JSON, which ``post`` has decoded."""
    status, text = server.post(path, body)
    assert status == 200, text
    if not isinstance(text, str):
        return [json.dumps(text)]
    return [line for line in text.splitlines() if line]


# --- samples


def texts(server: Server, **body: Any) -> list[str]:
    return [choice["text"] for choice in complete(server, temperature=1.2, seed=5, **body)]


def test_samples_of_one_seed_differ_and_come_again(server: Server) -> None:
    three = texts(server, n=3)
    assert len(set(three)) == 3
    assert texts(server, n=3) == three
    assert texts(server, n=5)[:3] == three
    assert texts(server) == texts(server, n=1) == three[:1]


def test_samples_of_several_prompts(server: Server) -> None:
    prompts = [PROMPT, "A module is"]
    both = texts(server, n=3, prompt=prompts)
    assert both == texts(server, n=3, prompt=prompts[0]) + texts(server, n=3, prompt=prompts[1])


def test_samples_in_a_stream_and_natively(server: Server) -> None:
    three = texts(server, n=3)
    said = ["", "", ""]
    body = {"model": MODEL, "prompt": PROMPT, "max_tokens": 12, "temperature": 1.2, "seed": 5}
    for line in events(server, "/v1/completions", {**body, "n": 3, "stream": True}):
        if line != "data: [DONE]":
            for choice in json.loads(line.removeprefix("data: "))["choices"]:
                said[choice["index"]] += choice["text"]
    assert said == three
    params = {"n": 3, "max_new_tokens": 12, "temperature": 1.2, "sampling_seed": 5}
    status, answers = server.post("/generate", {"text": PROMPT, "sampling_params": params})
    assert status == 200 and [answer["text"] for answer in answers] == three


def test_samples_with_a_least_length(server: Server) -> None:
    choices = complete(server, n=2, min_tokens=12, temperature=1.2)
    assert [choice["finish_reason"] for choice in choices] == ["length", "length"]


# --- echoes


def test_an_echo_without_anything_generated(server: Server) -> None:
    (plain,) = complete(server, echo=True, max_tokens=0)
    assert (plain["text"], plain["finish_reason"]) == (PROMPT, "length")
    (choice,) = complete(server, echo=True, max_tokens=0, logprobs=2)
    (longer,) = complete(server, echo=True, max_tokens=3, logprobs=2, temperature=0)
    logprobs, more = choice["logprobs"], longer["logprobs"]
    count = len(logprobs["tokens"])
    assert "".join(logprobs["tokens"]) == PROMPT and count > 1
    assert len(more["tokens"]) == count + 3
    for name in ("tokens", "text_offset"):
        assert logprobs[name] == more[name][:count]
    assert logprobs["token_logprobs"][1:] == pytest.approx(more["token_logprobs"][1:count])
    assert [best and sorted(best) for best in logprobs["top_logprobs"]] == [
        best and sorted(best) for best in more["top_logprobs"][:count]
    ]
    assert logprobs["token_logprobs"][0] is None and max(logprobs["token_logprobs"][1:]) < 0
    status, answer = server.post(
        "/v1/completions", {"model": MODEL, "prompt": PROMPT, "max_tokens": -1}
    )
    assert status == 400 and "max_tokens must be at least 0" in answer["error"]["message"]


@pytest.mark.parametrize("echo", [False, True])
def test_offsets_say_where_tokens_begin(server: Server, echo: bool) -> None:
    (choice,) = complete(server, echo=echo, logprobs=1, temperature=0)
    logprobs = choice["logprobs"]
    for token, offset in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
        assert choice["text"][offset:].startswith(token)
    body = {"model": MODEL, "prompt": PROMPT, "max_tokens": 12, "echo": echo, "logprobs": 1}
    streamed: list[int] = []
    for line in events(server, "/v1/completions", {**body, "temperature": 0, "stream": True}):
        if line != "data: [DONE]":
            for piece in json.loads(line.removeprefix("data: "))["choices"]:
                streamed += (piece["logprobs"] or {"text_offset": []})["text_offset"]
    assert streamed == logprobs["text_offset"]


def test_an_echo_has_log_probabilities_also_without_others_beside_them(server: Server) -> None:
    (with_one,) = complete(server, echo=True, logprobs=1, temperature=0)
    (choice,) = complete(server, echo=True, logprobs=0, temperature=0)
    logprobs = choice["logprobs"]
    assert logprobs["tokens"] == with_one["logprobs"]["tokens"]
    assert logprobs["token_logprobs"][0] is logprobs["top_logprobs"][0] is None
    pairs = zip(logprobs["tokens"][1:], logprobs["token_logprobs"][1:], strict=True)
    assert logprobs["top_logprobs"][1:] == [{token: value} for token, value in pairs]
    body = {"model": MODEL, "prompt": PROMPT, "max_tokens": 12, "temperature": 0, "stream": True}
    lines = events(server, "/v1/completions", {**body, "echo": True, "logprobs": 0})
    first = json.loads(lines[0].removeprefix("data: "))["choices"][0]["logprobs"]
    assert first["tokens"] == logprobs["tokens"][: len(first["tokens"])]
    assert len(first["tokens"]) == len(first["top_logprobs"]) > 1


# --- calls and usage


@pytest.mark.parametrize("name", ["paint", "draw"])
def test_a_call_that_must_be_made_is_of_the_named_tool_and_fits_its_schema(
    server: Server, name: str
) -> None:
    schema = {
        "type": "object",
        "properties": {"size": {"type": "integer", "minimum": 1, "maximum": 9}},
        "required": ["size"],
        "additionalProperties": False,
    }
    tools = [
        {"type": "function", "function": {"name": one, "parameters": schema}}
        for one in ("paint", "draw")
    ]
    body = {"model": MODEL, "max_tokens": 200, "temperature": 1, "tools": tools}
    body["messages"] = [{"role": "user", "content": "Use a tool."}]
    named = {"type": "function", "function": {"name": name}}
    for seed in range(3):
        for choice in (named, "required"):
            asked = {**body, "tool_choice": choice, "seed": seed}
            status, answer = server.post("/v1/chat/completions", asked)
            assert status == 200, answer
            call = answer["choices"][0]["message"]["tool_calls"][0]["function"]
            assert choice == "required" or call["name"] == name
            assert 1 <= json.loads(call["arguments"]).pop("size") <= 9


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("/v1/completions", {"prompt": PROMPT}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": PROMPT}]}),
    ],
)
def test_options_of_a_stream(server: Server, path: str, said: dict[str, Any]) -> None:
    body = {"model": MODEL, "max_tokens": 3, **said}
    status, answer = server.post(path, {**body, "stream_options": {"include_usage": True}})
    assert status == 400 and "`stream_options`" in answer["error"]["message"]
    options = {"continuous_usage_stats": True}
    for wanted, given in ((True, options), (False, {**options, "include_usage": False})):
        lines = events(server, path, {**body, "stream": True, "stream_options": given})
        pieces = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
        parts = [(piece, choice) for piece in pieces for choice in piece["choices"]]
        texts = [piece for piece, c in parts if c.get("text") or c.get("delta", {}).get("content")]
        assert {piece.get("usage") is not None for piece in texts} == {wanted}


# --- Anthropic's route


def message(server: Server, **body: Any) -> dict[str, Any]:
    return {
        "model": MODEL,
        "max_tokens": 30,
        "temperature": 0,
        "messages": [{"role": "user", "content": "Tell me about import."}],
        **body,
    }


def test_the_stop_sequence_that_ended_a_message(server: Server) -> None:
    status, whole = server.post("/v1/messages", message(server))
    assert status == 200 and whole.get("stop_sequence") is None
    word = whole["content"][0]["text"].split()[3]
    stopping = message(server, stop_sequences=["never said", word])
    status, answer = server.post("/v1/messages", stopping)
    assert status == 200
    assert (answer["stop_reason"], answer["stop_sequence"]) == ("stop_sequence", word)
    deltas = [
        json.loads(line.removeprefix("data: "))["delta"]
        for line in events(server, "/v1/messages", {**stopping, "stream": True})
        if line.startswith("data: ") and '"message_delta"' in line
    ]
    assert [(d["stop_reason"], d["stop_sequence"]) for d in deltas] == [("stop_sequence", word)]
    *_, end = events(server, "/v1/messages", message(server, max_tokens=4, stream=True))
    assert "message_stop" in end


# --- Ollama's routes


@pytest.mark.parametrize("model", TINY_MODELS)
@pytest.mark.parametrize("route", ["chat", "generate"])
def test_ollama(server: Server, model: str, route: str) -> None:
    body: dict[str, Any] = {"model": model, "options": {"num_predict": 8, "temperature": 0}}
    if route == "chat":
        body["messages"] = [{"role": "user", "content": "Tell me about import."}]
    else:
        body["prompt"] = PROMPT

    def text(answer: dict[str, Any]) -> str:
        return str(answer["message"]["content"] if route == "chat" else answer["response"])

    status, whole = server.post(f"/api/{route}", {**body, "stream": False})
    assert (status, whole["model"], whole["done"]) == (200, model, True)
    assert text(whole) and 0 < whole["eval_count"] <= 8
    if route == "chat":
        status, chat = server.post(
            "/v1/chat/completions",
            {"model": model, "messages": body["messages"], "max_tokens": 8, "temperature": 0},
        )
        assert text(whole) == chat["choices"][0]["message"]["content"]
    pieces = [json.loads(line) for line in events(server, f"/api/{route}", body)]
    assert "".join(map(text, pieces)) == text(whole)
    assert [piece["done"] for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert pieces[-1]["done_reason"] == whole["done_reason"]


def test_ollamas_seeds_and_formats(server: Server) -> None:
    def said(seed: int, **more: Any) -> str:
        options = {"num_predict": 20, "temperature": 1.2, "seed": seed}
        body = {"model": MODEL, "prompt": PROMPT, "stream": False, "options": options, **more}
        status, answer = server.post("/api/generate", body)
        assert status == 200, answer
        return str(answer["response"])

    assert said(1) == said(1) != said(2)
    schema = {"type": "string", "enum": ["import"]}
    assert json.loads(said(1, format=schema)) == "import"


@pytest.mark.parametrize(
    ("path", "body", "named"),
    [
        ("/api/chat", {"messages": []}, "messages"),
        ("/api/chat", {"messages": [{"role": "user", "content": "x " * 5000}]}, "longer"),
        ("/api/generate", {"prompt": "x", "options": {"num_predict": [127]}}, "num_predict"),
        ("/api/generate", {"prompt": "x", "options": {"stop": [1]}}, "stop"),
        ("/api/generate", {"prompt": "x", "options": {"top_p": 7}}, "top_p"),
        ("/api/generate", {"prompt": "x " * 5000}, "longer"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_ollamas_routes_refuse(
    server: Server, path: str, body: dict[str, Any], named: str, stream: bool
) -> None:
    status, answer = server.post(path, {"model": MODEL, "stream": stream, **body})
    assert status == 400 and named in answer["error"]["message"], answer
