"""What comes into the scheduler and what leaves it, free of any front end's message format."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from crosspool.transport.messages import Logprobs, Sampling, TokenLogprobs


@dataclass(frozen=True, kw_only=True)
class Grammar:
    """A constraint on the output: exactly one kind of source text."""

    kind: Literal["regex", "json_schema", "ebnf", "structural_tag"]
    source: str
    """For ``json_schema``, ``$$ANY$$`` means any JSON value."""


@dataclass(frozen=True, kw_only=True)
class StopRules:
    """When a request ends."""

    max_new_tokens: int | None
    """None: up to the model's context, or to what the KV pool of one attention rank holds;
    admission promises pages for all of it. 0: prefill only, then finish with ``length``."""
    min_new_tokens: int = 0
    stop_token_ids: frozenset[int] = frozenset()
    """Beside the model's own eos ids."""
    stop_strings: tuple[str, ...] = ()
    ignore_eos: bool = False


@dataclass(frozen=True, kw_only=True)
class GenerateRequest:
    """One sequence to generate (``n > 1`` arrives as n of these)."""

    rid: str
    """The front end's name for it; aborts match by prefix."""
    model: int
    """Index into the deployment's models."""
    input_ids: list[int]
    sampling: Sampling
    stop: StopRules
    logprobs: Logprobs = field(default_factory=Logprobs)
    grammar: Grammar | None = None
    stream: bool = False
    cache_namespace: tuple[str, str] = ("", "")
    """Prefixes are shared only within one: SGLang's ``cache_salt`` and ``extra_key``."""


@dataclass(frozen=True, kw_only=True)
class Finish:
    """Why a request ended.

    ``stop``: ``matched`` is the token id or the stop string (None: its grammar was complete).
    ``length``: the limit was reached. ``abort``: ``message`` says why; ``status`` is the HTTP
    status (400 bad request, 429 queue or pool, 499 the client's own abort, 500 a sampled token that
    the grammar forbids, 503 a rank is gone)."""

    kind: Literal["stop", "length", "abort"]
    matched: int | str | None = None
    message: str = ""
    status: int = 200
    retry_after: float | None = None
    """With 429: seconds after which it may be worth asking again, as far as can be told."""


@dataclass(frozen=True, kw_only=True)
class Output:
    """News of one request, on the way to the detokenizer: what came since its last output."""

    rid: str
    model: int
    first: bool
    """Whether this is the request's first output (it then carries the prompt's log-probs)."""
    token_ids: list[int]
    """New output tokens. While streaming, tokens whose text may be the beginning of a stop string
    are held back until that is decided."""
    finish: Finish | None
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    """Prompt tokens that the prefix cache had."""
    output_logprobs: list[TokenLogprobs]
    """One per new token when asked for, else empty."""
    prompt_logprobs: list[TokenLogprobs]
    """In the first output only."""
