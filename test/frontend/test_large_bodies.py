"""What takes long with a large body happens beside the event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest
from crosspool.frontend import private_routes
from crosspool.frontend.ollama import Ollama
from sglang.srt.entrypoints.ollama.protocol import OllamaChatRequest


async def in_thread(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a tokenizer manager has for work that takes long."""
    return await asyncio.to_thread(function, *arguments)


async def chat_with_ollama(note: Callable[[], None]) -> None:
    class Tokenizer:
        def apply_chat_template(self, messages: Any, **_: Any) -> list[int]:
            note()
            raise ValueError("this is as far as it goes")

    handler = Ollama(SimpleNamespace(tokenizer=Tokenizer(), run_in_thread=in_thread))
    request = OllamaChatRequest(model="m", messages=[{"role": "user", "content": "a"}])
    with pytest.raises(Exception, match="as far as it goes"):
        await handler.handle_chat(request, None)


async def ask_for_a_response(note: Callable[[], None]) -> None:
    class Handler:
        async def _make_request(self, *arguments: Any) -> tuple[Any, ...]:
            note()
            return arguments

    async def nothing(*_: Any) -> None: ...

    chat = SimpleNamespace(
        handle_request=nothing, _validate_request=None, _convert_to_internal_request=None
    )
    anthropic = SimpleNamespace(
        _handle_streaming=nothing, _handle_non_streaming=nothing, handle_count_tokens=nothing
    )
    converter = SimpleNamespace(_handle_non_streaming_request=nothing)
    responses = Handler()
    state = SimpleNamespace(
        openai_serving_chat=chat,
        anthropic_serving=anthropic,
        openai_serving_tokenize=converter,
        openai_serving_detokenize=converter,
        openai_serving_completion=SimpleNamespace(handle_request=nothing),
        openai_serving_responses=responses,
    )
    module = SimpleNamespace(app=SimpleNamespace(state=state))
    private_routes.take_work_elsewhere(module, in_thread)
    assert await responses._make_request("request", None) == ("request", None)


@pytest.mark.parametrize("ask", [chat_with_ollama, ask_for_a_response])
@pytest.mark.parametrize("large", [False, True])
def test_the_prompt_of_a_large_body_is_made_beside_the_event_loop(
    ask: Callable[[Callable[[], None]], Awaitable[None]], large: bool
) -> None:
    threads: list[threading.Thread] = []

    async def scenario() -> None:
        private_routes.large_body.set(large)
        await ask(lambda: threads.append(threading.current_thread()))

    asyncio.run(scenario())
    (thread,) = threads
    assert (thread is not threading.main_thread()) == large
