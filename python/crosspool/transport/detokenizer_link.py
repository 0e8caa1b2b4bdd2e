"""What the detokenizer and the scheduler tell each other beside outputs: which models there are.

The detokenizer connects a DEALER to the scheduler's admin socket and keeps it as long as it lives.
"""

from __future__ import annotations

from typing import Any

import msgspec
import zmq

from crosspool.config.deployment import ModelConfig

MAX_LINK_BYTES = 2 << 20
"""A scheduler that sends more is cut off."""


class DetokenizerStarted(msgspec.Struct, frozen=True, kw_only=True, tag="detokenizer_started"):
    """A detokenizer listens, the one of this number. If it has taken the place of a dead one, it is
    to get what that one has not passed on."""

    incarnation: int
    models: list[int]
    """The models that it serves, which are those of the file that it has read."""


class TokenizerAdded(msgspec.Struct, frozen=True, kw_only=True, tag="tokenizer_added"):
    """The detokenizer's reply to :class:`AddTokenizer`."""

    model: int
    error: str | None = None
    """Why it cannot serve the model, for users; None when it listens for the model's outputs."""


class AddTokenizer(msgspec.Struct, frozen=True, kw_only=True, tag="add_tokenizer"):
    """A further model comes; :class:`TokenizerAdded` is the reply, at once for one that the
    detokenizer serves already."""

    model: int
    config: ModelConfig


class RemoveTokenizer(msgspec.Struct, frozen=True, kw_only=True, tag="remove_tokenizer"):
    """A model is not to be served, of which there never were outputs."""

    model: int


FromDetokenizer = DetokenizerStarted | TokenizerAdded
ToDetokenizer = AddTokenizer | RemoveTokenizer

_to_detokenizer: msgspec.msgpack.Decoder[ToDetokenizer] = msgspec.msgpack.Decoder(ToDetokenizer)


class SchedulerLink:
    """The detokenizer's end. Register :attr:`socket` with a poller and call :meth:`receive` when it
    is readable."""

    def __init__(self, context: zmq.Context[Any], address: str) -> None:
        self.socket: zmq.Socket[Any] = context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.MAXMSGSIZE, MAX_LINK_BYTES)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.connect(address)

    def send(self, message: FromDetokenizer) -> None:
        """Returns at once; the message arrives when the scheduler is there."""
        self.socket.send(msgspec.msgpack.encode(message))

    def receive(self) -> ToDetokenizer | None:
        """The next message, or None when no message is left. Raises msgspec.DecodeError for what is
        none."""
        try:
            return _to_detokenizer.decode(self.socket.recv(zmq.NOBLOCK))
        except zmq.Again:
            return None
