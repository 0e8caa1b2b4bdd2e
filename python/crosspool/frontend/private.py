"""What CrossPool uses of SGLang's inside: private names, and public ones that it replaces.

No other module names them, so this is where an upgrade of SGLang breaks first.
``test/frontend/test_sglang_surface.py`` checks each of them, beside the public names that the rest
of the package uses.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import json
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import aclosing
from itertools import accumulate
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

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
_Handler = TypeVar("_Handler", bound=Any)
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


def tells_of_requests(manager: _Manager) -> _Manager:
    """Class decorator: has SGLang call the class's ``on_request(message, obj)`` before it sends a
    prompt to the scheduler by itself; ``obj`` is the request that had the message made. Prompts
    that are tokenized as a batch, of which none has several samples, are not among them."""
    send = manager._send_one_request  # type: ignore[attr-defined]

    async def tell(self: Any, message: Any) -> Any:
        self.on_request(message, self.rid_to_state[message.rid].obj)
        return await send(self, message)

    manager._send_one_request = tell  # type: ignore[attr-defined]
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
    mend_routes()
    from sglang.srt.entrypoints import http_server

    assert http_server.__file__ is not None
    spec = importlib.util.spec_from_file_location(name, http_server.__file__)
    assert spec is not None and spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    module._wait_and_warmup = lambda **_: None
    module.add_prometheus_middleware = lambda _: None
    module.enable_func_timer = _enable_func_timer_once
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


@functools.cache
def mend_routes() -> None:
    """Mends what SGLang's OpenAI routes do wrong, before the first copy of them is made."""
    from sglang.srt.entrypoints.openai import serving_chat, serving_completions
    from sglang.srt.entrypoints.openai.protocol import CompletionRequest
    from sglang.srt.function_call import function_call_parser

    _allow_no_tokens(CompletionRequest)
    _lift_definitions(serving_chat, function_call_parser)
    _tell_text_offsets(serving_completions)


def _lift_definitions(*modules: Any) -> None:
    """Has SGLang put ``$defs`` of a named tool's parameters at the root of the schema that it makes
    around them, where references look for them; it does so for required tools alone."""
    from sglang.srt.function_call import utils

    constraint = utils.get_json_schema_constraint

    def with_definitions(tools: Any, tool_choice: Any, *rest: Any, **named: Any) -> Any:
        schema = constraint(tools, tool_choice, *rest, **named)
        if schema is None or tool_choice == "required":
            return schema
        chosen = [tool for tool in tools if tool.function.name == tool_choice.function.name]
        definitions = utils._get_tool_schema_defs(chosen)
        return {**schema, "$defs": definitions} if definitions else schema

    for module in modules:
        module.get_json_schema_constraint = with_definitions


def _allow_no_tokens(request: Any) -> None:
    """Has ``/v1/completions`` take ``max_tokens: 0``, with which a client has its prompt echoed and
    nothing generated."""

    def at_least_0(value: int | None) -> int | None:
        if value is not None and value < 0:
            raise ValueError(f"max_tokens must be at least 0, got {value}")
        return value

    validators = request.__pydantic_decorators__.field_validators
    validators["validate_max_tokens_positive"].func = at_least_0
    request.model_rebuild(force=True)


def _tell_text_offsets(completions: Any) -> None:
    """Has ``/v1/completions`` say where in a choice's text each token begins, which SGLang leaves
    at -1, and report the most likely tokens of nothing but the text's tokens."""
    convert = completions.to_openai_style_logprobs

    def converted(**arguments: Any) -> Any:
        logprobs = convert(**arguments)
        lengths = [len(token) for token in logprobs.tokens]
        logprobs.text_offset = list(accumulate(lengths[:-1], initial=0)) if lengths else []
        del logprobs.top_logprobs[len(lengths) :]
        return logprobs

    completions.to_openai_style_logprobs = converted
    handler = completions.OpenAIServingCompletion
    stream = handler._generate_completion_stream

    async def streamed(self: Any, adapted: Any, request: Any, raw: Any) -> AsyncIterator[str]:
        ends: Counter[int] = Counter()
        async with aclosing(stream(self, adapted, request, raw)) as lines:
            async for line in lines:
                wanted = request.logprobs is not None and '"text_offset":[' in line
                yield _moved_offsets(line, ends) if wanted else line

    handler._generate_completion_stream = streamed


def _moved_offsets(line: str, ends: Counter[int]) -> str:
    """One piece of a stream, whose offsets count from its own start, with offsets in the whole
    text; ``ends`` has the length so far of each choice's tokens."""
    piece = json.loads(line.removeprefix("data: "))
    for choice in piece["choices"]:
        if logprobs := choice["logprobs"]:
            start = ends[choice["index"]]
            logprobs["text_offset"] = [start + offset for offset in logprobs["text_offset"]]
            ends[choice["index"]] += sum(map(len, logprobs["tokens"]))
    return f"data: {json.dumps(piece)}\n\n"


def set_state(
    module: Any, manager: TokenizerManager, templates: Any, scheduler_info: dict[str, Any]
) -> None:
    """Gives a copy from :func:`http_server_copy` what its routes serve from."""
    module.set_global_state(
        module._GlobalState(
            tokenizer_manager=manager, template_manager=templates, scheduler_info=scheduler_info
        )
    )
    from sglang.srt.entrypoints import v1_loads

    # This one route looks for the state of the original module, which serves nobody.
    module.app.dependency_overrides[v1_loads._get_tokenizer_manager] = lambda: manager
