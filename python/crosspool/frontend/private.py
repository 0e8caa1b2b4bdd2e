"""What CrossPool uses of SGLang's inside: private names, and public ones that it replaces.

No other module names them, so this is where an upgrade of SGLang breaks first.
``test/frontend/test_sglang_surface.py`` checks each of them, beside the public names that the rest
of the package uses.
"""

from __future__ import annotations

import asyncio
import functools
import importlib.util
import sys
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from contextvars import ContextVar
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

from fastapi import FastAPI, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel
from pydantic_core import SchemaValidator
from sglang.srt import runtime_context
from sglang.srt.managers import io_struct
from sglang.srt.observability.cpu_monitor import start_cpu_monitor_thread
from sglang.srt.observability.func_timer import enable_func_timer
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

if TYPE_CHECKING:
    from sglang.srt.managers.detokenizer_manager import DetokenizerManager
    from sglang.srt.managers.tokenizer_manager import TokenizerManager
    from sglang.srt.observability.metrics_collector import TokenizerMetricsCollector

_Manager = TypeVar("_Manager", bound=type)
large_body: ContextVar[bool] = ContextVar("large_body", default=False)
"""Whether the body of the current request is so large that tokenizing it can take long."""
_enable_func_timer_once = functools.cache(enable_func_timer)


# --- messages


def decode(frame: bytes) -> Any:
    """Decodes a message without the unpickling that the public ``msgpack_decode`` adds: a pickle
    of a client must not run code here.

    Raises MsgspecError, ValueError or TypeError for what is no message of SGLang."""
    return io_struct._msgpack_decoder.decode(frame)


def refuse_pickles() -> None:
    """Switches this process from pickles to msgpack. SGLang reads its environment variable for
    that when it is imported, which is too late for a plugin."""
    io_struct._USE_PICKLE_IPC = False


