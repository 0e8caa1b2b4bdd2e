"""A smoke test of each client: the docstrings say what is tried.

They run in the clients' environment, which has neither CrossPool nor SGLang, and find the server by
the variable CROSSPOOL_URL."""

from __future__ import annotations

import asyncio
import os
from typing import Any

import pydantic
import pytest

URL = os.environ["CROSSPOOL_URL"]
MODEL = "tiny-qwen3-moe"
OTHER = "tiny-deepseek-v2"
KEY = "none"
QUESTION = "What does the import statement do?"
ASKED: list[Any] = [{"role": "user", "content": QUESTION}]
WEATHER: dict[str, Any] = {
    "name": "get_weather",
    "description": "Returns the weather of a city.",
    "strict": True,
    "parameters": {
        "type": "object",
        "properties": {"days": {"enum": [1, 7]}, "warm": {"type": "boolean"}},
        "required": ["days", "warm"],
        "additionalProperties": False,
    },
}
TOOL = {"type": "function", "function": WEATHER}


class Answer(pydantic.BaseModel):
    """What structured output must come to. A tiny model ends it, since nothing in it is long."""

    count: int = pydantic.Field(ge=0, le=9)
    sure: bool


@pytest.fixture
def openai_client() -> Any:
    import openai

    return openai.OpenAI(base_url=f"{URL}/v1", api_key=KEY, max_retries=0, timeout=60)


# --- openai


def test_openai_models(openai_client: Any) -> None:
    """list and retrieve models"""
    names = [model.id for model in openai_client.models.list()]
    assert {MODEL, OTHER} <= set(names)
    assert openai_client.models.retrieve(OTHER).id == OTHER


def test_openai_chat(openai_client: Any) -> None:
    """chat, whole and streamed, with usage and log-probabilities"""
    chat = openai_client.chat.completions
    given = {"model": MODEL, "messages": ASKED, "max_tokens": 12, "temperature": 0}
    whole = chat.create(**given, logprobs=True, top_logprobs=2)
    assert len(whole.choices[0].logprobs.content[0].top_logprobs) == 2
    parts = list(chat.create(**given, stream=True, stream_options={"include_usage": True}))
    text = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
    assert text == whole.choices[0].message.content
    assert parts[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_openai_parse(openai_client: Any) -> None:
    """chat with a pydantic class as response_format"""
    parsed = openai_client.chat.completions.parse(
        model=MODEL, messages=ASKED, response_format=Answer, max_tokens=100
    )
    assert isinstance(parsed.choices[0].message.parsed, Answer)


def test_openai_tools(openai_client: Any) -> None:
    """chat with a required, strict tool"""
    answer = openai_client.chat.completions.create(
        model=MODEL,
        messages=ASKED,
        tools=[TOOL],
        tool_choice="required",
        max_tokens=200,
        temperature=0,
    )
    call = answer.choices[0].message.tool_calls[0].function
    assert call.name == "get_weather"
    assert answer.choices[0].finish_reason == "tool_calls"


def test_openai_completions(openai_client: Any) -> None:
    """completions of a list of prompts, two of each"""
    answer = openai_client.completions.create(
        model=OTHER, prompt=["import", "def"], n=2, max_tokens=5
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]


def test_openai_errors(openai_client: Any) -> None:
    """an unknown model and a wrong value raise the client's own errors"""
    import openai

    with pytest.raises(openai.NotFoundError):
        openai_client.chat.completions.create(model="none", messages=ASKED)
    with pytest.raises(openai.BadRequestError):
        openai_client.chat.completions.create(model=MODEL, messages=ASKED, temperature=-1)


def test_openai_responses(openai_client: Any) -> None:
    """responses, whole and streamed"""
    given = {"model": MODEL, "input": QUESTION, "max_output_tokens": 12, "temperature": 0}
    whole = openai_client.responses.create(**given)
    assert whole.output_text
    events = list(openai_client.responses.create(**given, stream=True))
    assert events[0].type == "response.created"
    assert events[-1].type in {"response.completed", "response.incomplete"}


def test_openai_async() -> None:
    """twenty chats at once of two models"""
    import openai

    async def chats() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=f"{URL}/v1", api_key=KEY) as client:
            asked = (
                client.chat.completions.create(
                    model=(MODEL, OTHER)[i % 2], messages=ASKED, max_tokens=8
                )
                for i in range(20)
            )
            return list(await asyncio.gather(*asked))

    assert [answer.model for answer in asyncio.run(chats())] == [MODEL, OTHER] * 10


