"""Translates SGLang's messages to the scheduler's, and back.

A TokenizedGenerateReqInput becomes a GenerateRequest. Outputs become one BatchTokenIDOutput, with
the parallel lists, deltas and prompt tails that SGLang's detokenizer and tokenizer manager expect.
"""

from __future__ import annotations

import dataclasses
import math
import os
from array import array
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

from sglang.srt.constants import HEALTH_CHECK_RID_PREFIX
from sglang.srt.managers.io_struct import BatchTokenIDOutput, TokenizedGenerateReqInput
from sglang.srt.sampling.sampling_params import TOP_K_ALL, SamplingParams

from crosspool.frontend import private
from crosspool.scheduler.request import (
    Finish,
    GenerateRequest,
    Grammar,
    Output,
    StopRules,
)
from crosspool.transport.messages import Logprobs, Sampling, TokenLogprobs

PROMPT_TAIL = 5
"""Number of prompt tokens that the detokenizer gets before a request's first output: how a token
reads can depend on those before it."""

CLIENT_ABORT = 499
_ERROR_TYPES = {
    400: "BadRequestError",
    404: "NotFoundError",
    429: "RateLimitError",
    500: "InternalServerError",
    503: "ServiceUnavailableError",
}
_SEED_MASK = (1 << 63) - 1
_SEED_STEP = 0x9E3779B97F4A7C15

_UNSUPPORTED: tuple[tuple[str, str], ...] = (
    ("input_embeds", "input_embeds"),
    ("mm_inputs", "image, video and audio input"),
    ("positional_embed_overrides", "embedding overrides"),
    ("token_type_ids", "token_type_ids"),
    ("lora_id", "LoRA adapters"),
    ("session_params", "sessions"),
    ("custom_logit_processor", "custom_logit_processor, which is code of a client,"),
    ("return_hidden_states", "return_hidden_states"),
    ("return_routed_experts", "return_routed_experts"),
    ("return_indexer_topk", "return_indexer_topk"),
    ("return_sampling_mask", "return_sampling_mask"),
    ("return_entropy", "return_entropy"),
    ("multi_item_delimiter_indices", "multi-item scoring"),
    ("token_indices_to_pool", "pooled readout"),
    ("bootstrap_room", "prefill-decode disaggregation"),
)
_UNSUPPORTED_SAMPLING: tuple[tuple[str, str], ...] = (
    ("beam_width", "beam search"),
    ("custom_params", "custom_params"),
)
_GRAMMARS: tuple[Literal["regex", "json_schema", "ebnf", "structural_tag"], ...] = (
    "regex",
    "json_schema",
    "ebnf",
    "structural_tag",
)


def seed_of_sample(seed: int, sample: int) -> int:
    """The seed of the sample number ``sample``, from 0 on, of a prompt whose request has ``seed``:
    the request's own for the first, and another for each of the rest."""
    return (seed + sample * _SEED_STEP) & _SEED_MASK


def seeds(random_seed: int | None) -> Iterator[int]:
    """Yield seeds for requests that have none: always the same sequence for one ``random_seed``."""
    while random_seed is None:
        yield int.from_bytes(os.urandom(8), "little") & _SEED_MASK
    counter = random_seed
    while True:
        yield (counter * _SEED_STEP) & _SEED_MASK
        counter += 1


def to_request(
    message: TokenizedGenerateReqInput,
    model: int,
    seed: int,
    delivered: tuple[int, ...] | None = None,
) -> GenerateRequest:
    """``seed`` is used where the request has none; ``delivered`` are the output tokens that its
    client has, if an earlier scheduler had taken it. Raises ValueError, with a text for the client,
    for what CrossPool does not do. The scheduler checks the values."""
    for field, what in _UNSUPPORTED:
        if getattr(message, field):
            raise ValueError(f"{what} is not supported")
    params = message.sampling_params
    for field, what in _UNSUPPORTED_SAMPLING:
        if getattr(params, field):
            raise ValueError(f"{what} is not supported")
    assert message.rid is not None
    input_ids = list(message.input_ids or ())
    if input_ids and not isinstance(input_ids[0], int):
        raise ValueError("`input_ids` must be whole numbers")
    return GenerateRequest(
        rid=message.rid,
        model=model,
        input_ids=input_ids,
        sampling=_sampling(params, seed),
        stop=StopRules(
            max_new_tokens=params.max_new_tokens,
            # SGLang has a prompt of several samples computed first, by a copy of its request that
            # generates nothing.
            min_new_tokens=0 if params.max_new_tokens == 0 else params.min_new_tokens,
            # As in SGLang, ignore_eos means stop tokens too.
            stop_token_ids=frozenset(() if params.ignore_eos else params.stop_token_ids or ()),
            stop_strings=_strings(params.stop_strs),
            stop_regexes=_strings(params.stop_regex_strs),
            ignore_eos=params.ignore_eos,
        ),
        logprobs=_logprobs(message, len(input_ids)),
        grammar=_grammar(params),
        thinks_first=message.require_reasoning,
        is_probe=message.rid.startswith(HEALTH_CHECK_RID_PREFIX),
        stream=message.stream,
        delivered=delivered,
        cache_namespace=(message.cache_salt or "", message.extra_key or ""),
        traceparent=private.traceparent_of(message),
    )


