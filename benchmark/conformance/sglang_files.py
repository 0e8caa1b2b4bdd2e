"""Files of SGLang's tests that are about what a client of its server sees."""

from __future__ import annotations

_OPENAI = "test/registered/openai_server"
_MANUAL = "test/manual"

SUITES: dict[str, tuple[str, ...]] = {
    "basics": (f"{_OPENAI}/basic/test_openai_server.py",),
    "validation": (
        f"{_OPENAI}/validation/test_matched_stop.py",
        f"{_OPENAI}/validation/test_openai_server_ignore_eos.py",
        f"{_OPENAI}/validation/test_request_length_validation.py",
        f"{_OPENAI}/validation/test_large_max_new_tokens.py",
        "test/registered/core/test_request_queue_validation.py",
    ),
    "structured output": (
        f"{_OPENAI}/features/test_json_mode.py",
        f"{_OPENAI}/features/test_openai_server_ebnf.py",
        "test/registered/constrained_decoding/test_constrained_decoding.py",
        f"{_MANUAL}/openai_server/features/test_structural_tag.py",
    ),
    "reasoning": ("test/registered/reasoning/test_reasoning.py",),
    "usage": (
        f"{_MANUAL}/openai_server/features/test_cache_report.py",
        f"{_MANUAL}/openai_server/features/test_continuous_usage_stats.py",
    ),
    "penalties": (
        "test/registered/sampling/test_penalty.py",
        "test/registered/sampling/test_pytorch_sampling_backend.py",
    ),
    "aborts and control": (
        f"{_MANUAL}/entrypoints/http_server/test_abort_request.py",
        "test/registered/scheduler/test_abort_with_metrics.py",
        "test/registered/scheduler/test_scheduler_control.py",
    ),
    "native endpoints": (
        "test/registered/core/test_srt_endpoint.py",
        "test/registered/core/test_basic_sanity.py",
        "test/registered/scheduler/test_load_snapshot_server.py",
    ),
    "metrics": ("test/registered/observability/test_metrics.py",),
    "tools": (
        f"{_OPENAI}/function_call/test_openai_function_calling.py",
        f"{_MANUAL}/openai_server/function_call/test_tool_choice.py",
    ),
    "anthropic": (
        f"{_OPENAI}/basic/test_anthropic_server.py",
        f"{_OPENAI}/function_call/test_anthropic_tool_use.py",
    ),
    "language": (
        "python/sglang/test/test_programs.py",
        f"{_MANUAL}/lang_frontend/test_bind_cache.py",
    ),
}
"""The files of each suite, from the root of a checkout."""
