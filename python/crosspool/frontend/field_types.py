"""Types of what a request brings, checked by the structs that the scheduler decodes.

The scheduler cannot answer a message that it cannot decode, so what does not fit is refused here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
from sglang.srt.managers import io_struct
from sglang.srt.sampling.sampling_params import SamplingParams

from crosspool.frontend import private, unreadable
from crosspool.scheduler.stop_regex import MOST_PATTERNS, compile_pattern

_INTERNAL = (
    "is_normalized",
    "stop_regex_max_len",
    "stop_regex_strs",
    "stop_str_max_len",
    "stop_strs",
)
"""Fields of SamplingParams that SGLang fills in itself."""
_SAMPLING = {
    field.name: field.type
    for field in msgspec.structs.fields(SamplingParams)
    if field.name not in _INTERNAL
}
_SESSION = frozenset(io_struct.SessionParams.__struct_fields__)
_PER_PROMPT = (
    "bootstrap_host",
    "bootstrap_pair_key",
    "bootstrap_port",
    "bootstrap_room",
    "custom_logit_processor",
    "decode_tp_size",
    "logprob_start_len",
    "lora_id",
    "lora_path",
    "return_logprob",
    "return_sampling_mask",
    "sampling_logprobs_mode",
    "sampling_params",
    "top_logprobs_num",
)
"""Fields of a request that may be lists with one entry for each prompt."""
_OF_ONE_PROMPT = (
    "audio_data",
    "lora_id",
    "modalities",
    "multi_item_delimiter_indices",
    "token_indices_to_pool",
    "video_data",
)
"""Fields of which SGLang takes an entry for each prompt without looking how many there are."""


def problem(request: io_struct.GenerateReqInput | io_struct.EmbeddingReqInput) -> str | None:
    """The first thing in ``request`` that has a wrong type or length; None where all fits."""
    if isinstance(request, io_struct.EmbeddingReqInput):
        return "the model generates text; it has no embeddings, classes or scores of its own"
    for name in ("input_embeds", "positional_embed_overrides"):
        if getattr(request, name) is not None:
            return f"`{name}` is not supported"
    if (text := _prompt_problem(request)) is not None:
        return text
    for name in request.session_params or ():
        if name not in _SESSION:
            return f"`session_params` has no field {name!r}"
    prompts = _prompts(request)
    for name in _PER_PROMPT:
        value = getattr(request, name)
        if not isinstance(value, list) or len(value) == prompts:
            continue
        if prompts is None:
            return f"`{name}` must not be a list where there is a single prompt"
        return f"`{name}` has {len(value)} entries for {prompts} prompts"
    if prompts is not None:
        for name in _OF_ONE_PROMPT:
            if getattr(request, name) is not None:
                return f"`{name}` is not supported beside a list of prompts"
        ids = request.token_ids_logprob
        if ids and isinstance(ids[0], list) and len(ids) != prompts:
            return f"`token_ids_logprob` has {len(ids)} entries for {prompts} prompts"
    given = request.sampling_params
    for params in given if isinstance(given, list) else [given or {}]:
        for text in _sampling_problems(params):
            return text
    return None


def _prompt_problem(request: io_struct.GenerateReqInput) -> str | None:
    if request.text is not None and request.input_ids is not None:
        return "a request has either `text` or `input_ids`, not both"
    name = "input_ids" if request.text is None else "text"
    value = getattr(request, name)
    if value is None:
        return "`text` or `input_ids` is missing"
    if not value or not all(isinstance(one, int) or one for one in value):
        return f"`{name}` must have at least one token, in every prompt"
    if isinstance(value, list) and len({isinstance(one, int) for one in value}) > 1:
        return f"`{name}` must be one list of integers, or a list of such lists"
    if request.sampling_params == []:
        return "`sampling_params` must be an object, or a list with one for each prompt"
    return None


def _prompts(request: io_struct.GenerateReqInput) -> int | None:
    """Number of prompts in a list; None for one that is in no list."""
    prompts = request.input_ids if request.text is None else request.text
    if isinstance(prompts, str) or not prompts or isinstance(prompts[0], int):
        return None
    return len(prompts)


def _sampling_problems(params: dict[str, Any]) -> Iterator[str]:
    for name, value in params.items():
        if name not in _SAMPLING:
            yield f"`sampling_params` has no field {name!r}"
        elif isinstance(value, int) and not -(2**63) <= value < 2**63:
            yield f"`{name}` must be an integer of 64 bits"
        elif value is not None:
            try:
                msgspec.convert(value, _SAMPLING[name])
            except msgspec.ValidationError as error:
                yield f"`{name}`: {error}"
                continue
            if name == "stop_regex":
                yield from _regex_problems([value] if isinstance(value, str) else value)


def _regex_problems(patterns: list[str]) -> Iterator[str]:
    if len(patterns) > MOST_PATTERNS:
        yield f"`stop_regex` has {len(patterns)} patterns; at most {MOST_PATTERNS} are allowed"
        return
    for pattern in patterns:
        try:
            compile_pattern(pattern)
        except ValueError as error:
            yield str(error)


def message_problem(message: Any) -> str | None:
    """Why the scheduler could not decode ``message``; None where it can."""
    try:
        private.decode(io_struct.msgpack_encode(message))
    except OverflowError:
        return "a number in the request has more than 64 bits"
    except (msgspec.MsgspecError, ValueError, TypeError, RecursionError) as error:
        return unreadable.reason(error)
    return None
