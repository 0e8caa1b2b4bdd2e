"""``/v1/responses``, as the openai client has it: answers, streams, tools, and the store."""

from __future__ import annotations

import json
import time
from typing import Any

import openai
import pytest
from pydantic import BaseModel
from support.server import TINY_MODELS, Server

MODEL, OTHER = TINY_MODELS[:2]


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120)


def create(client: openai.OpenAI, text: Any = "Tell me about import.", **arguments: Any) -> Any:
    defaults: dict[str, Any] = {"model": MODEL, "max_output_tokens": 12, "temperature": 0}
    return client.responses.create(input=text, **(defaults | arguments))


@pytest.mark.parametrize("model", TINY_MODELS)
def test_a_response_says_what_a_chat_completion_says(client: openai.OpenAI, model: str) -> None:
    messages: list[Any] = [{"role": "user", "content": "Tell me about import."}]
    chat = client.chat.completions.create(
        model=model, messages=messages, max_tokens=12, temperature=0
    )
    response = create(client, model=model)
    assert chat.choices[0].message.content and chat.usage
    # SGLang gives the model two tokens less than it is asked for.
    assert response.output_text
    assert chat.choices[0].message.content.startswith(response.output_text)
    assert response.usage.input_tokens == chat.usage.prompt_tokens
    assert (response.model, response.status) == (model, "incomplete")


def test_a_stream_says_the_same(client: openai.OpenAI) -> None:
    whole = create(client, max_output_tokens=30)
    events = list(create(client, max_output_tokens=30, stream=True))
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == whole.output_text and len(deltas) > 1
    assert events[0].type == "response.created"
    assert events[-1].type in ("response.completed", "response.incomplete")
    assert events[-1].response.usage.output_tokens == whole.usage.output_tokens


def test_a_schema_and_a_tool(client: openai.OpenAI) -> None:
    class Item(BaseModel):
        count: int

    parsed = client.responses.parse(
        model=MODEL, input="x", text_format=Item, max_output_tokens=80, temperature=0
    )
    assert isinstance(parsed.output_parsed, Item)
    tool = {
        "type": "function",
        "name": "get_weather",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    }
    choice = {"type": "function", "name": "get_weather"}
    called = create(client, tools=[tool], tool_choice=choice, max_output_tokens=200)
    (call,) = (item for item in called.output if item.type == "function_call")
    assert call.name == "get_weather"
    assert json.loads(call.arguments)["city"] in ("Paris", "Rome")


def test_a_conversation_goes_on_with_the_model_that_is_asked(client: openai.OpenAI) -> None:
    first = create(client)
    assert client.responses.retrieve(first.id).output_text == first.output_text
    said = [
        {"role": "user", "content": "Tell me about import."},
        {"role": "assistant", "content": first.output_text},
        {"role": "user", "content": "Go on."},
    ]
    for model in (MODEL, OTHER):
        second = create(client, "Go on.", model=model, previous_response_id=first.id)
        same = create(client, said, model=model)
        assert second.output_text == same.output_text
        assert second.usage.input_tokens == same.usage.input_tokens > first.usage.input_tokens
        assert (second.model, second.previous_response_id) == (model, first.id)


def test_a_response_in_the_background_is_cancelled_by_its_id_alone(
    client: openai.OpenAI, server: Server
) -> None:
    response = create(client, model=OTHER, background=True, max_output_tokens=3000)
    assert response.status == "queued"
    # On a busy machine the model may have come to its end by then.
    over = ("incomplete", "completed")
    assert client.responses.retrieve(response.id).status in ("queued", "in_progress", *over)
    assert client.responses.cancel(response.id).status in ("cancelled", *over)
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        models = server.get("/crosspool/status")["models"]
        if not any(model["running"] or model["waiting"] for model in models):
            break
        time.sleep(0.05)
    assert not any(model["running"] or model["waiting"] for model in models)


def test_the_least_recently_used_response_is_forgotten(client: openai.OpenAI) -> None:
    kept, forgotten = create(client, max_output_tokens=3), create(client, max_output_tokens=3)
    for _ in range(29):
        client.responses.retrieve(kept.id)
        create(client, max_output_tokens=3)
    assert client.responses.retrieve(kept.id).id == kept.id
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(forgotten.id)
    unstored = create(client, store=False)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(unstored.id)


@pytest.mark.parametrize(
    ("body", "status", "named"),
    [
        ({"input": 5}, 400, "input"),
        ({"input": []}, 400, "input"),
        ({"input": "x", "previous_response_id": "resp_nobody"}, 404, "resp_nobody"),
        ({"input": "x", "previous_response_id": "nobody"}, 400, "nobody"),
        ({"input": "x " * 5000}, 400, "longer"),
        ({"input": "x", "max_output_tokens": "many"}, 400, "max_output_tokens"),
        ({"input": "x", "model": "nobody"}, 404, "nobody"),
    ],
)
def test_bad_requests(server: Server, body: dict[str, Any], status: int, named: str) -> None:
    got, answer = server.post("/v1/responses", {"model": MODEL, **body})
    assert (got, answer["error"]["code"] in (status, "model_not_found")) == (status, True), answer
    assert named in answer["error"]["message"]


def test_without_a_name_the_first_model_is_meant(server: Server) -> None:
    for body in ({"input": "x"}, {"input": "x", "model": "default"}):
        status, answer = server.post("/v1/responses", {"max_output_tokens": 3, **body})
        assert (status, answer["model"]) == (200, MODEL)
    status, answer = server.post(f"/m/{OTHER}/v1/responses", {"input": "x", "max_output_tokens": 3})
    assert (status, answer["model"]) == (200, OTHER)


def test_ids_that_nobody_has(server: Server) -> None:
    assert server.status("/v1/responses/resp_nobody") == 404
    assert server.status("/v1/responses/nobody") == 400
    assert server.post("/v1/responses/resp_nobody/cancel", {})[0] == 404
