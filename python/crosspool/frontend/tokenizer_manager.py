"""SGLang's tokenizer manager, as one of several in a process that belongs to CrossPool."""

from __future__ import annotations

import asyncio
import contextvars
import copy
import functools
import logging
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from contextvars import ContextVar
from http import HTTPStatus
from typing import Any

import fastapi
from sglang.srt.managers import io_struct, tokenizer_manager
from sglang.srt.managers.tokenizer_manager import TokenizerManager
from starlette.background import BackgroundTasks

from crosspool.frontend import field_types, loads, private, refusal
from crosspool.frontend.messages import seed_of_sample
from crosspool.frontend.own_messages import Delivered, Disown, SchedulerReplaced
from crosspool.frontend.received import Received
from crosspool.frontend.request_ids import RequestIds
from crosspool.frontend.told import Told
from crosspool.frontend.turns import Turns
from crosspool.observability.bounded_log import BoundedLog

native_api: ContextVar[bool] = ContextVar("native_api", default=False)
"""Whether the current request came by SGLang's ``/generate`` and not by an OpenAI route: the two
report errors differently."""

_logprobs_left: ContextVar[list[int]] = ContextVar("logprobs_left")
"""How many log-probabilities the current request may still ask for, as the list's one entry."""

_client: ContextVar[fastapi.Request | None] = ContextVar("client", default=None)
"""The HTTP request for which the current request is generated; None where no client waits."""

_several: ContextVar[bool] = ContextVar("several", default=False)
"""Whether the current request asks for more than one output. One alone begins in the turn that the
server has given to its request."""

log = BoundedLog(logging.getLogger(__name__))
private.one_cpu_monitor(tokenizer_manager)
private.bounded_messages(tokenizer_manager)
private.shared_tokenizers(tokenizer_manager)

_SHORT_TEXT = 4096
"""Characters that are tokenized within the event loop: it takes about a millisecond."""
_FREE_TOP_LOGPROBS = 20
"""Top log-probabilities of output tokens that are not counted: as many as OpenAI allows."""
_CONFIRM_SECONDS = 0.5
_ABORT_AFTER_SECONDS = 2
"""Time that a request's generation has to end by itself once its response has."""


