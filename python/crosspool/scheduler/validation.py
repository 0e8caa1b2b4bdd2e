"""What is wrong with a request, if anything: the message that goes out with status 400."""

from __future__ import annotations

import math

from crosspool.models.spec import ModelSpec
from crosspool.scheduler.request import GenerateRequest, StopRules
from crosspool.scheduler.stop_regex import compile_pattern
from crosspool.transport.messages import Logprobs, Sampling

_MOST_TEMPERATURE = 1e6
"""Far beyond it, a logit of minus infinity, which bars a token, would be divided by infinity."""


def problem(request: GenerateRequest, spec: ModelSpec) -> str | None:
    """The first thing that is wrong with ``request``; None when its model can serve it.

    Admission decides whether the KV pool is large enough for it."""
    return (
        _prompt_problem(request, spec)
        or _stop_problem(request.stop)
        or _sampling_problem(request.sampling, spec.vocab)
        or _logprobs_problem(request.logprobs, len(request.input_ids), spec.vocab)
    )


def _prompt_problem(request: GenerateRequest, spec: ModelSpec) -> str | None:
    length = len(request.input_ids)
    if not length:
        return "the prompt is empty; send at least one token"
    for position, token in enumerate(request.input_ids):
        if not 0 <= token < spec.vocab:
            return (
                f"token id {token} at position {position} of the prompt is out of vocabulary; "
                f"ids go from 0 to {spec.vocab - 1}"
            )
    room = spec.context - length
    if room < 0 or (room == 0 and request.stop.max_new_tokens != 0):
        return (
            f"the prompt has {length} tokens and leaves no room for output; "
            f"the model's context is {spec.context} tokens"
        )
    return None


def _stop_problem(stop: StopRules) -> str | None:
    limit = stop.max_new_tokens
    if limit is not None and limit < 0:
        return f"max_new_tokens must be at least 0, got {limit}"
    if stop.min_new_tokens < 0:
        return f"min_new_tokens must be at least 0, got {stop.min_new_tokens}"
    if limit is not None and stop.min_new_tokens > limit:
        return f"min_new_tokens ({stop.min_new_tokens}) is greater than max_new_tokens ({limit})"
    if "" in stop.stop_strings:
        return "a stop string must not be empty"
    try:
        for pattern in stop.stop_regexes:
            compile_pattern(pattern)
    except ValueError as error:
        return str(error)
    return None


def _sampling_problem(sampling: Sampling, vocab: int) -> str | None:
    s = sampling
    if not 0 <= s.temperature <= _MOST_TEMPERATURE:
        return f"temperature must be a number from 0 to {_MOST_TEMPERATURE:g}, got {s.temperature}"
    if not 0 < s.top_p <= 1:
        return f"top_p must be greater than 0 and at most 1, got {s.top_p}"
    if s.top_k < 1 and s.top_k != -1:
        return f"top_k must be -1 (all tokens) or at least 1, got {s.top_k}"
    if not 0 <= s.min_p <= 1:
        return f"min_p must be from 0 to 1, got {s.min_p}"
    if not -2 <= s.frequency_penalty <= 2:
        return f"frequency_penalty must be from -2 to 2, got {s.frequency_penalty}"
    if not -2 <= s.presence_penalty <= 2:
        return f"presence_penalty must be from -2 to 2, got {s.presence_penalty}"
    if not 0 < s.repetition_penalty <= 2:
        return (
            "repetition_penalty must be greater than 0 and at most 2 (1: no penalty), "
            f"got {s.repetition_penalty}"
        )
    for token, bias in s.logit_bias.items():
        if not 0 <= token < vocab:
            return f"logit_bias names token id {token}; ids go from 0 to {vocab - 1}"
        if math.isnan(bias):
            return f"logit_bias of token {token} must be a number"
    if not -(2**63) <= s.seed < 2**63:
        return f"seed must be a 64-bit integer, got {s.seed}"
    return None


def _logprobs_problem(logprobs: Logprobs, prompt_length: int, vocab: int) -> str | None:
    if not -1 <= logprobs.prompt_start <= prompt_length:
        return (
            f"logprob_start_len must be from -1 (none) to the prompt's length {prompt_length}, "
            f"got {logprobs.prompt_start}"
        )
    if not 0 <= logprobs.top <= vocab:
        return f"top_logprobs_num must be from 0 to the vocabulary's {vocab}, got {logprobs.top}"
    for token in logprobs.token_ids:
        if not 0 <= token < vocab:
            return f"token_ids_logprob names token id {token}; ids go from 0 to {vocab - 1}"
    return None