def _strings(value: str | list[str] | None) -> tuple[str, ...]:
    strings = (value,) if isinstance(value, str) else tuple(value or ())
    return tuple(string for string in strings if string)


def _sampling(params: SamplingParams, seed: int) -> Sampling:
    # SGLang turns temperature 0 into top_k 1; every way to ask for the best token is greedy.
    greedy = params.top_k == 1 or params.temperature == 0
    own_seed = params.sampling_seed
    return Sampling(
        temperature=0.0 if greedy else params.temperature,
        top_k=-1 if params.top_k in (-1, TOP_K_ALL) else params.top_k,
        top_p=params.top_p,
        min_p=params.min_p,
        frequency_penalty=params.frequency_penalty,
        presence_penalty=params.presence_penalty,
        repetition_penalty=params.repetition_penalty,
        logit_bias={int(token): bias for token, bias in (params.logit_bias or {}).items()},
        seed=seed if own_seed is None else own_seed & _SEED_MASK,
        min_new_tokens=params.min_new_tokens,
    )


def _logprobs(message: TokenizedGenerateReqInput, prompt_len: int) -> Logprobs:
    if not message.return_logprob:
        return Logprobs()
    start = message.logprob_start_len
    return Logprobs(
        output=True,
        prompt_start=-1 if start == prompt_len else start,
        top=message.top_logprobs_num,
        token_ids=tuple(message.token_ids_logprob or ()),
    )


def _grammar(params: SamplingParams) -> Grammar | None:
    for kind in _GRAMMARS:  # SGLang lets at most one through
        if source := getattr(params, kind):
            return Grammar(kind=kind, source=source)
    return None


def refusal(rid: str, model: int, message: str, status: int, prompt_tokens: int) -> Output:
    """The one output of a request that the scheduler never took."""
    return Output(
        rid=rid,
        model=model,
        first=True,
        token_ids=[],
        finish=Finish(kind="abort", message=message, status=status),
        prompt_tokens=prompt_tokens,
        completion_tokens=0,
        cached_tokens=0,
        output_logprobs=[],
        prompt_logprobs=[],
    )


def finish_reason(finish: Finish | None, completion_tokens: int) -> dict[str, Any] | None:
    """SGLang's finish reason. Only aborts that are errors have a status: one that the client asked
    for is an ordinary end. ``retry_after``, in whole seconds, is CrossPool's own field, which
    SGLang passes on as it is."""
    if finish is None:
        return None
    if finish.kind == "stop":
        return {"type": "stop", "matched": finish.matched}
    if finish.kind == "length":
        return {"type": "length", "length": completion_tokens}
    reason: dict[str, Any] = {"type": "abort", "message": finish.message}
    if finish.status != CLIENT_ABORT:
        reason["status_code"] = finish.status
        reason["err_type"] = _ERROR_TYPES.get(finish.status, "InternalServerError")
    if finish.retry_after is not None:
        reason["retry_after"] = max(1, math.ceil(finish.retry_after))
    return reason


