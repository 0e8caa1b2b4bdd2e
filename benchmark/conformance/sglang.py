"""SGLang's tests over CrossPool: ``python -m benchmark.conformance.sglang --checkout FOLDER``."""

from __future__ import annotations

import sys

from benchmark.conformance.known import Known
from benchmark.conformance.run import Project, main
from benchmark.conformance.sglang_files import SUITES

KNOWN = (
    Known(
        "test_response_prefill",
        "SmartHome|startswith|matched_stop=",
        "tiny model",
        "It cannot go on with a product's description.",
    ),
    Known(
        "v1Responses::test_response",
        "'incomplete' in|receive a `response.completed` event",
        "tiny model",
        "It writes until the bound on tokens, so that the response is incomplete.",
    ),
    Known(
        "v1Responses::test_penalty",
        "'prompt_tokens' not found",
        "as SGLang",
        "SGLang 0.5.21 counts `input_tokens` in a response's usage, as OpenAI does.",
    ),
    Known(
        "TestAnthropicToolUse::test_tool_(result_multi_turn|use_format)",
        "Expected tool_use",
        "tiny model",
        "It calls no tool unless it must.",
    ),
    Known(
        r"test_programs\.py::test_(few_shot_qa|decode_int|decode_json|expert_answer|tool_use|react)$",
        "washington|hours in a day|JSONDecodeError|paris|Answer: |SyntaxError|'answer'",
        "tiny model",
        "It answers no question, and writes no JSON or Python without a grammar.",
    ),
    Known(
        r"test_programs\.py::test_(image_qa|completion_speculative|hellaswag_select)$",
        ".*",
        "out of scope",
        "The program needs images, an OpenAI backend's counts of tokens, or a data set.",
        run=False,
    ),
    Known(
        r"test_programs\.py::test_stream_logprobs$",
        r"^assert \d+ == \(\d+ - \d+\)",
        "as SGLang",
        "Every piece of a stream of /generate has all log-probabilities so far, as the DSL's texts "
        "need. SGLang runs this program nowhere.",
    ),
    Known(
        "FunctionCalling::test_function_call(_strict|ing_format|ing_streaming_(args_parsing|simple))$",
        "None != 'add'|'NoneType' object is not subscriptable|not found in the streaming chunks"
        "|isinstance\\(None, list\\)",
        "tiny model",
        "It calls no tool unless it must.",
    ),
    Known(
        "TestOpenAIPythonicFunctionCalling::test_pythonic_tool_call_(prompt|streaming)$",
        "No tool_calls found",
        "tiny model",
        "It calls no tool unless it must.",
    ),
    Known(
        "TestToolChoice.*::test_multi_tool_scenario_(auto|required)$",
        "Expected tool calls but got none|Expected 2 tool calls, got 1",
        "tiny model",
        "It calls no tool unless it must, and then one.",
    ),
    Known(
        "::test_detokenize_invalid_tokens$",
        "^AssertionError: 400 != 500",
        "by design",
        "A token id below 0 is refused with 400, where the test wants 500.",
    ),
    Known(
        "TestSchedulerControl::test_abort_all$",
        "'meta_info'",
        "tiny model",
        "The test wants 16,000 tokens, which are more than its context, and is refused.",
    ),
    Known(
        r"test_programs\.py::test_(parallel_encoding|gen_min_new_tokens)$",
        ".*",
        "as SGLang",
        "The program needs a route that SGLang has dropped, or an engine in its own process.",
        run=False,
    ),
    Known(
        "Rerank",
        "chunked-prefill-size|is-embedding",
        "out of scope",
        "CrossPool serves no cross-encoders.",
    ),
    Known(
        "test_finish_stop_eos",
        r"Expected (finish_reason: stop|matched_stop: \[128000)",
        "tiny model",
        "It ends with its own token, or goes on to the bound.",
    ),
    Known(
        "TestLargeMaxNewTokens|TestRequestQueueValidation.*log|TestAbort::test_memory_leak"
        "|TestAbortWithApiKey",
        ".*",
        "out of scope",
        "The test waits for a line of the log of SGLang's scheduler.",
        run=False,
    ),
    Known(
        "[Cc]ustom_?[Ll]ogit_?[Pp]rocessor",
        "custom.logit.processor|'meta_info'",
        "by design",
        "A client's pickled class is never run in the process that computes all models' steps.",
    ),
    Known(
        "Outlines",
        "grammar-backend|outlines",
        "out of scope",
        "Grammars are compiled by xgrammar or llguidance.",
    ),
    Known(
        "(ebnf|regex)",
        "does not match (any of the allowed patterns|regex pattern)|not matching the EBNF",
        "tiny model",
        "It writes a string until the bound on tokens is reached, and the text is cut there.",
    ),
    Known(
        "test_mmlu|TestPyTorchSamplingBackend::test_mmlu",
        "sgl-eval",
        "out of scope",
        "This SGLang has moved that evaluation to another package.",
    ),
    Known(
        "test_pause_resume_in_place",
        r"exception=0 not greater than 0",
        "tiny model",
        "In 24 of 1,600 answers to its prompts the first token was the one that ends them.",
    ),
    Known(
        "TestAbortRequest::test_(batch_requests_with_selective_abort|abort_during_non_streaming_generation)$",
        "'(length|stop)' != 'abort'",
        "tiny model",
        "It has written its answer before the abort comes.",
    ),
    Known(
        "TestSchedulerControl::test_(pause_resume_in_place|duplicate_rid_concurrent_rejected)$",
        "32 not less than 32|One of the concurrent duplicate-rid requests should be rejected",
        "tiny model",
        "On a quiet machine it has written its answers before the pause or the second request.",
    ),
    Known(
        "TestAbortAllWithRetraction",
        "schedule-policy",
        "out of scope",
        "CrossPool has one order of admission and retracts no request.",
    ),
    Known(
        "TestAbortWith(Waiting|Running)Timeout",
        "0 != 1|'object'",
        "out of scope",
        "SGLang's variables for its timeouts have no effect; --queue-timeout is CrossPool's.",
    ),
    Known(
        "TestSRTEndpoint::test_get_server_info$",
        "load_weight",
        "out of scope",
        "Times of phases in which SGLang's scheduler starts, CUDA graphs among them.",
    ),
    Known(
        "TestSRTEndpoint::test_(cache_tokens|forbidden_token|logit_bias|logit_bias_isolation)$",
        "'meta_info'",
        "tiny model",
        "The test's token ids are beyond a vocabulary of 2,048, and are refused.",
    ),
    Known(
        "TestSRTEndpoint::test_(logprob_mixed|logprob_with_chunked_prefill)$",
        "'meta_info'",
        "tiny model",
        "The test's prompts are longer than a context of 4,096 tokens, and are refused.",
    ),
    Known(
        "TestBasicSanity::test_(basic_math|capital_france|color_completion|streaming_response"
        "|concurrent_requests)$",
        "'(391|paris|yellow)' not found in '|correct: ",
        "tiny model",
        "It knows neither capitals nor sums.",
    ),
    Known(
        "TestBasicSanity::test_long_prompt$",
        "400 != 200",
        "tiny model",
        "The test's prompt is longer than its context of 4,096 tokens.",
    ),
    Known(
        "test_accuracy_floor|test_fwd_occupancy",
        "test_hellaswag_select|fwd_occupancy",
        "out of scope",
        "The test is about accuracy, or about a GPU's timers.",
    ),
    Known(
        "TestEnableMetrics::test_(metrics_1gpu|mfu_metrics_gate_disabled)$",
        "'sglang:spec_accept_length' not found",
        "out of scope",
        "The test wants gauges of speculative decoding and CUDA graphs, too.",
    ),
    Known(
        "::test_engine_custom_scheduler_collector",
        "No accelerator",
        "out of scope",
        "The test starts SGLang's own engine, for which this machine has no GPU.",
    ),
    Known(
        "TestLoadSnapshotNormalDP|test_metrics_2gpu",
        "--(dp|tp): ",
        "out of scope",
        "Parallelism follows from the pools' devices.",
    ),
    Known(
        "test_logprob_grammar",
        "False is not true",
        "tiny model",
        "Its vocabulary has no token for ` Yes` or ` No`.",
    ),
)
PROJECT = Project("SGLang", "benchmark.conformance.sglang_plugin", SUITES, KNOWN)

if __name__ == "__main__":
    sys.exit(main(PROJECT))
