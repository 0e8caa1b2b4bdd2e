"""The front ends that the scheduler serves: requests on the way in, outputs on the way back."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import zmq

from crosspool.config.deployment import Deployment
from crosspool.frontend import private
from crosspool.frontend.commands import (
    Abort,
    Command,
    DisownAll,
    FlushCache,
    Generate,
    Leave,
    Pause,
    TellState,
    commands,
    tell_flushed,
    tell_state,
)
from crosspool.frontend.front_end import FrontEnd, FrontEndLost
from crosspool.frontend.messages import Item, refusal, seeds, to_token_id_output
from crosspool.frontend.server_args import port_args
from crosspool.observability.bounded_log import BoundedLog
from crosspool.observability.request_spans import OTLP_ENDPOINT, RequestSpans, service_name
from crosspool.scheduler.core import SchedulerCore
from crosspool.scheduler.request import Output
from crosspool.scheduler.request_timeline import RequestTimeline

log = logging.getLogger(__name__)
bounded = BoundedLog(log)

_MESSAGES_AT_ONCE = 256
"""Messages taken from one front end before the core schedules."""
MOST_ATTACHED = 64
"""Number of stock SGLang servers that can be attached at a time, for all models together."""


def spans_of(deployment: Deployment) -> RequestSpans | None:
    """Where spans of the deployment's requests go; None where requests are not traced. It begins a
    thread, so nothing may be forked afterwards."""
    arguments = deployment.sglang
    if not arguments.get("enable_trace"):
        return None
    endpoint = arguments.get("otlp_traces_endpoint", OTLP_ENDPOINT)
    return private.request_spans(endpoint, service_name(arguments))


class FrontEnds:
    """Passes front ends' requests to ``core``. ``starting`` returns what the deployment waits for
    before it takes requests, and None once it takes them. ``spans``: None where requests are not
    traced."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        poller: zmq.Poller,
        deployment: Deployment,
        core: SchedulerCore,
        *,
        starting: Callable[[], str | None],
        spans: RequestSpans | None,
    ) -> None:
        self._context = context
        self._poller = poller
        self._names: dict[int, str] = {}
        self._stream_intervals: dict[int, int] = {}
        self._core = core
        self._starting = starting
        self._spans = spans
        self._deployment = deployment
        self._detokenizer = 1
        """Which of the deployment's detokenizers is there."""
        self._seeds = seeds(deployment.random_seed)
        self._by_socket: dict[Any, FrontEnd] = {}
        self._owner: dict[tuple[int, str], FrontEnd] = {}
        """Front end of every request that is not finished, indexed [model, request id]."""
        for model in deployment.models:
            self._note(model)

    def connect_own(self, scheduler: int) -> None:
        """Serves the deployment's own front ends. If ``scheduler``, the number of this scheduler
        among the deployment's, is above 1, they first hand in the requests that the one before it
        had taken."""
        for model in self._deployment.models:
            front_end = self._connect_own(model)
            if scheduler > 1:
                front_end.ask_for_requests(scheduler)

    def add(self, deployment: Deployment, model: int) -> None:
        """A further model has come, and ``deployment`` has it."""
        self._deployment = deployment
        self._note(model)
        self._connect_own(model)

    def remove(self, deployment: Deployment, model: int) -> None:
        """A model has gone, and all its requests have ended."""
        for front_end in [f for f in self._by_socket.values() if f.model == model]:
            if front_end.attached:
                self._drop(front_end, "the model is not served any more")
                continue
            self._poller.unregister(front_end.socket)
            del self._by_socket[front_end.socket]
            try:
                front_end.part()
            except FrontEndLost as error:
                log.warning("model %s: %s", self._names[model], error)
                front_end.close()
        self._deployment = deployment
        del self._names[model], self._stream_intervals[model]

    def _note(self, model: int) -> None:
        config = self._deployment.models[model]
        self._names[model] = config.name
        arguments = {**self._deployment.sglang, **config.sglang}
        self._stream_intervals[model] = int(arguments.get("stream_interval", 1))

    def _connect_own(self, model: int) -> FrontEnd:
        ports = port_args(self._deployment, model, self._detokenizer)
        return self.connect(
            model,
            scheduler_input=ports.scheduler_input_ipc_name,
            tokenizer=ports.tokenizer_ipc_name,
            detokenizer=ports.detokenizer_ipc_name,
            attached=False,
        )

    def connect(self, model: int, *, attached: bool, **sockets: str) -> FrontEnd:
        """Serves one more front end of ``model``, which binds ``sockets`` (see FrontEnd).

        Raises ValueError for an address to which nothing can connect, and when
        :data:`MOST_ATTACHED` servers are attached; the text is meant for the user."""
        if attached and sum(f.attached for f in self._by_socket.values()) >= MOST_ATTACHED:
            raise ValueError(
                f"{MOST_ATTACHED} servers are attached, which is the most there can be"
            )
        front_end = FrontEnd(self._context, model, attached=attached, **sockets)
        self._by_socket[front_end.socket] = front_end
        self._poller.register(front_end.socket, zmq.POLLIN)
        return front_end

    def attached(self, model: int) -> int:
        """Number of stock SGLang servers that serve ``model``."""
        return sum(f.attached and f.model == model for f in self._by_socket.values())

    def take(self, socket: Any) -> None:
        """Carries out the messages of a readable ``socket``, if it is still a front end's."""
        for _ in range(_MESSAGES_AT_ONCE):
            # A message may be the front end's last: it is closed then.
            front_end = self._by_socket.get(socket)
            if front_end is None:
                return
            try:
                message = front_end.receive()
                if message is None:
                    return
                interval = self._stream_intervals[front_end.model]
                for command in commands(front_end, message, interval):
                    if not front_end.awaited or isinstance(command, DisownAll):
                        self._carry_out(front_end, command)
            except FrontEndLost as error:
                self._drop(front_end, str(error))
                return
            except Exception:
                # One front end's message must not end what the others are served by.
                text = "model %s: a message of a front end could not be carried out"
                bounded.error(text, self._names[front_end.model], exc_info=True)

    def _carry_out(self, front_end: FrontEnd, command: Command) -> None:
        match command:
            case Generate():
                self._generate(front_end, command)
            case Abort():
                named = list(front_end.requests) if command.rid is None else [command.rid]
                for rid in named:
                    if rid in front_end.requests:
                        self._core.abort(rid, front_end.model, message=command.message)
            case TellState():
                models = self._core.snapshot().models
                state = next(told for told in models if told.model == front_end.model)
                tell_state(front_end, state)
            case FlushCache():
                tell_flushed(front_end, has_cache=self._core.flush(front_end.model))
            case Pause():
                front_end.pauses = command.on
                self._pause_or_go_on(front_end.model)
            case DisownAll():
                front_end.awaited = False
                self._abort_all(front_end, "the HTTP process has died")
                self.send(self._core.drain_outputs())  # their ids may be those of the next requests
                front_end.forget_ended()
                front_end.pauses = False
                self._pause_or_go_on(front_end.model)
            case Leave():
                # An attached server ends; the deployment does not.
                if front_end.attached:
                    self._drop(front_end, "the attached server has ended")

    def _pause_or_go_on(self, model: int) -> None:
        if any(f.pauses for f in self._by_socket.values() if f.model == model):
            self._core.suspend(model)
        else:
            self._core.resume(model)

    def _generate(self, front_end: FrontEnd, command: Generate) -> None:
        model, rid = front_end.model, command.rid
        if rid is None:
            return bounded.error("model %s: dropped a request without an id", self._names[model])
        owner = self._owner.get((model, rid))
        if owner is not None:
            if owner is not front_end:
                front_end.refuse(rid, f"`rid`: another request has the id {rid!r}")
            return
        refused: tuple[str, int]
        try:
            opened = command.opened()
        except Exception as error:
            return front_end.refuse(rid, self._unexpected(error))
        front_end.open(opened)
        self._owner[model, rid] = front_end
        if starting := self._starting():
            refused = f"the server is starting: {starting}", 503
        else:
            try:
                return self._core.add(command.request(model, next(self._seeds)))
            except ValueError as error:
                refused = str(error), 400
            except Exception as error:
                refused = self._unexpected(error), 400
        self.send([refusal(rid, model, *refused, opened.prompt_len)])

    def _unexpected(self, error: Exception) -> str:
        """Logs an error that no check foresaw, and returns a text for the client who caused it."""
        bounded.error("a request cannot be translated", exc_info=True)
        return f"the request cannot be served as it is: {type(error).__name__}: {error}"

    def _drop(self, front_end: FrontEnd, why: str) -> None:
        """Forgets a front end and aborts its requests."""
        lost = len(front_end.requests)
        log.warning("model %s: %s; dropped %d requests", self._names[front_end.model], why, lost)
        self._poller.unregister(front_end.socket)
        del self._by_socket[front_end.socket]
        self._abort_all(front_end, why)
        self._pause_or_go_on(front_end.model)
        front_end.close()

    def _abort_all(self, front_end: FrontEnd, why: str) -> None:
        for rid in list(front_end.requests):
            self._core.abort(rid, front_end.model, message=why)

    def replace_detokenizer(self, incarnation: int) -> None:
        """Sends everything to another detokenizer, the one of this number, and first what the one
        before it may not have passed on."""
        if incarnation <= self._detokenizer:
            return
        self._detokenizer = incarnation
        repeated = 0
        for front_end in [f for f in self._by_socket.values() if not f.attached]:
            ports = port_args(self._deployment, front_end.model, incarnation)
            try:
                repeated += front_end.replace_detokenizer(ports.detokenizer_ipc_name)
            except FrontEndLost as error:
                self._drop(front_end, str(error))
        log.warning("the detokenizer is a new one: outputs of %d requests are sent again", repeated)

    def send(self, outputs: list[Output]) -> None:
        """Sends outputs to their front ends' detokenizers. A request that has several gets them in
        as many messages, in order."""
        rounds: dict[tuple[FrontEnd, int], list[Item]] = defaultdict(list)
        seen: dict[tuple[int, str], int] = defaultdict(int)
        for output in outputs:
            if output.timeline is not None:
                self._trace(output, output.timeline)
            key = (output.model, output.rid)
            front_end = self._owner.get(key)
            if output.finish is not None:
                self._owner.pop(key, None)
            if front_end is None or front_end.socket not in self._by_socket:
                continue
            item = front_end.take(output)
            if item is not None:
                rounds[front_end, seen[key]].append(item)
                seen[key] += 1
        for (front_end, _), items in rounds.items():
            if front_end.socket in self._by_socket:
                try:
                    front_end.to_detokenizer(to_token_id_output(items))
                except FrontEndLost as error:
                    self._drop(front_end, str(error))

    def _trace(self, output: Output, timeline: RequestTimeline) -> None:
        if self._spans is None or output.finish is None:
            return
        attributes: dict[str, str | int] = {
            "rid": output.rid,
            "module": "crosspool::scheduler",
            "gen_ai.request.model": self._names[output.model],
            "gen_ai.usage.prompt_tokens": output.prompt_tokens,
            "gen_ai.usage.completion_tokens": output.completion_tokens,
            "gen_ai.usage.cached_tokens": output.cached_tokens,
        }
        error = output.finish.message if output.finish.kind == "abort" else None
        self._spans.add(timeline.traceparent, timeline.phases, attributes, error)
