"""The scheduler's core between SGLang's sockets, the device processes and the admin socket.

One thread and one poller: whatever is readable is handled, then the core schedules once, then what
it has to say goes out.
"""

from __future__ import annotations

import gc
import logging
import os
import signal
import time
from collections import defaultdict
from pathlib import Path
from types import FrameType
from typing import Any

import msgspec
import zmq
from sglang.srt.managers import io_struct as io

from crosspool.config.deployment import Deployment
from crosspool.config.process import freeze_heap
from crosspool.frontend.control_requests import ANSWERS, FLUSHED, FORWARDED, NO_CACHE, UNANSWERED
from crosspool.frontend.devices import DeviceGone, Devices
from crosspool.frontend.front_end import FrontEnd, FrontEndLost
from crosspool.frontend.grammar import XGrammarBackend
from crosspool.frontend.inspection import report
from crosspool.frontend.messages import (
    Item,
    OpenRequest,
    finish_reason,
    refusal,
    seeds,
    to_request,
    to_token_id_output,
)
from crosspool.frontend.server_args import port_args
from crosspool.frontend.text import HFTextDecoder, load_tokenizer
from crosspool.models.registry import read_model
from crosspool.scheduler.core import SchedulerCore
from crosspool.scheduler.request import Finish, Output
from crosspool.transport import admin
from crosspool.transport.messages import Inspected, Shutdown

log = logging.getLogger(__name__)

_LONGEST_SLEEP = 1.0
_MESSAGES_AT_ONCE = 256
"""Messages taken from one socket before the core schedules."""