@dataclasses.dataclass
class OpenRequest:
    """What is needed to send a request's output, kept until its finish has been sent."""

    rid: str
    http_worker_ipc: str | None
    prompt_tail: array[int]
    prompt_len: int
    stream: bool
    stream_interval: int
    params: SamplingParams
    logprobs: bool
    top: int
    token_ids: tuple[int, ...]
    held: Output | None = None
    """Output that waits until it fills a stream interval or, where nothing is streamed, until the
    request ends."""

    @classmethod
    def of(cls, message: TokenizedGenerateReqInput, stream_interval: int) -> OpenRequest:
        ids = message.input_ids if message.input_ids is not None else array("q")
        assert message.rid is not None
        return cls(
            rid=message.rid,
            http_worker_ipc=message.http_worker_ipc,
            prompt_tail=array("q", ids[-PROMPT_TAIL:]),
            prompt_len=len(ids),
            stream=message.stream,
            stream_interval=message.sampling_params.stream_interval or stream_interval,
            params=message.sampling_params,
            logprobs=message.return_logprob,
            top=message.top_logprobs_num,
            token_ids=tuple(message.token_ids_logprob or ()),
        )

    def take(self, output: Output) -> Output | None:
        """The output to send now: what was held back and then this one; None to wait for more."""
        if self.held is not None:
            output = _join(self.held, output)
        due = self.stream and (output.first or len(output.token_ids) >= self.stream_interval)
        if output.finish is not None or due:
            self.held = None
            return output
        self.held = output
        return None


def _join(earlier: Output, later: Output) -> Output:
    return dataclasses.replace(
        later,
        first=earlier.first,
        token_ids=earlier.token_ids + later.token_ids,
        output_logprobs=earlier.output_logprobs + later.output_logprobs,
        prompt_logprobs=earlier.prompt_logprobs + later.prompt_logprobs,
    )


Item = tuple[OpenRequest, Output]


def to_token_id_output(items: Sequence[Item]) -> BatchTokenIDOutput:
    """One message for the detokenizer. ``items`` are requests of one front end, each at most
    once."""
    ids = [array("q", output.token_ids) for _, output in items]

    def each(value: Callable[[OpenRequest, Output], Any]) -> list[Any]:
        return [value(request, output) for request, output in items]

    return BatchTokenIDOutput(
        rids=each(lambda r, o: r.rid),
        http_worker_ipcs=each(lambda r, o: r.http_worker_ipc),
        finished_reasons=each(lambda r, o: finish_reason(o.finish, o.completion_tokens)),
        decoded_texts=[""] * len(items),
        decode_ids=[
            request.prompt_tail + delta if output.first else delta
            for (request, output), delta in zip(items, ids, strict=True)
        ],
        read_offsets=each(lambda r, o: len(r.prompt_tail)),
        output_ids=ids,
        skip_special_tokens=each(lambda r, o: r.params.skip_special_tokens),
        spaces_between_special_tokens=each(lambda r, o: r.params.spaces_between_special_tokens),
        no_stop_trim=each(lambda r, o: r.params.no_stop_trim),
        prompt_tokens=each(lambda r, o: o.prompt_tokens),
        reasoning_tokens=each(lambda r, o: o.reasoning_tokens),
        completion_tokens=each(lambda r, o: o.completion_tokens),
        cached_tokens=each(lambda r, o: o.cached_tokens),
        **_logprob_lists(items),
        output_token_entropy_val=None,
        output_token_sampling_mask=None,
        output_hidden_states=None,
        routed_experts=None,
        indexer_topk=None,
        placeholder_tokens_idx=None,
        placeholder_tokens_val=None,
        retraction_counts=[0] * len(items),
    )


_OF_POSITION: dict[str, Callable[[TokenLogprobs], Any]] = {
    "token_logprobs_val": lambda position: position.logprob,
    "token_logprobs_idx": lambda position: position.token,
    "top_logprobs_val": lambda position: [value for value, _ in position.top] or None,
    "top_logprobs_idx": lambda position: [token for _, token in position.top] or None,
    "token_ids_logprobs_val": lambda position: [value for value, _ in position.token_ids] or None,
    "token_ids_logprobs_idx": lambda position: [token for _, token in position.token_ids] or None,
}
"""What BatchTokenIDOutput lists of each position, of the prompt in ``input_...`` and of the output
in ``output_...``. None stands where there is nothing, as with a prompt's first token."""


def _logprob_lists(items: Sequence[Item]) -> dict[str, list[Any] | None]:
    if not any(request.logprobs for request, _ in items):
        return {f"{side}_{name}": None for name in _OF_POSITION for side in ("input", "output")}
    fields: dict[str, list[Any] | None] = {}
    for name, value in _OF_POSITION.items():
        for side, places in (("input", "prompt_logprobs"), ("output", "output_logprobs")):
            # As in SGLang, a position without a token is in the lists of other tokens alone.
            everywhere = not name.startswith("token_logprobs")
            fields[f"{side}_{name}"] = [
                [value(p) for p in getattr(output, places) if everywhere or p.token >= 0]
                if request.logprobs
                else []
                for request, output in items
            ]
    return fields