# --- litellm


def test_litellm_chat() -> None:
    """chat, whole and streamed"""
    import litellm

    given: dict[str, Any] = {"model": f"openai/{MODEL}", "api_base": f"{URL}/v1", "api_key": KEY}
    given |= {"messages": ASKED, "max_tokens": 12, "temperature": 0}
    whole = litellm.completion(**given)
    parts = litellm.completion(**given, stream=True)
    text = "".join(part.choices[0].delta.content or "" for part in parts)
    assert text == whole.choices[0].message.content


def test_litellm_text() -> None:
    """text completion"""
    import litellm

    answer = litellm.text_completion(
        model=f"text-completion-openai/{OTHER}",
        api_base=f"{URL}/v1",
        api_key=KEY,
        prompt="import",
        max_tokens=5,
    )
    assert answer.usage.completion_tokens > 0


# --- langchain-openai


@pytest.fixture
def langchain_chat() -> Any:
    from langchain_openai import ChatOpenAI

    return ChatOpenAI(model=MODEL, base_url=f"{URL}/v1", api_key=KEY, max_tokens=100, temperature=0)


def test_langchain_invoke(langchain_chat: Any) -> None:
    """invoke, stream and batch"""
    whole = langchain_chat.invoke(QUESTION)
    assert "".join(part.content for part in langchain_chat.stream(QUESTION)) == whole.content
    assert len(langchain_chat.batch([QUESTION, "Why?"])) == 2


def test_langchain_structured(langchain_chat: Any) -> None:
    """with_structured_output by JSON schema"""
    model = langchain_chat.with_structured_output(Answer, method="json_schema")
    assert isinstance(model.invoke(QUESTION), Answer)


def test_langchain_tools(langchain_chat: Any) -> None:
    """bind_tools with a required, strict tool"""
    answer = langchain_chat.bind_tools([TOOL], tool_choice="required", strict=True).invoke(QUESTION)
    assert answer.tool_calls[0]["name"] == "get_weather"


# --- llama-index


@pytest.fixture
def llama_index_model() -> Any:
    from llama_index.llms.openai_like import OpenAILike

    return OpenAILike(
        model=MODEL,
        api_base=f"{URL}/v1",
        api_key=KEY,
        is_chat_model=True,
        max_tokens=12,
        temperature=0,
    )


def test_llama_index_chat(llama_index_model: Any) -> None:
    """chat, whole and streamed"""
    from llama_index.core.llms import ChatMessage

    asked = [ChatMessage(role="user", content=QUESTION)]
    whole = llama_index_model.chat(asked)
    *_, last = llama_index_model.stream_chat(asked)
    assert last.message.content == whole.message.content


def test_llama_index_complete(llama_index_model: Any) -> None:
    """complete, as a model that does not chat"""
    model = llama_index_model.model_copy(update={"is_chat_model": False})
    assert model.complete("The import statement").text


# --- instructor


def test_instructor_json_schema(openai_client: Any) -> None:
    """a pydantic class by JSON schema"""
    import instructor

    client = instructor.from_openai(openai_client, mode=instructor.Mode.JSON_SCHEMA)
    answer = client.chat.completions.create(
        model=MODEL, messages=ASKED, response_model=Answer, max_tokens=100
    )
    assert isinstance(answer, Answer)


def test_instructor_list(openai_client: Any) -> None:
    """a list of a pydantic class by JSON schema"""
    import instructor

    client = instructor.from_openai(openai_client, mode=instructor.Mode.JSON_SCHEMA)

    class Answers(pydantic.BaseModel):
        answers: list[Answer] = pydantic.Field(min_length=2, max_length=2)

    found = client.chat.completions.create(
        model=MODEL, messages=ASKED, response_model=Answers, max_tokens=200
    )
    assert len(found.answers) == 2


def test_instructor_tools(openai_client: Any) -> None:
    """a pydantic class by a tool, its usual way"""
    import instructor

    client = instructor.from_openai(openai_client, mode=instructor.Mode.TOOLS)
    answer = client.chat.completions.create(
        model=MODEL, messages=ASKED, response_model=Answer, max_tokens=200, temperature=0
    )
    assert isinstance(answer, Answer)


# --- pydantic-ai


def test_pydantic_ai_text() -> None:
    """an agent that answers with text"""
    agent = _agent(output_type=str)
    assert isinstance(agent.run_sync(QUESTION).output, str)


