"""Questions to a running deployment: from the front end, the command line, the launcher, and front
ends that attach to it.

The scheduler process binds one ROUTER at ``deployment.admin_address``. A client connects a DEALER,
sends one request and waits for the reply with the same id. Frames are msgpack, typed by msgspec.
"""

from __future__ import annotations

import itertools
import os
import time
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec
import zmq
import zmq.asyncio

from crosspool.config.deployment import ModelConfig
from crosspool.config.options import Keep
from crosspool.observability.histograms import ModelHistograms
from crosspool.transport.detokenizer_link import FromDetokenizer, ToDetokenizer
from crosspool.transport.inspection import InspectWhat, Report, Status

MAX_MESSAGE_BYTES = 64 << 20
"""A scheduler that answers with more is cut off."""
MAX_QUESTION_BYTES = 1 << 20
"""Who asks the scheduler with more is cut off."""

LOAD_SECONDS = 120.0
"""Time that a model may take to be read, before the devices are told of it."""
WEIGHTS_SECONDS = 1800.0
"""Time that the weights of a model may take to be read that is to take another one's place."""
FORMER_SECONDS = 300.0
"""Time that a model may have requests after another one has taken its place, at most."""
LEAVE_SECONDS = 60.0
"""Time that a model may take to be gone once its requests have ended."""

What = Literal["status", "histograms", InspectWhat]
Managing = Literal["wake", "sleep", "pin"]
"""What can be done about a model's weights."""


class Ask(msgspec.Struct, frozen=True, kw_only=True, tag="ask"):
    """A question about the deployment. The scheduler answers ``status`` and ``histograms`` at once,
    even while the deployment starts, and puts the others to every device process."""

    id: int
    what: What


class Attach(msgspec.Struct, frozen=True, kw_only=True, tag="attach"):
    """Another front end wants to serve ``model`` from this deployment.

    The names are addresses (``ipc://...``) of SGLang's sockets, which that front end binds."""

    id: int
    model: str
    scheduler_input: str
    tokenizer: str
    detokenizer: str


class RankGone(msgspec.Struct, frozen=True, kw_only=True, tag="rank_gone"):
    """The launcher tells that a device's process has ended; the answer to it is empty."""

    id: int
    device: str
    incarnation: int
    """Which of the device's processes it was: 1 for the first."""
    cause: str
    final: bool
    """Whether no other process takes its place, so that the deployment ends."""


class Manage(msgspec.Struct, frozen=True, kw_only=True, tag="manage"):
    """The admin's word about where a model's weights are. It is answered at once, with nothing in
    the answer; the status tells how the model wakes or falls asleep."""

    id: int
    model: str
    what: Managing
    keep: Keep | None = None
    """What holds from now on; it is given to ``pin`` alone."""


class Load(msgspec.Struct, frozen=True, kw_only=True, tag="load"):
    """A further model is to be served. It is answered, with the model's number, when all processes
    but the HTTP process are ready for it; its weights sleep."""

    id: int
    config: ModelConfig
    replaces: bool = False
    """Whether it is to take the place of the model of its name, which goes on serving until the
    weights of this one have been read. It is answered then. The other one has the requests that it
    has, until an :class:`Unload` names it by its number."""


class Unload(msgspec.Struct, frozen=True, kw_only=True, tag="unload"):
    """The model is not to be served any more: it takes no new requests, and those that it has get
    ``timeout`` seconds to end. It is answered when nothing of the model is left."""

    id: int
    model: str | int
    """Its name; the number of one in whose place another one is served."""
    timeout: float


class Answer(msgspec.Struct, frozen=True, kw_only=True, tag="answer", omit_defaults=True):
    """The reply to any request but an Attach, or the refusal of one; ``error`` says why there is
    nothing else in it."""

    id: int
    status: Status | None = None
    histograms: list[ModelHistograms] | None = None
    report: Report | None = None
    model: int | None = None
    """The number of the model that has been loaded."""
    error: str | None = None
    is_mistake: bool = False
    """Whether the error is a mistake of whoever has asked."""


