"""What front ends ask of the scheduler, without SGLang's message types, and the replies to it."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import msgspec
from sglang.srt.managers import io_struct as io

from crosspool.frontend.control_requests import FLUSHED, FORWARDED, NO_CACHE, REPLIES, WITHOUT_REPLY
from crosspool.frontend.front_end import FrontEnd
from crosspool.frontend.messages import OpenRequest, to_request
from crosspool.frontend.own_messages import Delivered, Disown, Resume
from crosspool.scheduler.request import GenerateRequest
from crosspool.transport.inspection import ModelStatus

log = logging.getLogger(__name__)


class Generate:
    """Generate from one prompt."""

    def __init__(
        self,
        message: io.TokenizedGenerateReqInput,
        stream_interval: int,
        delivered: tuple[int, ...] | None = None,
    ) -> None:
        self._message = message
        self._stream_interval = stream_interval
        self._delivered = delivered
        self.rid = message.rid
        """None in a message that is not SGLang's own."""

    def opened(self) -> OpenRequest:
        """What the way back needs to know about the request."""
        return OpenRequest.of(self._message, self._stream_interval)

    def request(self, model: int, seed: int) -> GenerateRequest:
        """``seed`` serves a request that brings none. Raises ValueError, with a text for the
        client, for what CrossPool does not do."""
        return to_request(self._message, model, seed, self._delivered)


@dataclass(frozen=True)
class Abort:
    """Abort the front end's own request with the id ``rid``, or all of its own requests."""

    rid: str | None
    """None means all."""
    message: str


class TellState:
    """Reply with :func:`tell_state`."""


class FlushCache:
    """Give up the model's cached prefixes and reply with :func:`tell_flushed`."""


@dataclass(frozen=True)
class Pause:
    """Make no further step of the model for as long as ``on``."""

    on: bool


class DisownAll:
    """Nobody waits for the front end's requests so far: abort them, and go on with the model."""


class Leave:
    """The front end's server ends."""


Command = Generate | Abort | TellState | FlushCache | Pause | DisownAll | Leave


def commands(front_end: FrontEnd, message: Any, stream_interval: int) -> Iterator[Command]:
    """What ``message`` asks of the scheduler. A message that needs nothing of the scheduler's state
    gets its reply here. Raises FrontEndLost."""
    match message:
        case io.TokenizedGenerateReqInput():
            yield Generate(message, stream_interval)
        case io.BatchTokenizedGenerateReqInput():
            for one in message:
                yield Generate(one, stream_interval)
        case Resume() if not front_end.attached:
            yield Generate(message.message, stream_interval, tuple(message.output_ids))
        case io.AbortReq():
            if message.abort_all or message.rid:
                rid = None if message.abort_all else message.rid
                yield Abort(rid, message.abort_message or "the client aborted the request")
        case io.GetInternalStateReq():
            yield TellState()
        case io.FlushCacheReqInput():
            yield FlushCache()
        case io.PauseGenerationReqInput():
            yield Pause(on=True)
        case io.ContinueGenerationReqInput():
            yield Pause(on=False)
        case Delivered():
            front_end.confirm(message.rids or ())
        case Disown():
            yield DisownAll()
        case io.ShutdownReq():
            yield Leave()
        case _:
            _reply(front_end, message)


def _reply(front_end: FrontEnd, message: Any) -> None:
    kind = type(message)
    if kind in REPLIES:
        front_end.to_tokenizer(REPLIES[kind](message))
    elif kind in FORWARDED:
        if kind is io.FreezeGCReq:
            gc.freeze()
        elif message.log_level is not None:
            logging.getLogger().setLevel(message.log_level.upper())
        front_end.to_detokenizer(message)
    elif kind not in WITHOUT_REPLY:
        log.error("refused %s for model %d: it is not supported", kind.__name__, front_end.model)
        for rid in _rids(message):
            front_end.refuse(rid, f"{kind.__name__} is not supported")


def _rids(message: Any) -> list[str]:
    """The ids that a message names. Batches that SGLang's tokenizer manager sends have theirs in
    the messages that they consist of."""
    found = [
        getattr(message, "rid", None),
        *(getattr(message, "rids", None) or []),
        *(one.rid for one in getattr(message, "batch", None) or []),
    ]
    return [rid for rid in found if isinstance(rid, str)]


def tell_state(front_end: FrontEnd, state: ModelStatus) -> None:
    state_fields = msgspec.structs.asdict(state)
    front_end.to_tokenizer(io.GetInternalStateReqOutput(internal_state=state_fields))


def tell_flushed(front_end: FrontEnd, *, has_cache: bool) -> None:
    text = FLUSHED if has_cache else NO_CACHE
    front_end.to_tokenizer(io.FlushCacheReqOutput(success=True, message=text))
