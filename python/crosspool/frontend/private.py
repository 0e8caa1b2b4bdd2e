"""What CrossPool uses of SGLang's inside: private names, and public ones that it replaces.

No other module names them, so this is where an upgrade of SGLang breaks first.
``test/frontend/test_sglang_surface.py`` checks each of them, beside the public names that the rest
of the package uses.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import compress
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar, Union

import msgspec
import zmq
from sglang.srt import runtime_context
from sglang.srt.managers import io_struct
from sglang.srt.observability.cpu_monitor import start_cpu_monitor_thread
from sglang.srt.observability.trace import extract_trace_headers, get_otlp_span_exporter
from sglang.srt.plugins.hook_registry import HookRegistry, HookType
from sglang.srt.utils import msgpack_utils

from crosspool.frontend.own_messages import (
    Delivered,
    Disown,
    ModelGone,
    Resume,
    SchedulerReplaced,
)
from crosspool.frontend.shared_tokenizers import get_tokenizer
from crosspool.observability.request_spans import RequestSpans, read_traceparent, shut_down

if TYPE_CHECKING:
    from sglang.srt.managers.detokenizer_manager import DetokenizerManager
    from sglang.srt.managers.tokenizer_manager import ReqState, TokenizerManager
    from sglang.srt.observability.metrics_collector import TokenizerMetricsCollector

MAX_MESSAGE_BYTES = 256 << 20
"""A peer that sends one of SGLang's sockets more is cut off."""

_LINGER_SECONDS = 5.0
_made: ContextVar[list[tuple[zmq.Socket[Any], bool]] | None] = ContextVar("made", default=None)
"""The sockets of the manager that is being made, and whether each is bound."""

_Manager = TypeVar("_Manager", bound=type)
_OUTPUTS = (
    io_struct.BatchStrOutput,
    io_struct.BatchEmbeddingOutput,
    io_struct.BatchTokenIDOutput,
)


# --- messages


def _arrays_only(code: int, data: memoryview) -> Any:
    """SGLang's hook for its msgpack extensions, without those that allocate tensors of any size or
    open another process's memory."""
    if code != msgpack_utils._MSGPACK_EXT_ARRAY:
        raise ValueError("tensors are not supported")
    return msgpack_utils.ext_hook(code, data)


_decoder = msgspec.msgpack.Decoder(
    Union[(*io_struct._all_types, Delivered, Disown, ModelGone, Resume, SchedulerReplaced)],
    dec_hook=msgpack_utils.dec_hook,
    ext_hook=_arrays_only,
)


def decode(frame: bytes) -> Any:
    """Decodes a message without the unpickling that the public ``msgpack_decode`` adds: a pickle
    of a client must not run code here.

    May raise any Exception for what is no message of SGLang."""
    return _decoder.decode(frame)


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


def shared_tokenizers(module: ModuleType) -> None:
    """Has the managers of ``module`` share the tokenizers of models whose folders are the same."""

    @functools.wraps(module.get_tokenizer)
    def shared(path: str, **arguments: Any) -> Any:
        return get_tokenizer(path, **arguments)

    module.get_tokenizer = shared  # type: ignore[attr-defined]


def bounded_messages(module: ModuleType) -> None:
    """Has the managers of ``module`` make sockets that cut off a peer whose message claims more
    than :data:`MAX_MESSAGE_BYTES`, before memory is taken for it."""
    make = module.get_zmq_socket

    def bounded(context: zmq.Context[Any], kind: Any, endpoint: str, bind: bool) -> Any:
        context.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)  # the default of its sockets
        socket = make(context, kind, endpoint, bind)
        if (made := _made.get()) is not None:
            made.append((socket, bind))
        return socket

    module.get_zmq_socket = bounded  # type: ignore[attr-defined]


@contextmanager
def making() -> Iterator[None]:
    """Within it, a manager is made. If that fails, its sockets are closed, with the files of those
    that are bound: the collector of garbage would wait for them for ever."""
    sockets: list[tuple[zmq.Socket[Any], bool]] = []
    token = _made.set(sockets)
    try:
        yield
    except BaseException:
        for socket, is_bound in sockets:
            if is_bound:
                _remove_file(socket)
            socket.close(linger=0)
        for context in {socket.context for socket, _ in sockets}:
            context.term()
        raise
    finally:
        _made.reset(token)


def keep_only(output: Any, kept: Sequence[bool]) -> None:
    """Takes requests out of an output, whose lists have an entry for each: all but ``kept``."""
    for name in output.__struct_fields__:
        column = getattr(output, name)
        if isinstance(column, list) and len(column) == len(kept):
            setattr(output, name, list(compress(column, kept)))


async def take_output(manager: TokenizerManager, message: Any) -> None:
    """What the tokenizer manager does with one message from the scheduler or the detokenizer: a
    step of its event loop, which ends the process when a message is wrong."""
    if isinstance(message, _OUTPUTS):
        # Pickles, which CrossPool sends to nobody and opens from nobody.
        message.time_stats = None
        if not isinstance(message, io_struct.BatchEmbeddingOutput):
            message.customized_info = None
        await manager._handle_batch_output(message)
    else:
        manager._result_dispatcher(message)
    manager.last_receive_tstamp = time.time()
    manager.soft_watchdog.feed()


