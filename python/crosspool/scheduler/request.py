"""What comes into the scheduler and what leaves it, free of any front end's message format."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from crosspool.scheduler.request_timeline import RequestTimeline
from crosspool.transport.messages import Logprobs, Sampling, TokenLogprobs


@dataclass(frozen=True, kw_only=True)
class Grammar:
    """A constraint on the output: exactly one kind of source text."""

    kind: Literal["regex", "json_schema", "ebnf", "structural_tag"]
    source: str
    """The grammar's text; as ``json_schema``, ``$$ANY$$`` means any JSON value."""


@dataclass(frozen=True, kw_only=True)
class StopRules:
    """The rules by which a request ends."""

    max_new_tokens: int | None
    """None means up to the model's context, or what the KV pool of one attention rank holds; 0
    means prefill only, after which the request finishes with ``length``."""
    min_new_tokens: int = 0
    stop_token_ids: frozenset[int] = frozenset()
    """Tokens that end the request, in addition to the model's own eos ids."""
    stop_strings: tuple[str, ...] = ()
    stop_regexes: tuple[str, ...] = ()
    """Regular expressions that end the request where they match the output text."""
    ignore_eos: bool = False


@dataclass(frozen=True, kw_only=True)
class GenerateRequest:
    """One sequence to generate (a request with ``n > 1`` arrives as n of these)."""

    rid: str
    """The front end's name for the request, which no other unfinished request of the model has."""
    model: int
    """The model's number."""
    input_ids: list[int]
    sampling: Sampling
    stop: StopRules
    logprobs: Logprobs = field(default_factory=Logprobs)
    grammar: Grammar | None = None
    thinks_first: bool = False
    """Whether the output begins with thinking, which the grammar does not bind."""
    stream: bool = False
    is_probe: bool = False
    """Whether it is a health check: it does not count as use of the model."""
    delivered: tuple[int, ...] | None = None
    """Output tokens that the client has of a request that an earlier scheduler had taken; None in a
    new request."""
    cache_namespace: tuple[str, str] = ("", "")
    """SGLang's ``cache_salt`` and ``extra_key``; prefixes are shared only within one namespace."""
    traceparent: str | None = None
    """The span to which the request belongs, as W3C's Trace Context writes it; None where it is not
    traced."""


@dataclass(frozen=True, kw_only=True)
class Finish:
    """Why a request ended.

    ``stop``: ``matched`` is the token id, the stop string or the regular expression (None: the
    request's grammar was complete).
    ``length``: the limit was reached. ``abort``: ``message`` says why; ``status`` is the HTTP
    status (400 bad request, 429 queue or pool, 499 the client's own abort, 500 a sampled token that
    the grammar forbids, 503 a rank is gone)."""

    kind: Literal["stop", "length", "abort"]
    matched: int | str | None = None
    message: str = ""
    status: int = 200
    retry_after: float | None = None
    """Seconds after which a request refused with 429 may be worth sending again, an estimate."""


@dataclass(frozen=True, kw_only=True)
class Output:
    """What one request has yielded since its last output, on the way to the detokenizer."""

    rid: str
    model: int
    first: bool
    """Whether this is the request's first output, which carries the prompt's log-probabilities."""
    token_ids: list[int]
    """New output tokens; in the first output also those that the client has. While streaming,
    tokens whose text may be the beginning of a stop string are held back until that is decided."""
    finish: Finish | None
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    """Prompt tokens found in the prefix cache."""
    output_logprobs: list[TokenLogprobs]
    """One entry for each token that the client does not have if the request asks for them, else
    empty. A request that generates nothing and asks for the most likely tokens, or for tokens by
    their ids, has one entry for the token that could come next: it has no token (-1) and no
    log-probability of its own."""
    prompt_logprobs: list[TokenLogprobs]
    """Log-probabilities of the prompt, in the first output only."""
    reasoning_tokens: int = 0
    """Output tokens so far that are thinking, its end included."""
    timeline: RequestTimeline | None = None
    """The phases of a request that is traced, in its last output only."""