class Attached(msgspec.Struct, frozen=True, kw_only=True, tag="attached"):
    """The reply to an Attach."""

    id: int
    max_total_tokens: int
    """Number of the model's tokens that the whole KV pool can hold."""
    max_input_tokens: int
    """Longest prompt that the model takes, in tokens."""
    scheduler: int
    """The scheduler's number among those that there have been: another one knows nothing of the
    front end."""


Question = Ask | Attach | RankGone | Manage | Load | Unload
ToScheduler = Question | FromDetokenizer
FromScheduler = Answer | Attached

_encoder = msgspec.msgpack.Encoder()
_to_scheduler = msgspec.msgpack.Decoder(ToScheduler)
_from_scheduler = msgspec.msgpack.Decoder(FromScheduler)
_ids = itertools.count(1)
_Reply = TypeVar("_Reply", Answer, Attached)


class AdminError(RuntimeError):
    """The deployment did not answer in time, or refused; the message says which."""


class AdminMistake(AdminError):
    """What was asked for cannot be; the message says why."""


def encode(message: ToScheduler | FromScheduler | ToDetokenizer) -> bytes:
    return _encoder.encode(message)


def decode_to_scheduler(frame: bytes) -> ToScheduler:
    """Raises msgspec.DecodeError or, where it is nested too deep, RecursionError for anything that
    is no request."""
    return _to_scheduler.decode(frame)


def bind(context: zmq.Context[Any], address: str) -> zmq.Socket[Any]:
    """Binds the scheduler's socket, to which only this user can connect."""
    socket: zmq.Socket[Any] = context.socket(zmq.ROUTER)
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_QUESTION_BYTES)
    socket.setsockopt(zmq.LINGER, 0)
    socket.bind(address)
    os.chmod(Path(address.removeprefix("ipc://")), 0o600)
    return socket


def _connect(socket: zmq.Socket[Any], address: str) -> None:
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
    socket.setsockopt(zmq.LINGER, 0)
    socket.connect(address)


def _checked(reply: FromScheduler, kind: type[_Reply]) -> _Reply:
    if isinstance(reply, Answer) and reply.error is not None:
        raise (AdminMistake if reply.is_mistake else AdminError)(reply.error)
    if not isinstance(reply, kind):
        raise AdminError(f"the deployment answered {type(reply).__name__}, not {kind.__name__}")
    return reply


def _status(reply: FromScheduler) -> Status:
    status = _checked(reply, Answer).status
    assert status is not None
    return status


def _report(reply: FromScheduler) -> Report:
    report = _checked(reply, Answer).report
    assert report is not None
    return report


def _no_answer(address: str, timeout: float) -> AdminError:
    return AdminError(f"the deployment at {address} did not answer within {timeout:g} s")


def _exchange(address: str, message: Question, timeout: float) -> FromScheduler:
    socket: zmq.Socket[Any]
    with zmq.Context.instance().socket(zmq.DEALER) as socket:
        _connect(socket, address)
        socket.send(encode(message))
        deadline = time.monotonic() + timeout
        while (left := deadline - time.monotonic()) > 0 and socket.poll(max(1, int(left * 1000))):
            reply = _from_scheduler.decode(socket.recv())
            if reply.id == message.id:
                return reply
    raise _no_answer(address, timeout)


def status(address: str, timeout: float = 10.0) -> Status:
    """The deployment's status. Raises AdminError when nobody answers within ``timeout`` seconds."""
    reply = _exchange(address, Ask(id=next(_ids), what="status"), timeout)
    return _status(reply)


def inspect(address: str, what: InspectWhat, timeout: float = 10.0) -> Report:
    """What the devices reply to ``what``. Raises AdminError when they do not within ``timeout``
    seconds, or the deployment cannot ask them."""
    return _report(_exchange(address, Ask(id=next(_ids), what=what), timeout))


def manage(
    address: str, model: str, what: Managing, keep: Keep | None = None, timeout: float = 10.0
) -> None:
    """Tells the scheduler what to do about a model's weights; it begins at once. Raises
    AdminMistake where that cannot be, and AdminError when nobody answers within ``timeout``
    seconds."""
    message = Manage(id=next(_ids), model=model, what=what, keep=keep)
    _checked(_exchange(address, message, timeout), Answer)