def run_at_once(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """The result of a coroutine that waits for nothing, in whichever thread this is called."""
    try:
        coroutine.send(None)
    except StopIteration as done:
        return done.value
    coroutine.close()
    raise RuntimeError(f"{coroutine} waits for something")


# --- processes and managers


def replace_scheduler_launch(attach: Callable[[Any, Any], Any]) -> None:
    """Has SGLang's engine call ``attach(server_args, port_args)``, for a SchedulerInitResult and a
    list of processes or None, where it would start scheduler processes of its own."""

    def around(launch: Any, cls: Any, server_args: Any, port_args: Any, *_: Any, **__: Any) -> Any:
        del launch, cls
        return attach(server_args, port_args)

    HookRegistry.register(
        "sglang.srt.entrypoints.engine.Engine._launch_scheduler_processes",
        around,
        HookType.AROUND,
    )


def one_cpu_monitor(module: ModuleType) -> None:
    """Has all managers of ``module`` share the thread that counts this process's CPU time; each
    would start its own and count it once more."""
    module.start_cpu_monitor_thread = functools.cache(  # type: ignore[attr-defined]
        start_cpu_monitor_thread
    )


def detokenize(manager: DetokenizerManager, message: Any) -> Any:
    """What the detokenizer makes of one message, or None: a step of its event loop, which serves
    one manager and never returns."""
    return manager._request_dispatcher(message)


def abort(manager: TokenizerManager, request: io_struct.AbortReq) -> None:
    """Ends a request as if the scheduler had sent ``request``."""
    manager._handle_abort_req(request)


def handles_aborts(manager: _Manager) -> _Manager:
    """Class decorator: has SGLang await the class's ``on_abort(out, state, is_stream)`` for every
    output that ends with an abort. What it returns is sent to the client; None lets the output
    pass as any other."""
    manager._handle_abort_finish_reason = manager.on_abort  # type: ignore[attr-defined]
    return manager


def tells_of_ids(manager: _Manager) -> _Manager:
    """Class decorator: has SGLang call the class's ``on_ids(obj)`` before it takes the ids in
    ``obj.rid`` for its own: once for a request as a whole, and once for each sample of a prompt,
    with a copy of the prompt's part ``obj[i]`` that has an id of its own. An error that it raises
    ends the request, and no id is taken."""
    take = manager._init_req_state  # type: ignore[attr-defined]

    def tell(self: Any, obj: Any, request: Any = None) -> None:
        self.on_ids(obj)
        take(self, obj, request)

    manager._init_req_state = tell  # type: ignore[attr-defined]
    return manager


def tokenizes_elsewhere(manager: _Manager) -> _Manager:
    """Class decorator: has SGLang await the class's ``on_texts(texts, tokenize)`` for the token ids
    of texts. ``tokenize`` computes them and may be called in any thread."""
    tokenize = manager._tokenize_texts  # type: ignore[attr-defined]

    async def elsewhere(self: Any, texts: Any, is_cross_encoder: bool = False) -> Any:
        if self.async_dynamic_batch_tokenizer is not None:  # has a thread of its own
            return await tokenize(self, texts, is_cross_encoder)

        def now() -> Any:
            return run_at_once(tokenize(self, texts, is_cross_encoder))

        return await self.on_texts(texts, now)

    manager._tokenize_texts = elsewhere  # type: ignore[attr-defined]
    return manager


def shows_messages(manager: _Manager) -> _Manager:
    """Class decorator: has SGLang call the class's ``on_message(message)`` before it sends a
    message to the scheduler. An error that it raises ends the request."""
    send = manager._dispatch_to_scheduler  # type: ignore[attr-defined]
    send_one = manager._send_one_request  # type: ignore[attr-defined]

    def show(self: Any, message: Any) -> None:
        self.on_message(message)
        send(self, message)

    async def give_way(self: Any, message: Any) -> None:
        await asyncio.sleep(0)  # SGLang itself sends all samples of a request at one go
        await send_one(self, message)

    manager._dispatch_to_scheduler = show  # type: ignore[attr-defined]
    manager._send_one_request = give_way  # type: ignore[attr-defined]
    return manager


def release(manager: TokenizerManager, rids: Iterable[str]) -> None:
    """Gives up what is left of these ids: those that the scheduler knows are aborted, the others
    are forgotten."""
    manager._release_req_states_on_failure(rids)


def with_metric_classes(
    collector: type[TokenizerMetricsCollector], counter: Any, gauge: Any, histogram: Any
) -> type[TokenizerMetricsCollector]:
    """A collector that makes its metrics with these functions instead of prometheus_client's
    classes."""
    makers = {"_counter_cls": counter, "_gauge_cls": gauge, "_histogram_cls": histogram}
    return type(
        f"Shared{collector.__name__}",
        (collector,),
        {name: staticmethod(maker) for name, maker in makers.items()},
    )


# --- the process-wide configuration


def new_context() -> runtime_context.RuntimeContext:
    """An empty runtime context beside the one that SGLang made for the process."""
    return runtime_context.RuntimeContext(parallel=runtime_context._PARALLEL)


def replace_context(context: Any) -> None:
    """Puts ``context`` where SGLang's functions look for the process's runtime context."""
    runtime_context._CONTEXT = context


# --- the HTTP application


def http_server_copy(name: str) -> Any:
    """A copy of SGLang's ``http_server`` module, whose application and state are module globals,
    for one model. It neither warms up nor serves /metrics: CrossPool does so once for all models.
    """
    from sglang.srt.entrypoints import http_server

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
    return module


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
    """Has the OpenAI and Anthropic routes of a started copy from :func:`http_server_copy` keep the
    event loop free. Where :data:`large_body` is set, functions that check or tokenize the body are
    called by ``run(function, *arguments)``. Answers are encoded at one go, not value by value."""
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
            return await run(lambda: _encoded(run_at_once(handle(*arguments))))

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


def _encoded(answer: Any) -> Any:
    """An answer of a route as a response, where it is one of pydantic's models."""
    if isinstance(answer, BaseModel):
        return Response(answer.model_dump_json(by_alias=True), media_type="application/json")
    return answer


def set_state(
    module: Any, manager: TokenizerManager, templates: Any, scheduler_info: dict[str, Any]
) -> None:
    """Gives a copy from :func:`http_server_copy` what its routes serve from."""
    module.set_global_state(
        module._GlobalState(
            tokenizer_manager=manager, template_manager=templates, scheduler_info=scheduler_info
        )
    )