def detokenize(manager: DetokenizerManager, message: Any) -> Any:
    """What the detokenizer makes of one message, or None: a step of its event loop, which serves
    one manager and never returns."""
    return manager._request_dispatcher(message)


def close_detokenizer(manager: DetokenizerManager) -> None:
    """Ends a detokenizer: what it has sent arrives, unless nobody reads it for
    :data:`_LINGER_SECONDS`. Nothing of it can be used afterwards."""
    sockets = manager.recv_from_scheduler, manager.send_to_tokenizer
    _remove_file(manager.recv_from_scheduler)
    for socket in sockets:
        socket.close(linger=int(1000 * _LINGER_SECONDS))
    # It waits for the sockets.
    threading.Thread(target=sockets[0].context.term, name="zmq end", daemon=True).start()
    _empty(manager)


def close_manager(manager: TokenizerManager) -> None:
    """Closes the sockets of a tokenizer manager whose tasks have ended. Nothing of it can be used
    afterwards."""
    for socket in (manager.recv_from_detokenizer, manager.send_to_scheduler):
        _remove_file(socket)
        socket.close(linger=0)
    manager.recv_from_detokenizer.context.term()
    _empty(manager)


def _remove_file(socket: zmq.Socket[Any]) -> None:
    """Removes the file of a bound socket, which outlives it."""
    address = socket.getsockopt_string(zmq.LAST_ENDPOINT)
    Path(address.removeprefix("ipc://")).unlink(missing_ok=True)


def _empty(manager: object) -> None:
    """Takes everything out of an object that is part of many circles of references, which the
    collector of garbage would not look at before long, or never where they are older than
    :func:`crosspool.config.process.freeze_heap`."""
    vars(manager).clear()


def tell_scheduler(manager: TokenizerManager, message: Any) -> None:
    """Sends the scheduler a message, in order with the manager's own."""
    manager._dispatch_to_scheduler(message)


def note_sent(
    manager: TokenizerManager, messages: Iterable[io_struct.TokenizedGenerateReqInput]
) -> None:
    """Keeps the messages with which requests are sent to the scheduler, as long as SGLang keeps
    the requests."""
    for message in messages:
        if (state := manager.rid_to_state.get(message.rid)) is not None:
            state.crosspool_sent = message


def sent_requests(
    manager: TokenizerManager,
) -> list[tuple[io_struct.TokenizedGenerateReqInput, ReqState]]:
    """The requests that were sent to the scheduler and have not ended, in the order in which they
    came: the messages, and what SGLang keeps of each request. The messages can be sent again."""
    states = [
        (state.crosspool_sent, state)
        for state in manager.rid_to_state.values()
        if not state.finished and hasattr(state, "crosspool_sent")
    ]
    for message, state in states:
        carry_trace(message, state)
    return states


# --- traces


def carry_trace(message: io_struct.TokenizedGenerateReqInput, state: ReqState) -> None:
    """Has the message bring the scheduler the name of the request's span, if it is traced, where
    SGLang would bring its own scheduler a pickle with all that it has of the request's times."""
    message.time_stats = None
    trace = state.time_stats.trace_ctx
    if trace.tracing_enable:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        carrier: dict[str, str] = {}
        TraceContextTextMapPropagator().inject(carrier, trace.root_span_context)
        message.time_stats = io_struct.PickleWrapper(carrier["traceparent"].encode())


def traceparent_of(message: io_struct.TokenizedGenerateReqInput) -> str | None:
    """What :func:`carry_trace` has put into the message. An attached SGLang server brings its
    pickle there, which nobody opens."""
    carried = message.time_stats
    return None if carried is None else read_traceparent(carried.data)


def request_spans(endpoint: str, service: str) -> RequestSpans:
    """Spans of requests on their way to the collector at ``endpoint``, as SGLang sends its own: by
    gRPC or by HTTP, whichever ``OTEL_EXPORTER_OTLP_TRACES_PROTOCOL`` names."""
    return RequestSpans(get_otlp_span_exporter(endpoint), service)


def last_spans() -> None:
    """Sends the spans that SGLang has made in this process and that wait, in some seconds at
    most."""
    from opentelemetry import trace
    from opentelemetry.sdk.trace import TracerProvider

    provider = trace.get_tracer_provider()
    if isinstance(provider, TracerProvider):  # it was begun by the first application
        shut_down(provider)


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
        if self.enable_trace and request is not None:
            # Before the parts of the request are made, which get it from there; and not what the
            # body of a request says.
            obj.external_trace_header = extract_trace_headers(request.headers)
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
    message to the scheduler, and before that await ``before_sending(message)`` where this is one
    prompt or sample by itself; SGLang sends all samples of a request at one go. An error that they
    raise ends the request."""
    send = manager._dispatch_to_scheduler  # type: ignore[attr-defined]
    send_one = manager._send_one_request  # type: ignore[attr-defined]

    def show(self: Any, message: Any) -> None:
        self.on_message(message)
        send(self, message)

    async def give_way(self: Any, message: Any) -> None:
        await self.before_sending(message)
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
