"""What CrossPool uses of the inside of SGLang's HTTP routes, as :mod:`crosspool.frontend.private`
does of the rest: private names, and public ones that it replaces."""

from __future__ import annotations

import copy
import functools
import importlib.util
import itertools
import json
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, TypeVar

from fastapi import FastAPI, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel
from pydantic_core import SchemaValidator
from sglang.srt.observability.func_timer import enable_func_timer
from sglang.srt.observability.trace import process_tracing_init
from starlette.datastructures import State
from starlette.middleware.cors import CORSMiddleware

from crosspool.frontend import private, private_answers, validation_errors

if TYPE_CHECKING:
    from sglang.srt.managers.tokenizer_manager import TokenizerManager

_Handler = TypeVar("_Handler", bound=Any)
large_body: ContextVar[bool] = ContextVar("large_body", default=False)
"""Whether the body of the current request is so large that tokenizing it can take long."""
_enable_func_timer_once = functools.cache(enable_func_timer)
_process_tracing_init_once = functools.cache(process_tracing_init)


_spare_copies: list[Any] = []
"""Copies of SGLang's ``http_server`` that models had which are gone: making one takes some tenths
of a second, and a module is never wholly forgotten."""
_copy_numbers = itertools.count()


def take_http_server_copy() -> Any:
    """A copy of SGLang's ``http_server`` module, whose application and state are module globals,
    for one model, until :func:`give_copy_back`. It neither warms up, serves /metrics nor adds CORS
    headers: CrossPool does so once for all models."""
    if _spare_copies:
        return _spare_copies.pop()
    return _http_server_copy(f"{__name__}.http_server_{next(_copy_numbers)}")


def give_copy_back(module: Any) -> None:
    """Forgets the model of a copy from :func:`take_http_server_copy`, whose lifespan has ended
    or never began, and keeps the copy for another one."""
    module.set_global_state(None)
    app = module.app
    app.state = State()
    app.dependency_overrides.clear()
    app.openapi_schema = None
    for name in ("server_args", "warmup_thread_kwargs"):
        vars(app).pop(name, None)
    _spare_copies.append(module)


def _http_server_copy(name: str) -> Any:
    http_server = mended_http_server()
    assert http_server.__file__ is not None
    spec = importlib.util.spec_from_file_location(name, http_server.__file__)
    assert spec is not None and spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    _end_at_first_wrong_entry(module.app)
    module._wait_and_warmup = lambda **_: None
    module.add_prometheus_middleware = lambda _: None
    module.enable_func_timer = _enable_func_timer_once
    module.process_tracing_init = _process_tracing_init_once
    app = module.app
    app.user_middleware = [m for m in app.user_middleware if m.cls is not CORSMiddleware]
    app.add_exception_handler(RequestValidationError, validation_errors.respond)
    return module


def tells_of_stops(handler: _Handler) -> _Handler:
    """Class decorator for a handler of Anthropic's routes: has it call ``on_answer(answer, stop)``
    for each answer, and ``on_event(event, stop)`` for each event of a stream, for what to send in
    its place. ``stop`` is what OpenAI's route calls ``matched_stop``; in a stream it is None until
    it is known."""
    convert, stream = handler._convert_response, handler._generate_anthropic_stream

    def answer(self: Any, chat: Any) -> Any:
        stop = chat.choices[0].matched_stop if chat.choices else None
        return self.on_answer(convert(self, chat), stop)

    async def events(self: Any, *arguments: Any) -> AsyncIterator[str]:
        chat = _ChatStream(self.openai_serving_chat)
        listening = copy.copy(self)
        listening.openai_serving_chat = chat
        async with aclosing(stream(listening, *arguments)) as made:
            async for event in made:
                yield self.on_event(event, chat.stop)

    handler._convert_response = answer
    handler._generate_anthropic_stream = events
    return handler


def passes_errors_on(handler: _Handler) -> _Handler:
    """Class decorator for a handler of Anthropic's routes: an exception for which SGLang would
    answer a bare 500 goes on to the caller, who knows a client's mistake from a server's."""
    respond = handler._error_response

    def error_response(self: Any, status_code: int, *arguments: Any, **named: Any) -> Any:
        error = sys.exc_info()[1]
        if status_code >= 500 and error is not None:
            raise error
        return respond(self, status_code, *arguments, **named)

    handler._error_response = error_response
    return handler


class _ChatStream:
    """A handler of OpenAI's chat route that remembers what stopped the one stream it makes."""

    def __init__(self, handler: Any) -> None:
        self.handler = handler
        self.stop: int | str | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.handler, name)

    async def _generate_chat_stream(self, *arguments: Any) -> AsyncIterator[str]:
        async with aclosing(self.handler._generate_chat_stream(*arguments)) as lines:
            async for line in lines:
                if '"matched_stop":"' in line:
                    (choice,) = json.loads(line.removeprefix("data: "))["choices"]
                    self.stop = choice["matched_stop"]
                yield line


