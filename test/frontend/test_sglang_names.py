"""The names that are checked before the start are those that SGLang has."""

from __future__ import annotations

from typing import Any

import msgspec
from crosspool.config import sglang_names
from crosspool.frontend import compat
from msgspec.inspect import type_info

compat.install()

from sglang.srt.function_call.function_call_parser import FunctionCallParser  # noqa: E402
from sglang.srt.parser import code_completion_parser, conversation  # noqa: E402
from sglang.srt.parser.reasoning_parser import ReasoningParser  # noqa: E402
from sglang.srt.sampling.sampling_params import SamplingParams  # noqa: E402

INTERNAL = {
    "stop_strs",
    "stop_regex_strs",
    "stop_str_max_len",
    "stop_regex_max_len",
    "is_normalized",
    "ebnf_full_assistant",
}
"""Fields that SGLang fills in itself."""


def test_parsers_and_templates() -> None:
    assert set(sglang_names.TOOL_CALL_PARSERS) == set(FunctionCallParser.ToolCallParserEnum)
    assert set(sglang_names.REASONING_PARSERS) == set(ReasoningParser.DetectorMap)
    assert set(sglang_names.CHAT_TEMPLATES) == set(conversation.chat_templates)
    assert set(sglang_names.SEPARATOR_STYLES) == set(conversation.SeparatorStyle.__members__)
    assert set(sglang_names.COMPLETION_TEMPLATES) == set(
        code_completion_parser.completion_templates
    )
    assert set(sglang_names.FIM_POSITIONS) == set(code_completion_parser.FimPosition.__members__)


def test_sampling_parameters() -> None:
    kinds = {
        field.name: field.type
        for field in msgspec.structs.fields(SamplingParams)
        if field.name not in INTERNAL
    }
    kinds["custom_params"] = dict[str, Any] | None  # what may be in it is the scheduler's to say
    ours = sglang_names.SAMPLING_PARAMETERS
    assert {name: type_info(kind) for name, kind in kinds.items()} == {
        name: type_info(kind) for name, kind in ours.items()
    }
