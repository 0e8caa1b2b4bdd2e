"""vLLM's tests of completions and chats over CrossPool:
``python -m benchmark.conformance.vllm --checkout FOLDER``."""

from __future__ import annotations

import sys

from benchmark.conformance.known import Known
from benchmark.conformance.run import Project, main
from benchmark.conformance.vllm_files import SUITES

_OWN_PARAMETER = "The test is about a parameter of vLLM's own, which SGLang's API does not have."

KNOWN = (
    Known(
        ".*",
        "is vLLM's, which is not installed|'_Absent'|Mock object|_StandIn",
        "out of scope",
        "The test is about vLLM's classes, not about a server.",
    ),
    Known(
        "truncation_side|logprob_token_ids|prompt_logprobs|invalid_(json_schema|regex|grammar)"
        "|empty_grammar|test_structured_outputs_|bad_words",
        r"token_id:|has no attribute 'prompt_logprobs'|DID NOT RAISE|^assert \[0, 1, 2"
        "|Expecting value"
        "|fixture 'sample_(structured_outputs_choices|regex)' not found",
        "out of scope",
        _OWN_PARAMETER,
    ),
    Known("test_top_logprobs", "got -1", "out of scope", _OWN_PARAMETER),
    Known("echo_and_continue", r"ChatCompletionMessage\(content=", "out of scope", _OWN_PARAMETER),
    Known(
        "test_too_many_chat_logprobs",
        "DID NOT RAISE",
        "as SGLang",
        "SGLang has no bound of 20 top log-probabilities.",
    ),
    Known(
        r"test_chat\.py::test_chat_streaming",
        r"^assert None .*content=None",
        "as SGLang",
        "The piece that tells why a stream has ended has no content.",
    ),
    Known(
        "test_custom_role",
        "'role' must be one of",
        "as SGLang",
        "SGLang knows the roles that OpenAI has, and no others.",
    ),
    Known(
        "test_single_chat_session",
        "== CompletionUsa",
        "tiny model",
        "Its tokenizer makes other tokens of the prompt than 37.",
    ),
    Known(
        "test_response_format_json_(object|schema)$|test_complex_message_content$",
        r"^AssertionError: \{'|== '2'",
        "tiny model",
        "It does not know what 1 + 1 is.",
    ),
    Known(
        "test_named_tool_use",
        "'NoneType' object is not subscriptable",
        "tiny model",
        "It does not end its thinking, which the server's reasoning parser waits for.",
    ),
    Known(
        r"test_messages\.py::test_anthropic_streaming$",
        r"^AssertionError: assert 1 > 5 .*cache_read_input_tokens=12",
        "as SGLang",
        "As in Anthropic's API, `input_tokens` are those that were not read from the cache.",
    ),
    Known(
        "test_long_seed",
        "'greater_than_equal' in \"Error code: 400",
        "by design",
        "The request is refused with status 400, in other words than vLLM's.",
    ),
    Known("test_batch_completions", "beam search", "out of scope", _OWN_PARAMETER),
    Known(
        ".*",
        "--enable-per-request-metrics|--watermark-config",
        "out of scope",
        "The server is asked for a feature of vLLM's own.",
    ),
    Known(
        "test_single_completion",
        "== 5",
        "tiny model",
        "Its tokenizer makes nine tokens of the prompt, not five.",
    ),
    Known(
        "test_empty_prompt",
        'Actual message: "Error code: 400',
        "by design",
        "The request is refused with status 400, in other words than vLLM's.",
    ),
    Known(
        "test_chunked_prompt|test_anthropic_streaming_cache_usage",
        "longer than the model's context length",
        "tiny model",
        "The test's prompt is longer than its context.",
    ),
    Known(
        "test_anthropic_(tool_call|structured_output)",
        "'end_turn' == 'tool_use'|Expecting value",
        "tiny model",
        "It calls no tool unless it must.",
    ),
    Known(
        "test_function_tool_use|test_include_reasoning|test_reasoning_tokens_in_usage",
        "'reasoning'|0 > 0|assert ''|assert not '|None is not None",
        "as SGLang",
        "The test reads vLLM's field `reasoning`, or waits for a tiny model to end its thinking.",
    ),
    Known(
        "test_function_tool_use",
        "tool_calls=None",
        "tiny model",
        "It calls no tool unless it must.",
    ),
    Known(
        "enable_force_include_usage",
        "'prompt_tokens'",
        "as SGLang",
        "The flag ends a stream with its usage; vLLM's puts usage into every piece.",
    ),
)
PROJECT = Project("vLLM", "benchmark.conformance.vllm_plugin", SUITES, KNOWN)

if __name__ == "__main__":
    sys.exit(main(PROJECT))
