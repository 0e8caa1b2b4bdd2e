"""Files of vLLM's tests that are about what a client sees of completions and chats."""

from __future__ import annotations

_OPENAI = "tests/entrypoints/openai"
_CHAT = f"{_OPENAI}/chat_completion"

SUITES: dict[str, tuple[str, ...]] = {
    "completions": (
        f"{_OPENAI}/completion/test_completion.py",
        f"{_OPENAI}/completion/test_prompt_validation.py",
        f"{_OPENAI}/test_chunked_prompt.py",
    ),
    "chats": (
        f"{_CHAT}/test_chat.py",
        f"{_CHAT}/test_chat_completion.py",
        f"{_CHAT}/test_chat_echo.py",
        f"{_CHAT}/test_chat_logit_bias_validation.py",
        f"{_CHAT}/test_enable_force_include_usage.py",
    ),
    "reasoning": (f"{_CHAT}/test_include_reasoning.py",),
    "tools": (f"{_CHAT}/test_completion_with_function_calling.py",),
    "anthropic": ("tests/entrypoints/anthropic/test_messages.py",),
}
"""The files of each suite, from the root of a checkout."""