class Refused(ValueError):
    """An error on SGLang's own routes, which take the HTTP status from the ``status_code`` of a
    ValueError."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status_code = status


def _refused(message: str, status: int, retry_after: int | None = None) -> Exception:
    """The error that refuses the current request."""
    if (refused := refusal.current.get()) is not None:
        refused.status = status
        refused.message = message
        refused.retry_after = retry_after
    if native_api.get():
        return Refused(message, status)
    if status == HTTPStatus.BAD_REQUEST:
        return ValueError(message)
    return fastapi.HTTPException(status_code=status, detail=message)


@private.tells_of_ids
@private.tells_of_requests
@private.handles_aborts
@private.shows_messages
@private.tokenizes_elsewhere
class PooledTokenizerManager(TokenizerManager):
    """Leaves signals and the end of the process to CrossPool, turns every abort that has a status
    into an HTTP error of that status, and lets a client abort its own request and no other."""

    event_loop: asyncio.AbstractEventLoop | None

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._ids = RequestIds()
        self._threads = ThreadPoolExecutor(1, "tokenizer")
        self._token_texts: dict[int, str] = {}
        self.turns = Turns()
        """The turns that prompts and samples take where a request has several."""
        self.max_outputs = 0
        """Most outputs that run or wait at once: one for each sample of each prompt."""
        self._outputs = 0
        """Outputs of all requests that are being worked on."""
        self.max_logprobs = 0
        """Most log-probabilities that one request may ask for."""
        self._failure: tuple[str, int] | None = None
        self._confirms = False
        """Whether the scheduler is about to hear of ends."""
        self._confirmation: asyncio.TimerHandle | None = None
        self._told = Told(self)
        self.mark(1)

    def mark(self, incarnation: int, scheduler: int = 1) -> None:
        """Marks requests as those of the process with this number to the scheduler with that one.
        Outputs of requests that have another mark are dropped: they were those of a process that
        has died, or that process is not to go on with them."""
        self._incarnation = incarnation
        # SGLang's own mark, for which of several processes a request came from.
        self.tokenizer_ipc_name = f"http#{incarnation}.{scheduler}"
        self._received = Received(self, self.tokenizer_ipc_name)

    def disown_former(self) -> None:
        """Has the scheduler abort the requests of the process that had this one's place, and go on
        with the model if that had paused it."""
        private.tell_scheduler(self, Disown())

    @functools.cached_property
    def longest_token(self) -> int:
        """Length in bytes of the longest token in the vocabulary."""
        tokens = self.tokenizer.get_vocab() if self.tokenizer is not None else ()
        return max((len(token.encode()) for token in tokens), default=1)

    def auto_create_handle_loop(self) -> None:
        if self.event_loop is None:
            self.event_loop = asyncio.get_running_loop()
            loop = tokenizer_manager.print_exception_wrapper(self.handle_loop)
            self.asyncio_tasks.add(self.event_loop.create_task(loop))

    async def handle_loop(self) -> None:
        """Takes what scheduler and detokenizer send. What is no message of theirs is dropped; in
        SGLang it ends the process."""
        while True:
            frames = await self.recv_from_detokenizer.recv_multipart()
            try:
                (frame,) = frames
                await self._take(private.decode(frame))
            except Exception as error:
                log.error("dropped what is no message of the scheduler's: %s", error)
            await asyncio.sleep(0)  # there may be many of them

    async def _take(self, message: Any) -> None:
        if isinstance(message, SchedulerReplaced):
            self.mark(self._incarnation, message.incarnation)
            return self._told.tell_again(self.tokenizer_ipc_name)
        if isinstance(message, io_struct.AbortReq):
            self._received.note_end(message.rid)
        self._told.note_answer(message)
        if not isinstance(message, io_struct.BatchStrOutput) or self._received.cut(message):
            await private.take_output(self, message)
        if self._received.has_ended and not self._confirms:
            self._confirms = True
            loop = asyncio.get_running_loop()
            self._confirmation = loop.call_later(_CONFIRM_SECONDS, self._confirm)

    def _confirm(self) -> None:
        """Tells the scheduler which requests' ends have come: few messages for many requests."""
        self._confirms = False
        if rids := self._received.take_ended():
            private.tell_scheduler(self, Delivered(rids=rids))

    async def on_abort(
        self, out: dict[str, Any], state: Any, is_stream: bool
    ) -> dict[str, Any] | None:
        """What SGLang does with an output that ends with an abort; see
        :func:`private.handles_aborts`."""
        reason = out["meta_info"]["finish_reason"]
        status = reason.get("status_code")
        if reason.get("type") != "abort" or not status:
            return None
        # OpenAI streams look for this type; in the message it was a plain number.
        reason["status_code"] = HTTPStatus(status)
        if is_stream and out["meta_info"]["completion_tokens"] > 0:
            return out
        raise _refused(reason["message"], status, reason.get("retry_after"))

    async def generate_request(
        self, obj: Any, request: fastapi.Request | None = None
    ) -> AsyncIterator[Any]:
        _logprobs_left.set([self.max_logprobs])
        _client.set(None if getattr(obj, "background", False) else request)
        if text := field_types.problem(obj):
            raise _refused(text, HTTPStatus.BAD_REQUEST)
        obj.given_rid = obj.rid if isinstance(obj.rid, str) else None
        obj.noted_rids = []
        obj.outputs = 0
        try:
            async with aclosing(super().generate_request(obj, request)) as outputs:
                async for output in outputs:
                    yield output
        finally:
            self._outputs -= obj.outputs
            # SGLang itself keeps ids that it made for samples and then did not use.
            while obj.noted_rids:
                private.release(self, self._ids.forget(obj.noted_rids.pop()))

    def on_ids(self, obj: Any) -> None:
        """Notes ids that SGLang is about to take, or refuses them; see
        :func:`private.tells_of_ids`."""
        if self._failure is not None:
            raise _refused(*self._failure)
        prompt: str | None = getattr(obj, "sampled_rid", None)
        if prompt is not None:
            if self._ids.is_aborted(prompt):
                raise _refused("the client aborted the request", HTTPStatus.BAD_REQUEST)
            # SGLang first computes the prompt, under an id of its own, and then takes the samples.
            obj.sample = self._ids.number_below(prompt) - 1
            self._received.reopen(obj.rid)
            return self._ids.add([obj.rid], of=prompt)
        processors = getattr(obj, "custom_logit_processor", None)
        if any(processors) if isinstance(processors, list) else processors:
            # SGLang would say to give a flag, and may unpickle it to see what it can do.
            text = "`custom_logit_processor` is code of a client, which this server does not run"
            raise _refused(text, HTTPStatus.BAD_REQUEST)
        rids: list[str] = [obj.rid] if obj.is_single else obj.rid
        outputs = obj.batch_size * getattr(obj, "parallel_sample_num", 1)
        if outputs > 1 and self._outputs + outputs > self.max_outputs:
            # The scheduler would refuse some of them, which ends the request. It refuses single
            # outputs itself, since it can tell when to try again.
            text = (
                f"the model's queue has no room for the {outputs} outputs of the request beside "
                f"{self._outputs} of others; retry later"
            )
            raise _refused(text, HTTPStatus.TOO_MANY_REQUESTS)
        given = obj.given_rid if obj.given_rid not in rids else None
        for rid in rids if given is None else [given, *rids]:
            if rid in self._ids or rid in self.rid_to_state:
                text = f"`rid`: Duplicate request ID: {rid!r} is that of a request in progress"
                raise _refused(text, HTTPStatus.BAD_REQUEST)
        if given is not None:
            self._ids.add([given])
        self._ids.add(rids, of=given)
        for rid in rids:
            self._received.reopen(rid)
        obj.noted_rids = list(rids) if given is None else [given]
        _several.set(outputs > 1)
        obj.outputs = outputs
        self._outputs += outputs
        if getattr(obj, "parallel_sample_num", 1) > 1:
            for index, rid in enumerate(rids):
                obj[index].sampled_rid = rid  # its copies, one for each sample, have it too

    def on_request(self, message: Any, obj: Any) -> None:
        """Gives each sample of a prompt a seed of its own; see :func:`private.tells_of_requests`.
        The first keeps the client's, and is what one sample alone would be."""
        sample, params = getattr(obj, "sample", 0), message.sampling_params
        if sample > 0 and params.sampling_seed is not None:
            message.sampling_params = copy.copy(params)
            message.sampling_params.sampling_seed = seed_of_sample(params.sampling_seed, sample)

    async def on_texts(self, texts: str | list[str], tokenize: Callable[[], Any]) -> Any:
        """Tokenizes long texts in a thread: it can take seconds. See
        :func:`private.tokenizes_elsewhere`."""
        if sum(map(len, [texts] if isinstance(texts, str) else texts)) <= _SHORT_TEXT:
            if _several.get():
                await self.turns.take()
            return tokenize()
        return await self.run_in_thread(tokenize)

    async def before_sending(self, message: Any) -> None:
        """Waits until one of several prompts or samples may be begun, and ends a request whose
        client has gone; see :func:`private.shows_messages`."""
        if not _several.get():
            return
        await self.turns.take()
        client = _client.get()
        if client is not None and await client.is_disconnected():
            raise _refused("the client has disconnected", HTTPStatus.BAD_REQUEST)

    async def run_in_thread(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Runs what can take seconds beside the event loop, one at a time for each model."""
        run = contextvars.copy_context().run
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, run, function, *arguments)

    def on_message(self, message: Any) -> None:
        """Refuses what the scheduler could not decode, and more log-probabilities than an answer
        may have; notes what another scheduler would have to be told. See
        :func:`private.shows_messages`."""
        if isinstance(message, io_struct.TokenizedGenerateReqInput):
            messages = [message]
        elif isinstance(message, io_struct.BatchTokenizedGenerateReqInput):
            messages = message.batch
        else:
            return self._told.note(message)
        for one in messages:
            private.carry_trace(one, self.rid_to_state[one.rid])
            if text := field_types.message_problem(one):
                raise _refused(text, HTTPStatus.BAD_REQUEST)
            left = _logprobs_left.get()
            left[0] -= _logprobs(one, self.context_len)
            if left[0] < 0:
                text = (
                    "`top_logprobs_num`, `token_ids_logprob`, `logprobs`: all positions of the "
                    f"request together have more than {self.max_logprobs} log-probabilities "
                    "(max_logprobs)"
                )
                raise _refused(text, HTTPStatus.BAD_REQUEST)
        self._told.note_requests(messages)

    def detokenize_logprob_tokens(
        self, token_logprobs_val: list[float], token_logprobs_idx: list[int], decode_to_text: bool
    ) -> list[tuple[float, int, str | None]]:
        """What SGLang's method returns. Texts of tokens are kept: it decodes each token anew, at
        each position."""
        texts: Callable[[int], str | None] = self._token_texts.get
        if decode_to_text:
            assert self.tokenizer is not None
            new = list({token for token in token_logprobs_idx if token not in self._token_texts})
            if new:
                decoded = self.tokenizer.batch_decode([[token] for token in new])
                self._token_texts.update(zip(new, decoded, strict=True))
        else:
            texts = _no_text
        return [
            (value, token, texts(token))
            for value, token in zip(token_logprobs_val, token_logprobs_idx, strict=True)
        ]

    def abort_request(self, rid: str = "", abort_all: bool = False) -> None:
        """Ends the request that has this id, whether the client or SGLang gave it, or all."""
        if abort_all:
            self._told.note_abort_of_all()
            super().abort_request(abort_all=True)
            return
        for one in self._ids.abort(rid):
            super().abort_request(one)

    async def pause_generation(self, obj: io_struct.PauseGenerationReqInput) -> None:
        if obj.mode == "retract":
            text = "`mode`: 'retract' is not supported; 'in_place' and 'abort' are"
            raise fastapi.HTTPException(status_code=HTTPStatus.BAD_REQUEST, detail=text)
        if obj.mode == "in_place":
            self._told.pause = obj
        await super().pause_generation(obj)

    async def continue_generation(self, obj: io_struct.ContinueGenerationReqInput) -> None:
        self._told.pause = None
        await super().continue_generation(obj)

    def create_abort_task(self, obj: Any) -> BackgroundTasks:
        """What follows the response to ``obj``: its generation is aborted if it has not ended. Its
        ids may be another request's by then."""

        async def abort() -> None:
            await asyncio.sleep(_ABORT_AFTER_SECONDS)
            # A request that was refused at once has noted none.
            for rid in getattr(obj, "noted_rids", ()):
                self.abort_request(rid)

        tasks = BackgroundTasks()
        tasks.add_task(abort)
        return tasks

    async def get_loads(
        self, include: list[str] | None = None, dp_rank: int | None = None
    ) -> list[Any]:
        """The model's load, from the scheduler. SGLang's own would read what a scheduler of its
        own has written into shared memory. Raises ValueError for an unknown section."""
        loads.check_sections(include)
        if dp_rank not in (None, 0):
            return []
        (state,) = await self.get_internal_state()
        return [loads.load_of(state, self.server_args.max_running_requests)]

    async def close(self) -> None:
        """Gives up everything. No request may be in progress, and none may come."""
        tasks = list(self.asyncio_tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._confirmation is not None:
            self._confirmation.cancel()
        self._threads.shutdown(wait=False)
        private.close_manager(self)

    def fail_all(self, message: str, status: int) -> None:
        """Ends every request with an error, and every later one until :meth:`resume`. For when
        they cannot be finished now."""
        self._failure = message, status
        reason = {"type": "abort", "message": message, "status_code": status}
        for rid in list(self.rid_to_state):
            super().abort_request(rid)  # a scheduler that comes back is not to go on with it
            private.abort(self, io_struct.AbortReq(rid=rid, finished_reason=dict(reason)))

    def resume(self) -> None:
        """Takes requests again after :meth:`fail_all`."""
        self._failure = None


def _no_text(token: int) -> None:
    del token


def _logprobs(message: io_struct.TokenizedGenerateReqInput, context: int) -> int:
    """How many log-probabilities ``message`` asks for. Where ``context``, the model's longest
    sequence in tokens, is the only bound of its output, no more can be known of that."""
    if not message.return_logprob:
        return 0
    prompt = len(message.input_ids or ())
    start: int = message.logprob_start_len
    limit: int | None = message.sampling_params.max_new_tokens
    at_position: int = 1 + max(message.top_logprobs_num, 0) + len(message.token_ids_logprob or ())
    room = max(context - prompt, 0)
    outputs = room if limit is None else min(limit, room)
    if at_position <= 1 + _FREE_TOP_LOGPROBS:
        outputs = 0
    return at_position * (outputs + (max(prompt - start, 0) if start >= 0 else 0))
