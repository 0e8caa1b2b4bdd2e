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
        "test_too_many_(chat|completion)_logprobs",
        "DID NOT RAISE",
        "as SGLang",
        "SGLang gives more than 20 top log-probabilities; vLLM has a bound to set.",
    ),
    Known(
        r"test_chat\.py::test_chat_streaming",
        r"^assert None .*content=None",
        "as SGLang",
        "The piece that tells why a stream has ended has no content, as in OpenAI's API.",
    ),
    Known(
        r"test_chat\.py::test_chat_completion_stream_options",
        "'NoneType' object has no attribute 'prompt_tokens'",
        "as SGLang",
        "The first piece of a chat's stream and the last have no text, and no usage either.",
    ),
    Known(
        "test_custom_role",
        "'role' must be one of",
        "as SGLang",
        "OpenAI's API has a list of roles, and SGLang takes no others.",
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
        "test_long_seed",
        "'greater_than_equal' in \"Error code: 400",
        "by design",
        "The request is refused with status 400, without the names of pydantic's errors.",
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
        "test_echo_logprob_completion",
        r"<\|endoftext\|><\|endoftext\|>",
        "tiny model",
        "Token 0 of its tokenizer is a special one, which is left out of the echoed text.",
    ),
    Known(
        "test_empty_prompt",
        'Actual message: "Error code: 400',
        "by design",
        "The request is refused with status 400, without vLLM's `prompt_embeds` in its words.",
    ),
    Known(
        "test_chunked_prompt|test_anthropic_streaming_cache_usage",
        "longer than the model's context length",
        "tiny model",
        "The test's prompt is longer than its context.",
    ),
    Known(
        "test_simple_messages",
        "'max_tokens' == 'end_turn'",
        "tiny model",
        "It does not end its answer within 1,024 tokens every time.",
    ),
    Known(
        "test_anthropic_(tool_call|structured_output)",
        "'end_turn' == 'tool_use'|Expecting value",
        "tiny model",
        "It calls no tool unless it must.",
    ),
    Known("test_include_reasoning_false", "when include_reasoning", "out of scope", _OWN_PARAMETER),
    Known(
        "test_function_tool_use.*plain-True",
        "no attribute 'reasoning'|0 > 0",
        "as SGLang",
        "The test reads vLLM's field `reasoning`; SGLang's is `reasoning_content`.",
    ),
    Known(
        "test_function_tool_use|test_named_tool_use",
        r"\.tool_calls$|tool_calls=None|matched_stop=|content='(\\n|\s)",
        "tiny model",
        "It writes `</think>` within a call's arguments, or goes on with text after the call.",
    ),
    Known(
        "test_function_tool_use.*-auto-",
        r"tool_calls=None|len\(\[\]\)",
        "tiny model",
        "It calls no tool unless it must.",
    ),
    Known(
        "enable_force_include_usage",
        "'prompt_tokens'",
        "out of scope",
        "vLLM's flag puts usage into every piece of a stream; SGLang's nearest ends it with usage.",
    ),
)
PROJECT = Project("vLLM", "benchmark.conformance.vllm_plugin", SUITES, KNOWN)

if __name__ == "__main__":
    sys.exit(main(PROJECT))
