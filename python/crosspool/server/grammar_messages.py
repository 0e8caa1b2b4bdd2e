"""What the scheduler and the process that compiles grammars tell each other over their pipe."""

from __future__ import annotations

import msgspec

from crosspool.config.deployment import ModelConfig
from crosspool.scheduler.request import Grammar
from crosspool.server.grammar_library import NextMask


class Job(msgspec.Struct, frozen=True, kw_only=True, tag="job"):
    """Compile this grammar; exactly one :class:`GrammarResult` follows unless it is cancelled."""

    id: int
    model: int
    grammar: Grammar
    was_killed: bool = False
    """Whether a child that compiled it was killed by somebody else."""


class Cancel(msgspec.Struct, frozen=True, kw_only=True, tag="cancel"):
    """Nobody waits for this job any more. Its :class:`GrammarResult` may be on the way."""

    id: int


class AddCompiler(msgspec.Struct, frozen=True, kw_only=True, tag="add_compiler"):
    """Jobs of a further model will come; :class:`CompilerAdded` is the reply."""

    model: int
    config: ModelConfig


class RemoveCompiler(msgspec.Struct, frozen=True, kw_only=True, tag="remove_compiler"):
    """A model has gone, and its jobs with it."""

    model: int


class GrammarResult(msgspec.Struct, frozen=True, kw_only=True, tag="result"):
    """Either ``first`` and ``prepared``, or ``error``: what is wrong with the grammar."""

    id: int
    first: NextMask | None = None
    prepared: Grammar | None = None
    """The grammar as its compiler builds it."""
    grown_bytes: int = 0
    """Memory that compiling it took."""
    error: str = ""


class CompilerAdded(msgspec.Struct, frozen=True, kw_only=True, tag="compiler_added"):
    """The reply to :class:`AddCompiler`."""

    model: int
    error: str = ""
    """Why grammars of the model cannot be compiled, for users; empty where they can."""


ToGrammarProcess = Job | Cancel | AddCompiler | RemoveCompiler
FromGrammarProcess = GrammarResult | CompilerAdded

_to_process: msgspec.msgpack.Decoder[ToGrammarProcess] = msgspec.msgpack.Decoder(ToGrammarProcess)
_from_process: msgspec.msgpack.Decoder[FromGrammarProcess] = msgspec.msgpack.Decoder(
    FromGrammarProcess
)


def encode(message: ToGrammarProcess | FromGrammarProcess) -> bytes:
    return msgspec.msgpack.encode(message)


def decode_to_process(frame: bytes) -> ToGrammarProcess:
    return _to_process.decode(frame)


def decode_from_process(frame: bytes) -> FromGrammarProcess:
    return _from_process.decode(frame)
