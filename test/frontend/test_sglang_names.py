"""The names that are checked before the start are those that SGLang has."""

from __future__ import annotations

from crosspool.config import sglang_names
from crosspool.frontend import compat

compat.install()

from sglang.srt.function_call.function_call_parser import FunctionCallParser  # noqa: E402
from sglang.srt.parser import code_completion_parser, conversation  # noqa: E402
from sglang.srt.parser.reasoning_parser import ReasoningParser  # noqa: E402


def test_parsers_and_templates() -> None:
    assert set(sglang_names.TOOL_CALL_PARSERS) == set(FunctionCallParser.ToolCallParserEnum)
    assert set(sglang_names.REASONING_PARSERS) == set(ReasoningParser.DetectorMap)
    assert set(sglang_names.CHAT_TEMPLATES) == set(conversation.chat_templates)
    assert set(sglang_names.SEPARATOR_STYLES) == set(conversation.SeparatorStyle.__members__)
    assert set(sglang_names.COMPLETION_TEMPLATES) == set(
        code_completion_parser.completion_templates
    )
    assert set(sglang_names.FIM_POSITIONS) == set(code_completion_parser.FimPosition.__members__)
