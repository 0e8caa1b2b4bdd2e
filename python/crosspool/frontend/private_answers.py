"""What CrossPool mends in SGLang's OpenAI routes: what they take, and what they answer. It replaces
private names and public ones, as :mod:`crosspool.frontend.private` does."""

from __future__ import annotations

import copy
import functools
import json
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import aclosing
from itertools import accumulate
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo


class CompletionTokensDetails(BaseModel):
    """What OpenAI's clients look for beside the number of an answer's tokens."""

    reasoning_tokens: int = 0


@functools.cache
def mend() -> None:
    """Mends what SGLang's OpenAI routes do wrong, before the first copy of them is made."""
    from sglang.srt.entrypoints.openai import (
        protocol,
        serving_chat,
        serving_completions,
        usage_processor,
    )
    from sglang.srt.function_call import function_call_parser

    _allow_no_tokens(protocol.CompletionRequest)
    _allow_token_0(serving_completions.OpenAIServingCompletion)
    _lift_definitions(serving_chat, function_call_parser)
    _bind_calls(function_call_parser.FunctionCallParser)
    _check_stream_options(serving_chat.OpenAIServingChat)
    _check_stream_options(serving_completions.OpenAIServingCompletion)
    _leave_out_unwanted_usage(serving_chat, serving_completions)
    _tell_reasoning_tokens(protocol, usage_processor.UsageProcessor)
    _tell_prompt_logprobs(serving_completions.OpenAIServingCompletion)
    _tell_text_offsets(serving_completions)


def _lift_definitions(*modules: Any) -> None:
    """Has SGLang put ``$defs`` of a named tool's parameters at the root of the schema that it makes
    around them, where references look for them; it does so for required tools alone."""
    from sglang.srt.function_call import utils

    constraint = utils.get_json_schema_constraint

    @functools.wraps(constraint)
    def with_definitions(tools: Any, tool_choice: Any, *rest: Any, **named: Any) -> Any:
        schema = constraint(tools, tool_choice, *rest, **named)
        if schema is None or tool_choice == "required":
            return schema
        chosen = [tool for tool in tools if tool.function.name == tool_choice.function.name]
        definitions = utils._get_tool_schema_defs(chosen)
        return {**schema, "$defs": definitions} if definitions else schema

    for module in modules:
        module.get_json_schema_constraint = with_definitions


def _allow_no_tokens(request: Any) -> None:
    """Has ``/v1/completions`` take ``max_tokens: 0``, with which a client has its prompt echoed and
    nothing generated."""

    def at_least_0(value: int | None) -> int | None:
        if value is not None and value < 0:
            raise ValueError(f"max_tokens must be at least 0, got {value}")
        return value

    validators = request.__pydantic_decorators__.field_validators
    validators["validate_max_tokens_positive"].func = at_least_0
    request.model_rebuild(force=True)


def _allow_token_0(handler: Any) -> None:
    """Has ``/v1/completions`` take a prompt of nothing but the token id 0, which SGLang takes for
    an empty one."""

    @functools.wraps(handler._validate_request)
    def validate(self: Any, request: Any) -> str | None:
        del self
        prompts = request.prompt if isinstance(request.prompt, list) else [request.prompt]
        return None if any(one or one == 0 for one in prompts) else "Prompt cannot be empty"

    handler._validate_request = validate


def _bind_calls(parser: Any) -> None:
    """Has a call that must be made be one of the named tool, with arguments that fit the tool's
    schema, in every format of calls. In some, SGLang binds the name to any of the request's tools,
    and the arguments to nothing unless the tool is strict."""
    constrain = parser.get_structure_constraint

    @functools.wraps(constrain)
    def bound(self: Any, tool_choice: Any, *rest: Any, **named: Any) -> Any:
        if tool_choice in ("auto", "none"):
            return constrain(self, tool_choice, *rest, **named)
        binding = copy.copy(self)
        binding.tools = [
            _strict(tool)
            for tool in self.tools
            if tool_choice == "required" or tool.function.name == tool_choice.function.name
        ]
        return constrain(binding, tool_choice, *rest, **named)

    parser.get_structure_constraint = bound


def _strict(tool: Any) -> Any:
    """A copy of a tool whose arguments are an object that fits its schema, if it has one."""
    parameters = tool.function.parameters or {"type": "object"}
    function = tool.function.model_copy(update={"strict": True, "parameters": parameters})
    return tool.model_copy(update={"function": function})