def rank_gone(
    address: str,
    device: str,
    incarnation: int,
    cause: str,
    *,
    final: bool,
    timeout: float = 2.0,
) -> None:
    """Tells the scheduler that a process of ``device`` has ended. If that is ``final``, every
    request ends with 503 at once; else the device is away until its next process is ready.

    Raises AdminError when the scheduler does not confirm it."""
    message = RankGone(
        id=next(_ids), device=device, incarnation=incarnation, cause=cause, final=final
    )
    _checked(_exchange(address, message, timeout), Answer)


def attach(
    address: str,
    *,
    model: str,
    scheduler_input: str,
    tokenizer: str,
    detokenizer: str,
    timeout: float = 10.0,
) -> Attached:
    """Asks a running deployment to serve ``model`` to another front end; see :class:`Attach`.

    Raises AdminError; for an unknown model, the message names the models that are served."""
    message = Attach(
        id=next(_ids),
        model=model,
        scheduler_input=scheduler_input,
        tokenizer=tokenizer,
        detokenizer=detokenizer,
    )
    return _checked(_exchange(address, message, timeout), Attached)


class AsyncAdmin:
    """:func:`status`, :func:`inspect`, :func:`manage` and more for programs with an event loop."""

    def __init__(self, context: zmq.asyncio.Context, address: str) -> None:
        self._context = context
        self._address = address

    async def status(self, timeout: float = 10.0) -> Status:
        return _status(await self._exchange(Ask(id=next(_ids), what="status"), timeout))

    async def histograms(self, timeout: float = 10.0) -> list[ModelHistograms]:
        """What the requests of each model took since the scheduler's start."""
        reply = await self._exchange(Ask(id=next(_ids), what="histograms"), timeout)
        histograms = _checked(reply, Answer).histograms
        assert histograms is not None
        return histograms

    async def inspect(self, what: InspectWhat, timeout: float = 10.0) -> Report:
        return _report(await self._exchange(Ask(id=next(_ids), what=what), timeout))

    async def manage(
        self, model: str, what: Managing, keep: Keep | None = None, timeout: float = 10.0
    ) -> None:
        message = Manage(id=next(_ids), model=model, what=what, keep=keep)
        _checked(await self._exchange(message, timeout), Answer)

    async def load(self, config: ModelConfig, *, replaces: bool = False) -> int:
        """Has the scheduler serve a further model, or one that ``replaces`` that of its name;
        returns its number. Raises AdminMistake where that cannot be, and AdminError when nobody
        answers in time."""
        message = Load(id=next(_ids), config=config, replaces=replaces)
        if len(encode(message)) > MAX_QUESTION_BYTES:
            raise AdminMistake(f"the model's options take more than {MAX_QUESTION_BYTES} bytes")
        weights = WEIGHTS_SECONDS if replaces else 0.0
        answer = await self._exchange(message, LOAD_SECONDS + weights + 10)
        number = _checked(answer, Answer).model
        assert number is not None
        return number

    async def unload(self, model: str | int, timeout: float) -> None:
        """Has the scheduler serve the model no more, and returns when nothing of it is left there:
        its requests get ``timeout`` seconds to end. Raises AdminMistake where that cannot be, and
        AdminError when nobody answers in time."""
        message = Unload(id=next(_ids), model=model, timeout=timeout)
        _checked(await self._exchange(message, timeout + LEAVE_SECONDS), Answer)

    async def _exchange(self, message: Question, timeout: float) -> FromScheduler:
        with self._context.socket(zmq.DEALER) as socket:
            _connect(socket, self._address)
            await socket.send(encode(message))
            deadline = time.monotonic() + timeout
            while (left := deadline - time.monotonic()) > 0:
                if await socket.poll(max(1, int(left * 1000))):
                    reply = _from_scheduler.decode(await socket.recv())
                    if reply.id == message.id:
                        return reply
        raise _no_answer(self._address, timeout)
