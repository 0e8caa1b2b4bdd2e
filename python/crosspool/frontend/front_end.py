"""One front end of one model, seen from the scheduler: SGLang's sockets.

A front end is a tokenizer manager and a detokenizer. The deployment's own HTTP process has one per
model; stock SGLang servers may attach more.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import zmq
from sglang.srt.managers import io_struct

from crosspool.frontend import private, unreadable
from crosspool.frontend.messages import OpenRequest, finish_reason, to_token_id_output
from crosspool.frontend.own_messages import ModelGone, SchedulerReplaced
from crosspool.frontend.sent import Sent
from crosspool.observability.bounded_log import BoundedLog
from crosspool.scheduler.request import Finish, Output

log = BoundedLog(logging.getLogger(__name__))

_PART_MS = 10_000
"""Time that the last messages of a model have to be read."""
_UNREAD_MESSAGES = 100_000
"""A peer that leaves this many messages unread is taken for dead."""


class FrontEndLost(RuntimeError):
    """The front end no longer reads what it is sent."""


class FrontEnd:
    """Connects to the sockets that the tokenizer manager and the detokenizer bind.

    Raises ValueError, with a text for the user, for a socket that cannot be connected to."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        model: int,
        *,
        scheduler_input: str,
        tokenizer: str,
        detokenizer: str,
        attached: bool,
    ) -> None:
        self.model = model
        self.attached = attached
        """True for a stock SGLang server, False for the deployment's own HTTP process."""
        self.pauses = False
        """Whether it wants the model to make no steps."""
        self.awaited = False
        """Whether it has yet to hand in its requests, since the scheduler is a new one; what else
        it says was meant for an earlier scheduler, and will be said again."""
        self.requests: dict[str, OpenRequest] = {}
        """Requests of this front end that are not finished, by request id."""
        self._sent = None if attached else Sent()
        """What the next detokenizer needs if this one dies, which an attached server ends with."""
        self._context = context
        self._sockets: list[zmq.Socket[bytes]] = []
        try:
            self.socket = self._connect(context, zmq.PULL, scheduler_input)
            self._to_tokenizer = self._connect(context, zmq.PUSH, tokenizer)
            self._to_detokenizer = self._connect(context, zmq.PUSH, detokenizer)
        except zmq.ZMQError as error:
            self.close()
            raise ValueError(f"a socket of the front end cannot be connected to: {error}") from None

    def _connect(
        self, context: zmq.Context[zmq.Socket[bytes]], kind: int, address: str
    ) -> zmq.Socket[bytes]:
        socket = context.socket(kind)
        self._sockets.append(socket)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.SNDHWM, _UNREAD_MESSAGES)
        socket.setsockopt(zmq.RCVHWM, 0)
        socket.setsockopt(zmq.MAXMSGSIZE, private.MAX_MESSAGE_BYTES)
        socket.connect(address)
        return socket

    def replace_detokenizer(self, address: str) -> int:
        """Connects to the socket of another detokenizer, which has taken the place of a dead one,
        and sends it all that may not have arrived. Returns of how many requests. Raises
        FrontEndLost."""
        self._sockets.remove(self._to_detokenizer)
        self._to_detokenizer.close()
        self._to_detokenizer = self._connect(self._context, zmq.PUSH, address)
        items = self._sent.items() if self._sent is not None else []
        for item in items:  # together they may be more than a message can hold
            self.to_detokenizer(to_token_id_output([item]))
        return len(items)

    def ask_for_requests(self, scheduler: int) -> None:
        """Has it hand in its requests to this scheduler, which has the number ``scheduler``. Raises
        FrontEndLost."""
        self.awaited = True
        self.to_tokenizer(SchedulerReplaced(incarnation=scheduler))

    def open(self, request: OpenRequest) -> None:
        """Notes a request until it has finished. The front end may have had another of this id,
        whose end it has seen then."""
        self.requests[request.rid] = request
        self.confirm([request.rid])

    def confirm(self, rids: Iterable[str]) -> None:
        """The front end has seen the end of these requests."""
        if self._sent is not None:
            self._sent.confirm(rids)

    def forget_ended(self) -> None:
        """Nobody waits for the ends that were sent."""
        if self._sent is not None:
            self._sent.forget_ended()

    def receive(self) -> Any | None:
        """The next message, or None when there is none. The requests of a message that cannot be
        decoded are refused: one client's bad message must not take the server down, and the client
        must not wait. Raises FrontEndLost."""
        while True:
            try:
                frames = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return None
            if len(frames) != 1:
                log.error("model %d: dropped a message of %d parts", self.model, len(frames))
                continue
            try:
                message = private.decode(frames[0])
            except Exception as error:  # SGLang's hooks for arrays and tensors raise anything
                self._refuse_unreadable(frames[0], error)
                continue
            if isinstance(message, io_struct.BaseReq | io_struct.BaseBatchReq):
                return message
            log.error("model %d: dropped a %s", self.model, type(message).__name__)

    def _refuse_unreadable(self, frame: bytes, error: Exception) -> None:
        rids = [rid for rid in unreadable.rids(frame) if rid not in self.requests]
        log.error(
            "model %d: a message of %d bytes with %d new requests cannot be decoded: %s",
            self.model,
            len(frame),
            len(rids),
            error,
        )
        for rid in rids:
            self.refuse(rid, unreadable.reason(error))

    def refuse(self, rid: str, text: str) -> None:
        """Ends a request that the scheduler never took, with status 400. Raises FrontEndLost."""
        reason = finish_reason(Finish(kind="abort", message=text, status=400), 0)
        self.to_tokenizer(io_struct.AbortReq(rid=rid, finished_reason=reason))

    def to_tokenizer(self, message: Any) -> None:
        self._send(self._to_tokenizer, message)

    def to_detokenizer(self, message: Any) -> None:
        self._send(self._to_detokenizer, message)

    def _send(self, socket: zmq.Socket[bytes], message: Any) -> None:
        """Raises FrontEndLost when the peer has stopped reading."""
        try:
            socket.send(io_struct.msgpack_encode(message), zmq.NOBLOCK)
        except zmq.Again:
            raise FrontEndLost(f"a front end of model {self.model} does not read") from None

    def take(self, output: Output) -> tuple[OpenRequest, Output] | None:
        """The request and its output to send now, if any. A request is forgotten when it has
        finished."""
        request = self.requests[output.rid]
        due = request.take(output)
        if output.finish is not None:
            del self.requests[output.rid]
        if due is None:
            return None
        if self._sent is not None:
            self._sent.add(request, due)
        return request, due

    def part(self) -> None:
        """Closes the front end of a model that has gone. Its detokenizer is told once it has all
        outputs, and what was sent arrives. Raises FrontEndLost."""
        self.to_detokenizer(ModelGone())
        for socket in self._sockets:
            socket.close(linger=_PART_MS)

    def close(self) -> None:
        for socket in self._sockets:
            socket.close()