def _check_stream_options(handler: Any) -> None:
    """Has a route refuse, as OpenAI does, options of a stream where none is asked for."""
    check = handler._validate_request

    @functools.wraps(check)
    def checked(self: Any, request: Any) -> str | None:
        if request.stream_options is not None and not request.stream:
            return "`stream_options` is only allowed where `stream` is true"
        problem: str | None = check(self, request)
        return problem

    handler._validate_request = checked


def _leave_out_unwanted_usage(*modules: Any) -> None:
    """Has no piece of a stream have a usage where the client says ``include_usage: false``, also
    with ``continuous_usage_stats``."""
    for module in modules:
        include = module.should_include_usage

        @functools.wraps(include)
        def included(options: Any, default: bool, include: Any = include) -> tuple[bool, bool]:
            usage, continuous = include(options, default)
            refused = options is not None and "include_usage" in options.model_fields_set
            return usage, continuous and not (refused and not options.include_usage)

        module.should_include_usage = included


def _tell_reasoning_tokens(protocol: Any, processor: Any) -> None:
    """Has a usage say how many tokens were thoughts where OpenAI says it, too."""
    field = FieldInfo(annotation=CompletionTokensDetails | None, default=None)
    protocol.UsageInfo.__pydantic_fields__["completion_tokens_details"] = field
    protocol.UsageInfo.model_rebuild(force=True)
    models = [one for one in vars(protocol).values() if isinstance(one, type(BaseModel))]
    for model in models:
        if any("UsageInfo" in str(field.annotation) for field in model.model_fields.values()):
            model.model_rebuild(force=True)
    count = processor.calculate_token_usage

    @functools.wraps(count)
    def counted(*arguments: Any, **named: Any) -> Any:
        usage = count(*arguments, **named)
        details = CompletionTokensDetails(reasoning_tokens=usage.reasoning_tokens or 0)
        usage.completion_tokens_details = details
        return usage

    processor.calculate_token_usage = staticmethod(counted)


def _tell_prompt_logprobs(handler: Any) -> None:
    """Has ``logprobs: 0`` with ``echo`` give the prompt's log-probabilities, as any other number
    does."""
    convert = handler._convert_to_internal_request

    @functools.wraps(convert)
    def converted(self: Any, request: Any, *others: Any) -> Any:
        adapted, request = convert(self, request, *others)
        if request.echo and request.logprobs == 0:
            adapted.logprob_start_len = 0
            request.logprobs = True  # SGLang asks from here on whether it is true, not how many
        return adapted, request

    handler._convert_to_internal_request = converted


def _tell_text_offsets(completions: Any) -> None:
    """Has ``/v1/completions`` say where in a choice's text each token begins, which SGLang leaves
    at -1, and report the most likely tokens of nothing but the text's tokens: with ``logprobs: 0``
    each of these alone, which OpenAI always reports."""
    convert = completions.to_openai_style_logprobs

    @functools.wraps(convert)
    def converted(**arguments: Any) -> Any:
        logprobs = convert(**arguments)
        lengths = [len(token) for token in logprobs.tokens]
        logprobs.text_offset = list(accumulate(lengths[:-1], initial=0)) if lengths else []
        del logprobs.top_logprobs[len(lengths) :]
        if not logprobs.top_logprobs:
            pairs = zip(logprobs.tokens, logprobs.token_logprobs, strict=True)
            logprobs.top_logprobs = [
                None if value is None else {token: value} for token, value in pairs
            ]
        return logprobs

    completions.to_openai_style_logprobs = converted
    handler = completions.OpenAIServingCompletion
    stream = handler._generate_completion_stream

    @functools.wraps(stream)
    async def streamed(self: Any, adapted: Any, request: Any, raw: Any) -> AsyncIterator[str]:
        ends: Counter[int] = Counter()
        async with aclosing(stream(self, adapted, request, raw)) as lines:
            async for line in lines:
                wanted = request.logprobs is not None and '"text_offset":[' in line
                yield _moved_offsets(line, ends) if wanted else line

    handler._generate_completion_stream = streamed


def _moved_offsets(line: str, ends: Counter[int]) -> str:
    """One piece of a stream, whose offsets count from its own start, with offsets in the whole
    text; ``ends`` has the length so far of each choice's tokens."""
    piece = json.loads(line.removeprefix("data: "))
    for choice in piece["choices"]:
        if logprobs := choice["logprobs"]:
            start = ends[choice["index"]]
            logprobs["text_offset"] = [start + offset for offset in logprobs["text_offset"]]
            ends[choice["index"]] += sum(map(len, logprobs["tokens"]))
    return f"data: {json.dumps(piece)}\n\n"
