"""Names that SGLang's arguments may have: its parsers, its built-in templates and their styles, and
its sampling parameters with the types of their values.

SGLang has them in modules whose import takes seconds, and finds a wrong name only when the server
is up, or when a request needs it. A test compares these names with SGLang's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# fmt: off
TOOL_CALL_PARSERS = (
    "apertus2509", "cohere_command4", "deepseekv3", "deepseekv31", "deepseekv32", "deepseekv4",
    "deepseekv41", "dots", "gemma4", "gigachat3", "gigachat35", "glm", "glm45", "glm47", "gpt-oss",
    "hermes", "hunyuan", "inkling", "interns1", "iquest_q1", "k2_horizon", "kimi_k2", "kimi_k3",
    "lfm2", "ling3", "llama3", "mimo", "minicpm5", "minimax-m2", "minimax-m3", "mistral", "muse",
    "nanbeige", "poolside_v1", "pythonic", "qwen", "qwen25", "qwen3_coder", "spark25", "step3",
    "step3p5", "trinity",
)
REASONING_PARSERS = (
    "apertus2509", "cohere_command4", "deepseek-r1", "deepseek-v3", "deepseek-v4", "deepseek-v41",
    "dots", "gemma4", "gigachat35", "glm45", "gpt-oss", "granite_thinking_parser", "hunyuan",
    "inkling", "interns1", "iquest_q1", "k2_horizon", "kimi", "kimi_k2", "kimi_k3", "ling3", "mimo",
    "minimax", "minimax-append-think", "minimax-m3", "mistral", "muse", "nanbeige", "nemotron_3",
    "poolside_v1", "qwen3", "qwen3-thinking", "step3", "step3p5",
)
CHAT_TEMPLATES = (
    "chatml", "chatml-llava", "deepseek-ocr", "deepseek-vl2", "devstral", "gemma-it",
    "gme-qwen2-vl", "internlm2-chat", "internvl-2-5", "janus-pro", "kimi-vl", "llama-2", "llama-4",
    "llama_3_vision", "llava_llama_3", "minicpmo", "minicpmv", "mistral", "moss-vl", "paddle-ocr",
    "phi-4-mm", "points-v15-chat", "qwen2-audio", "qwen2-vl", "unlimited-ocr", "vicuna_v1.1",
    "whisper",
)
SEPARATOR_STYLES = (
    "ADD_COLON_SINGLE", "ADD_COLON_SPACE_SINGLE", "ADD_COLON_TWO", "ADD_NEW_LINE_SINGLE", "CHATGLM",
    "CHATGLM3", "CHATINTERN", "CHATML", "DEEPSEEK_CHAT", "DOLLY", "DeepSeekVL2", "FALCON_CHAT",
    "GEMMA3", "LLAMA2", "LLAMA3", "LLAMA4", "METAMATH", "MPT", "NO_COLON_SINGLE", "NO_COLON_TWO",
    "PADDLE_OCR", "PHOENIX", "QWEN2_AUDIO", "QWEN2_VL_EMBED", "ROBIN", "RWKV", "UNLIMITED_OCR",
)
COMPLETION_TEMPLATES = ("deepseek_coder", "qwen_coder", "star_coder")
FIM_POSITIONS = ("END", "MIDDLE")
SAMPLING_PARAMETERS: Mapping[str, Any] = {
    "max_new_tokens": int | None,
    "stop": str | list[str] | None,
    "stop_token_ids": set[int] | None,
    "stop_regex": str | list[str] | None,
    "temperature": float,
    "top_p": float,
    "top_k": int,
    "min_p": float,
    "frequency_penalty": float,
    "presence_penalty": float,
    "repetition_penalty": float,
    "min_new_tokens": int,
    "n": int,
    "beam_width": int | None,
    "json_schema": str | None,
    "regex": str | None,
    "ebnf": str | None,
    "structural_tag": str | None,
    "ignore_eos": bool,
    "skip_special_tokens": bool,
    "spaces_between_special_tokens": bool,
    "no_stop_trim": bool,
    "stream_interval": int | None,
    "logit_bias": dict[str, float] | None,
    "sampling_seed": int | None,
    "custom_params": dict[str, Any] | None,
}
# fmt: on
