"""One front end of one model, seen from the scheduler: SGLang's sockets.

A front end is a tokenizer manager and a detokenizer. The deployment's own HTTP process has one per
model; stock SGLang servers may attach more.
"""

from __future__ import annotations

import logging
from typing import Any

import msgspec
import zmq
from sglang.srt.managers import io_struct

from crosspool.frontend import private
from crosspool.frontend.messages import OpenRequest
from crosspool.scheduler.request import Output

log = logging.getLogger(__name__)

MAX_MESSAGE_BYTES = 256 << 20
_UNREAD_MESSAGES = 100_000
"""A peer that leaves this many messages unread is taken for dead."""


class FrontEndLost(RuntimeError):
    """The front end no longer reads what it is sent."""


class FrontEnd:
    """Connects to the sockets that the tokenizer manager and the detokenizer bind."""

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
        self.requests: dict[str, OpenRequest] = {}
        """Requests of this front end that are not finished, by request id."""
        self.socket = self._connect(context, zmq.PULL, scheduler_input)
        self._to_tokenizer = self._connect(context, zmq.PUSH, tokenizer)
        self._to_detokenizer = self._connect(context, zmq.PUSH, detokenizer)

    @staticmethod
    def _connect(
        context: zmq.Context[zmq.Socket[bytes]], kind: int, address: str
    ) -> zmq.Socket[bytes]:
        socket = context.socket(kind)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.SNDHWM, _UNREAD_MESSAGES)
        socket.setsockopt(zmq.RCVHWM, 0)
        socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
        socket.connect(address)
        return socket

    def receive(self) -> Any | None:
        """The next message, or None when there is none. A message that cannot be decoded is logged
        and dropped: one client's bad message must not take the server down."""
        while True:
            try:
                frame = self.socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return None
            try:
                message = private.decode(frame)
            except (msgspec.MsgspecError, ValueError, TypeError) as error:
                log.error(
                    "dropped a message for model %d that cannot be decoded: %s", self.model, error
                )
                continue
            if isinstance(message, io_struct.BaseReq | io_struct.BaseBatchReq):
                return message
            log.error("dropped a %s for model %d", type(message).__name__, self.model)

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
        return None if due is None else (request, due)

    def close(self) -> None:
        for socket in (self.socket, self._to_tokenizer, self._to_detokenizer):
            socket.close()