class SchedulerLoop:
    """Owns the core and every socket of the scheduler process.

    Raises ConfigError when a model or its tokenizer cannot be read."""

    def __init__(self, deployment: Deployment) -> None:
        self._deployment = deployment
        self._stopping = False
        self._failure: str | None = None
        self._seeds = seeds(deployment.random_seed)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._poller = zmq.Poller()
        self._compiled = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        """Readable when a grammar has been compiled."""
        self._poller.register(self._compiled, zmq.POLLIN)
        self._admin = admin.bind(self._context, deployment.admin_address)
        self._poller.register(self._admin, zmq.POLLIN)
        self._devices = Devices(self._context, deployment)
        self._poller.register(self._devices.socket, zmq.POLLIN)

        self._specs = [
            read_model(Path(model.path), model.context_length, model.dtype)
            for model in deployment.models
        ]
        tokenizers = [load_tokenizer(deployment, i) for i in range(len(deployment.models))]
        compact = deployment.sglang.get("constrained_json_disable_any_whitespace", False)
        self._core = SchedulerCore(
            deployment,
            self._specs,
            [HFTextDecoder(tokenizer) for tokenizer in tokenizers],
            [
                XGrammarBackend(
                    tokenizer,
                    spec,
                    any_whitespace=not compact,
                    on_compiled=lambda: os.eventfd_write(self._compiled, 1),
                )
                for tokenizer, spec in zip(tokenizers, self._specs, strict=True)
            ],
            time.monotonic,
        )
        self._front_ends: dict[zmq.Socket[bytes], FrontEnd] = {}
        self._owner: dict[tuple[int, str], FrontEnd] = {}
        """Front end of every request that is not finished, by model and rid."""
        for index in range(len(deployment.models)):
            ports = port_args(deployment, index)
            self._connect(
                index,
                scheduler_input=ports.scheduler_input_ipc_name,
                tokenizer=ports.tokenizer_ipc_name,
                detokenizer=ports.detokenizer_ipc_name,
                attached=False,
            )

    def _connect(self, model: int, **sockets: Any) -> None:
        front_end = FrontEnd(self._context, model, **sockets)
        self._front_ends[front_end.socket] = front_end
        self._poller.register(front_end.socket, zmq.POLLIN)

    def run(self) -> None:
        """Returns after SIGTERM or SIGINT."""
        signal.signal(signal.SIGTERM, self._stop)
        signal.signal(signal.SIGINT, self._stop)
        freeze_heap()
        log.info("waiting for devices: %s", self._devices.progress)
        while not self._stopping:
            self._turn(self._poller.poll(self._sleep_ms()))
        self._core.fail_all("the server is shutting down", 503)
        self._send_outputs()
        self._devices.broadcast(Shutdown(drain=self._failure is None))
        self._context.destroy(linger=500)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self._stopping = True

    def _sleep_ms(self) -> int:
        deadline = self._core.next_deadline()
        if deadline is None:
            return int(_LONGEST_SLEEP * 1000)
        return int(1000 * min(_LONGEST_SLEEP, max(0.0, deadline - time.monotonic()) + 0.001))

    def _turn(self, readable: list[tuple[Any, int]]) -> None:
        for source, _ in readable:
            if source is self._devices.socket:
                self._take_results()
            elif source is self._admin:
                self._take_questions()
            elif source == self._compiled:
                os.eventfd_read(self._compiled)
            elif source in self._front_ends:
                self._take_requests(self._front_ends[source])
        overdue = self._core.overdue(time.monotonic())
        if overdue is not None and self._failure is None:
            self._fail(overdue)
        self._devices.expire_questions()
        self._core.schedule()
        try:
            for rank, message in self._core.drain_messages():
                self._devices.send(rank, message)
        except DeviceGone as error:
            self._fail(str(error))
        self._send_outputs()

    def _fail(self, cause: str) -> None:
        """Answers every request, and every later one, with 503."""
        if self._failure is None:
            self._failure = cause
            log.error("%s", cause)
            self._core.fail_all(cause, 503)

    # --- devices

    def _take_results(self) -> None:
        try:
            for _ in range(_MESSAGES_AT_ONCE):
                received = self._devices.receive()
                if received is None:
                    return
                self._core.on_result(*received)
        except DeviceGone as error:
            self._fail(str(error))
        except ValueError as error:
            self._fail(f"a device answered what it was not asked: {error}")

    # --- front ends

    def _take_requests(self, front_end: FrontEnd) -> None:
        for _ in range(_MESSAGES_AT_ONCE):
            # a message may be the front end's last: it is closed then
            if front_end.socket not in self._front_ends:
                return
            message = front_end.receive()
            if message is None:
                return
            try:
                self._handle(front_end, message)
            except FrontEndLost as error:
                self._drop(front_end, str(error))
                return

    def _handle(self, front_end: FrontEnd, message: Any) -> None:
        match message:
            case io.TokenizedGenerateReqInput():
                self._generate(front_end, message)
            case io.BatchTokenizedGenerateReqInput():
                for one in message:
                    self._generate(front_end, one)
            case io.AbortReq():
                self._abort(front_end, message)
            case io.GetInternalStateReq():
                state = self._core.snapshot()["models"][front_end.model]
                front_end.to_tokenizer(io.GetInternalStateReqOutput(internal_state=state))
            case io.FlushCacheReqInput():
                text = FLUSHED if self._core.flush(front_end.model) else NO_CACHE
                front_end.to_tokenizer(io.FlushCacheReqOutput(success=True, message=text))
            case io.ShutdownReq():
                # An attached server ends; the deployment does not.
                if front_end.attached:
                    self._drop(front_end, "the attached server has ended")
            case _:
                self._answer(front_end, message)

    def _answer(self, front_end: FrontEnd, message: Any) -> None:
        kind = type(message)
        if kind in ANSWERS:
            front_end.to_tokenizer(ANSWERS[kind](message))
        elif kind in FORWARDED:
            if kind is io.FreezeGCReq:
                gc.freeze()
            elif message.log_level is not None:
                logging.getLogger().setLevel(message.log_level.upper())
            front_end.to_detokenizer(message)
        elif kind not in UNANSWERED:
            log.error("no answer to %s is known", kind.__name__)
            finish = Finish(kind="abort", message=f"{kind.__name__} is not supported", status=400)
            for rid in getattr(message, "rids", None) or [message.rid]:
                reason = finish_reason(finish, 0)
                front_end.to_tokenizer(io.AbortReq(rid=rid, finished_reason=reason))

    def _generate(self, front_end: FrontEnd, message: io.TokenizedGenerateReqInput) -> None:
        assert message.rid is not None
        key = (front_end.model, message.rid)
        if key in self._owner:
            text = f"request id {message.rid!r} is in use"
            reason = finish_reason(Finish(kind="abort", message=text, status=400), 0)
            if self._owner[key] is not front_end:
                front_end.to_tokenizer(io.AbortReq(rid=message.rid, finished_reason=reason))
            return
        request = OpenRequest.of(message, self._stream_interval(front_end.model))
        front_end.requests[message.rid] = request
        self._owner[key] = front_end
        refuse: tuple[str, int] | None = None
        if self._failure is None and not self._devices.all_ready:
            refuse = (f"the server is starting: {self._devices.progress}", 503)
        else:
            try:
                self._core.add(to_request(message, front_end.model, next(self._seeds)))
            except ValueError as error:
                refuse = (str(error), 400)
        if refuse is not None:
            text, status = refuse
            self._dispatch(
                [refusal(message.rid, front_end.model, text, status, request.prompt_len)]
            )

    def _stream_interval(self, model: int) -> int:
        own = self._deployment.models[model].sglang
        return int(own.get("stream_interval", self._deployment.sglang.get("stream_interval", 1)))

    def _abort(self, front_end: FrontEnd, message: io.AbortReq) -> None:
        """Aborts requests of this front end only."""
        text = message.abort_message or "the client aborted the request"
        prefix = message.rid or ""
        if not (message.abort_all or prefix):
            return
        for rid in list(front_end.requests):
            if message.abort_all or rid.startswith(prefix):
                self._core.abort(rid, front_end.model, message=text)

    def _drop(self, front_end: FrontEnd, why: str) -> None:
        """Forgets a front end and what it had asked for."""
        log.warning("%s: %d requests are dropped", why, len(front_end.requests))
        self._poller.unregister(front_end.socket)
        del self._front_ends[front_end.socket]
        for rid in list(front_end.requests):
            self._core.abort(rid, front_end.model, message=why)
        front_end.close()

    # --- what comes back

    def _send_outputs(self) -> None:
        self._dispatch(self._core.drain_outputs())

    def _dispatch(self, outputs: list[Output]) -> None:
        """Sends outputs to their front ends' detokenizers; a request that has several goes out
        in as many messages, in order."""
        rounds: dict[tuple[FrontEnd, int], list[Item]] = defaultdict(list)
        seen: dict[tuple[int, str], int] = defaultdict(int)
        for output in outputs:
            key = (output.model, output.rid)
            front_end = self._owner.get(key)
            if output.finish is not None:
                self._owner.pop(key, None)
            if front_end is None or front_end.socket not in self._front_ends:
                continue
            item = front_end.take(output)
            if item is not None:
                rounds[front_end, seen[key]].append(item)
                seen[key] += 1
        for (front_end, _), items in rounds.items():
            if front_end.socket in self._front_ends:
                try:
                    front_end.to_detokenizer(to_token_id_output(items))
                except FrontEndLost as error:
                    self._drop(front_end, str(error))

    # --- admin

    def _take_questions(self) -> None:
        for _ in range(_MESSAGES_AT_ONCE):
            try:
                sender, frame = self._admin.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            except ValueError:
                log.error("dropped an admin message of a wrong shape")
                continue
            try:
                message = admin.decode_to_scheduler(frame)
            except msgspec.DecodeError as error:
                log.error("dropped an admin message: %s", error)
                continue
            match message:
                case admin.Ask():
                    self._ask(sender, message)
                case admin.Attach():
                    self._reply(sender, self._attach(message))
                case admin.RankGone():
                    self._fail(f"device {message.device} is gone: {message.cause}")
                    self._reply(sender, admin.Answer(id=message.id))

    def _reply(self, sender: bytes, message: admin.FromScheduler) -> None:
        self._admin.send_multipart([sender, admin.encode(message)])

    def _ask(self, sender: bytes, ask: admin.Ask) -> None:
        if ask.what == "status":
            self._reply(sender, admin.Answer(id=ask.id, data=self.status()))
            return
        what = ask.what

        def done(answers: list[Inspected] | None, error: str) -> None:
            data = None if answers is None else report(what, answers, self._names)
            self._reply(sender, admin.Answer(id=ask.id, data=data, error=error or None))

        self._devices.inspect(what, done)

    @property
    def _names(self) -> list[str]:
        return [model.name for model in self._deployment.models]

    def _attach(self, message: admin.Attach) -> admin.FromScheduler:
        if message.model not in self._names:
            names = ", ".join(self._names)
            error = f"no model {message.model!r} is served here; there are {names}"
            return admin.Answer(id=message.id, error=error)
        sockets = (message.scheduler_input, message.tokenizer, message.detokenizer)
        if not all(name.startswith("ipc://") for name in sockets):
            return admin.Answer(id=message.id, error="only ipc:// sockets can be attached")
        if not self._devices.all_ready or self._failure is not None:
            error = self._failure or f"starting: {self._devices.progress}"
            return admin.Answer(id=message.id, error=error)
        model = self._names.index(message.model)
        self._connect(
            model,
            scheduler_input=message.scheduler_input,
            tokenizer=message.tokenizer,
            detokenizer=message.detokenizer,
            attached=True,
        )
        log.info("a server attached to model %s", message.model)
        pool_tokens = self._deployment.kv_pool_bytes // self._specs[model].kv_bytes_per_token
        return admin.Attached(
            id=message.id,
            max_total_tokens=pool_tokens,
            max_input_tokens=self._core.max_tokens(model) - 1,
        )

    def status(self) -> dict[str, Any]:
        """The core's snapshot, and: ``ready``; ``message``, what it waits for or why it fails;
        ``devices`` [{name, ready, pid, ranks}]; per model ``path``, ``context``, ``dtype``,
        ``kv_bytes_per_token``, ``max_tokens``, ``ffn_ranks``, ``attached`` front ends."""
        snapshot = self._core.snapshot()
        for index, model in enumerate(snapshot["models"]):
            spec = self._specs[index]
            model.update(
                path=self._deployment.models[index].path,
                context=spec.context,
                dtype=spec.dtype,
                kv_bytes_per_token=spec.kv_bytes_per_token,
                max_tokens=self._core.max_tokens(index),
                ffn_ranks=self._deployment.ffn_ranks(index),
                attached=sum(f.attached and f.model == index for f in self._front_ends.values()),
            )
        devices = [self._device_status(device.name) for device in self._deployment.devices]
        ready = self._devices.all_ready and self._failure is None
        message = self._failure or self._devices.progress
        return {**snapshot, "ready": ready, "message": message, "devices": devices}

    def _device_status(self, name: str) -> dict[str, Any]:
        ready = self._devices.ready.get(name)
        return {
            "name": name,
            "ready": ready is not None,
            "pid": ready.pid if ready else None,
            "ranks": msgspec.to_builtins(ready.ranks) if ready else [],
        }