def mended_http_server() -> Any:
    """SGLang's ``http_server`` module, whose OpenAI routes have been mended where they are wrong.
    Importing it, with all that it needs, takes some tenths of a second."""
    private_answers.mend()
    from sglang.srt.entrypoints import http_server

    return http_server


def _end_at_first_wrong_entry(app: FastAPI) -> None:
    """Has the validation of bodies end a list at its first wrong entry. pydantic goes on and notes
    an error for each entry and each type that it may have, which took gigabytes."""
    for route in app.routes:
        if isinstance(route, APIRoute):
            for field in route.dependant.body_params:
                adapter = field._type_adapter
                adapter.validator = SchemaValidator(
                    _failing_fast(adapter.core_schema), _use_prebuilt=False
                )


def _failing_fast(schema: Any) -> Any:
    """A copy of a schema of pydantic in which every list fails fast."""
    if isinstance(schema, list | tuple):
        return type(schema)(_failing_fast(one) for one in schema)
    if not isinstance(schema, dict):
        return schema
    whole = ("cls", "config", "default", "metadata", "serialization")
    copied = {k: v if k in whole else _failing_fast(v) for k, v in schema.items()}
    if schema.get("type") in ("list", "set", "frozenset", "tuple"):
        copied["fail_fast"] = True
    return copied


def take_work_elsewhere(module: Any, run: Callable[..., Awaitable[Any]]) -> None:
    """Has the OpenAI and Anthropic routes of a started copy from :func:`take_http_server_copy` keep
    the event loop free. Where :data:`large_body` is set, functions that check or tokenize the body
    are called by ``run(function, *arguments)``. Answers are encoded at one go, not value by value.
    """
    state = module.app.state
    chat, anthropic = state.openai_serving_chat, state.anthropic_serving
    prepared: ContextVar[dict[Any, Any]] = ContextVar("prepared")

    def prepare(methods: dict[str, Callable[..., Any]], request: Any, raw_request: Any) -> Any:
        """What each method gives for the request: a result, or an error to raise."""
        outcomes: dict[Any, Any] = {}
        for name, arguments in (
            ("_validate_request", (request,)),
            ("_convert_to_internal_request", (request, raw_request)),
        ):
            try:
                outcomes[name, id(request)] = methods[name](*arguments), None
            except Exception as error:
                outcomes[name, id(request)] = None, error
        return outcomes

    def once(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def known(request: Any, *others: Any) -> Any:
            outcome = prepared.get({}).get((name, id(request)))
            if outcome is None:
                return method(request, *others)
            result, error = outcome
            if error is not None:
                raise error
            return result

        return known

    names = ("_validate_request", "_convert_to_internal_request")
    methods = {name: getattr(chat, name) for name in names}
    for name in names:
        setattr(chat, name, once(name, methods[name]))

    def prepared_first(handle: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        async def handled(request: Any, *others: Any) -> Any:
            if large_body.get():
                prepared.set(await run(prepare, methods, request, others[-1]))
            return await handle(request, *others)

        return handled

    def elsewhere(handle: Callable[..., Any]) -> Callable[..., Awaitable[Any]]:
        async def handled(*arguments: Any) -> Any:
            if not large_body.get():
                return await handle(*arguments)
            return await run(lambda: _encoded(private.run_at_once(handle(*arguments))))

        return handled

    def encoded(handle: Callable[..., Any]) -> Callable[..., Awaitable[Any]]:
        async def handled(*arguments: Any) -> Any:
            return _encoded(await handle(*arguments))

        return handled

    for wrap, owner, name in (
        (prepared_first, chat, "handle_request"),
        (prepared_first, anthropic, "_handle_streaming"),
        (prepared_first, anthropic, "_handle_non_streaming"),
        (elsewhere, anthropic, "handle_count_tokens"),
        (elsewhere, state.openai_serving_tokenize, "_handle_non_streaming_request"),
        (elsewhere, state.openai_serving_detokenize, "_handle_non_streaming_request"),
        (encoded, chat, "handle_request"),
        (encoded, state.openai_serving_completion, "handle_request"),
    ):
        setattr(owner, name, wrap(getattr(owner, name)))
    if (responses := getattr(state, "openai_serving_responses", None)) is not None:
        responses._make_request = elsewhere(responses._make_request)


def _encoded(answer: Any) -> Any:
    """An answer of a route as a response, where it is one of pydantic's models."""
    if isinstance(answer, BaseModel):
        return Response(answer.model_dump_json(by_alias=True), media_type="application/json")
    return answer


def set_state(
    module: Any, manager: TokenizerManager, templates: Any, scheduler_info: dict[str, Any]
) -> None:
    """Gives a copy from :func:`take_http_server_copy` what its routes serve from."""
    module.set_global_state(
        module._GlobalState(
            tokenizer_manager=manager, template_manager=templates, scheduler_info=scheduler_info
        )
    )
    from sglang.srt.entrypoints import v1_loads

    # This one route looks for the state of the original module, which serves nobody.
    module.app.dependency_overrides[v1_loads._get_tokenizer_manager] = lambda: manager
