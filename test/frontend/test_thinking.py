"""Models that think first: what they think is free, what they answer keeps to the grammar."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from support.front_end import MODELS, FrontEndServer, deployment

ONE_COLOUR = {
    "type": "object",
    "properties": {"colour": {"type": "string", "enum": ["red"]}},
    "required": ["colour"],
    "additionalProperties": False,
}
TOOL: Any = {
    "type": "function",
    "function": {"name": "paint", "parameters": ONE_COLOUR, "strict": True},
}
PAINT = "Paint it."
CALL = '<tool_call>\n{"name":"paint", "arguments":{"colour": "red"}}\n</tool_call>'
ANSWER = '{"n": 7}'
THOUGHTS = "quick brown fox"
SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer"}},
    "required": ["n"],
    "additionalProperties": False,
}
JSON_FORMAT: Any = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}


@pytest.fixture(scope="module")
def thoughts(tokenizers: Any) -> list[list[int]]:
    """Tokens of the thoughts and of their end, which is a token of its own where models think."""
    texts = (THOUGHTS, "</think>")
    return [
        [token for text in texts for token in t.encode(text, add_special_tokens=False)]
        for t in tokenizers
    ]


@pytest.fixture(scope="module")
def client(tokenizers: Any, thoughts: list[list[int]]) -> Iterator[openai.OpenAI]:
    answers, calls = (
        [t.encode(text, add_special_tokens=False) for t in tokenizers] for text in (ANSWER, CALL)
    )

    def next_token(model: int, tokens: list[int], prompt: int) -> int:
        asked = tokenizers[model].decode(tokens[:prompt])
        script = thoughts[model] + (calls if PAINT in asked else answers)[model]
        return script[min(len(tokens) - prompt, len(script) - 1)]

    running = FrontEndServer(
        deployment(sglang={"reasoning_parser": "qwen3", "tool_call_parser": "qwen"}), next_token
    )
    try:
        running.wait_ready()
        yield openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0)
    finally:
        running.stop()


def ask(client: openai.OpenAI, model: int, say: str = "A number?", **fields: Any) -> Any:
    return client.chat.completions.create(
        model=MODELS[model],
        messages=[{"role": "user", "content": say}],
        max_tokens=200,
        **fields,
    )


@pytest.mark.parametrize("model", [0, 1])
def test_a_schema_binds_the_answer_and_not_the_thoughts(
    client: openai.OpenAI, thoughts: list[list[int]], model: int
) -> None:
    got = ask(client, model, response_format=JSON_FORMAT)
    message = got.choices[0].message
    assert json.loads(message.content) == {"n": 7}
    assert message.reasoning_content.strip() == THOUGHTS
    assert got.choices[0].finish_reason == "stop"
    assert got.usage.reasoning_tokens == len(thoughts[model])
    assert got.usage.completion_tokens_details.reasoning_tokens == len(thoughts[model])


def test_a_stream_has_both_parts_and_the_count(
    client: openai.OpenAI, thoughts: list[list[int]]
) -> None:
    chunks = list(
        ask(
            client, 0, response_format=JSON_FORMAT, stream=True,
            stream_options={"include_usage": True},
        )
    )  # fmt: skip
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    assert json.loads("".join(delta.content or "" for delta in deltas)) == {"n": 7}
    thought = "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas)
    assert thought.strip() == THOUGHTS
    assert chunks[-1].usage.reasoning_tokens == len(thoughts[0])
    assert chunks[-1].usage.completion_tokens_details.reasoning_tokens == len(thoughts[0])


def test_a_request_that_turns_thinking_off_is_bound_from_the_first_token(
    client: openai.OpenAI,
) -> None:
    off = {"chat_template_kwargs": {"enable_thinking": False}}
    got = ask(client, 0, response_format=JSON_FORMAT, extra_body=off)
    assert list(json.loads(got.choices[0].message.content)) == ["n"]
    assert got.usage.reasoning_tokens == 0


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "paint"}}]
)
def test_a_tool_that_must_be_called_is_called_after_thinking(
    client: openai.OpenAI, thoughts: list[list[int]], choice: Any, stream: bool
) -> None:
    got = ask(
        client, 0, PAINT, tools=[TOOL], tool_choice=choice, stream=stream,
        **({"stream_options": {"include_usage": True}} if stream else {}),
    )  # fmt: skip
    if stream:
        chunks = list(got)
        parts = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
        usage = chunks[-1].usage
    else:
        parts, usage = [got.choices[0].message], got.usage
    thought = "".join(getattr(part, "reasoning_content", None) or "" for part in parts)
    calls = [call.function for part in parts for call in part.tool_calls or ()]
    assert thought.strip() == THOUGHTS
    assert "".join(call.name or "" for call in calls) == "paint"
    assert json.loads("".join(call.arguments or "" for call in calls)) == {"colour": "red"}
    assert "".join(part.content or "" for part in parts).strip() == ""
    assert usage.reasoning_tokens == len(thoughts[0])