def test_pydantic_ai_tool() -> None:
    """an agent that answers with a pydantic class, by a tool"""
    from pydantic_ai import ToolOutput

    agent = _agent(output_type=ToolOutput(Answer))
    assert isinstance(agent.run_sync(QUESTION).output, Answer)


def test_pydantic_ai_structured() -> None:
    """an agent that answers with a pydantic class, by the model's own JSON schema"""
    from pydantic_ai import NativeOutput

    agent = _agent(output_type=NativeOutput(Answer))
    assert isinstance(agent.run_sync(QUESTION).output, Answer)


def _agent(**more: Any) -> Any:
    from pydantic_ai import Agent
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    provider = OpenAIProvider(base_url=f"{URL}/v1", api_key=KEY)
    model = OpenAIChatModel(MODEL, provider=provider)
    return Agent(model, model_settings={"max_tokens": 100, "temperature": 0}, **more)


# --- anthropic


@pytest.fixture
def anthropic_client() -> Any:
    import anthropic

    return anthropic.Anthropic(base_url=URL, api_key=KEY, max_retries=0, timeout=60)


def test_anthropic_messages(anthropic_client: Any) -> None:
    """messages, whole and streamed, with usage"""
    given: dict[str, Any] = {"model": MODEL, "messages": ASKED, "max_tokens": 12}
    given["extra_body"] = {"temperature": 0}
    whole = anthropic_client.messages.create(**given)
    with anthropic_client.messages.stream(**given) as stream:
        assert "".join(stream.text_stream) == whole.content[0].text
        assert stream.get_final_message().usage.output_tokens == whole.usage.output_tokens


def test_anthropic_tools(anthropic_client: Any) -> None:
    """messages with a tool that it may call"""
    tool = {
        "name": "get_weather",
        "description": WEATHER["description"],
        "input_schema": WEATHER["parameters"],
    }
    answer = anthropic_client.messages.create(
        model=MODEL, messages=ASKED, max_tokens=20, tools=[tool], tool_choice={"type": "auto"}
    )
    assert answer.stop_reason in {"tool_use", "end_turn", "max_tokens"}
    assert answer.usage.input_tokens > 100  # the tool's description is part of the prompt


def test_anthropic_required_tool(anthropic_client: Any) -> None:
    """messages with a tool that it must call"""
    tool = {"name": "get_weather", "input_schema": WEATHER["parameters"]}
    choice = {"type": "tool", "name": "get_weather"}
    answer = anthropic_client.messages.create(
        model=MODEL, messages=ASKED, max_tokens=200, tools=[tool], tool_choice=choice
    )
    (call,) = [block for block in answer.content if block.type == "tool_use"]
    assert (
        call.name == "get_weather"
        and call.input.keys() == WEATHER["parameters"]["properties"].keys()
    )


def test_anthropic_count(anthropic_client: Any) -> None:
    """count_tokens"""
    assert anthropic_client.messages.count_tokens(model=MODEL, messages=ASKED).input_tokens > 0


def test_anthropic_errors(anthropic_client: Any) -> None:
    """an unknown model raises the client's own error"""
    import anthropic

    with pytest.raises(anthropic.NotFoundError) as raised:
        anthropic_client.messages.create(model="none", messages=ASKED, max_tokens=5)
    assert raised.value.body["error"]["type"] == "not_found_error"


# --- ollama


@pytest.fixture
def ollama_client() -> Any:
    import ollama

    return ollama.Client(host=URL, timeout=60)


def test_ollama_list(ollama_client: Any) -> None:
    """list of models"""
    assert {MODEL, OTHER} <= {model.model for model in ollama_client.list().models}


def test_ollama_generate(ollama_client: Any) -> None:
    """generate, whole and streamed"""
    given = {"model": OTHER, "prompt": "import", "options": {"num_predict": 8, "temperature": 0}}
    whole = ollama_client.generate(**given)
    parts = ollama_client.generate(**given, stream=True)
    assert "".join(part.response for part in parts) == whole.response


def test_ollama_chat(ollama_client: Any) -> None:
    """chat, whole and streamed"""
    given = {"model": MODEL, "messages": ASKED, "options": {"num_predict": 8, "temperature": 0}}
    whole = ollama_client.chat(**given)
    parts = ollama_client.chat(**given, stream=True)
    assert "".join(part.message.content for part in parts) == whole.message.content
