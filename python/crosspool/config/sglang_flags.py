"""SGLang's server arguments that CrossPool takes beside its own options, as data.

The front end hands those whose ``effect`` is ``sglang`` to SGLang's ``ServerArgs`` under the same
name. Arguments that are options of CrossPool too are rows of :mod:`crosspool.config.options`. All
others are refused by :func:`reason_refused` with what to do instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from crosspool.config.option import Option

_HTTP = "SGLang's front end"
_MODELS = "SGLang's front end, per model"
_IGNORED = "taken from SGLang's command lines, without effect"


def _rows(
    group: str,
    effect: Literal["sglang", "none"],
    *rows: tuple[str, Any, str] | tuple[str, Any, str, int],
    is_secret: bool = False,
) -> tuple[Option, ...]:
    return tuple(
        Option(
            text,
            group,
            name=name,
            type=kind,
            per_model=group == _MODELS,
            effect=effect,
            is_secret=is_secret,
            least=least[0] if least else None,
        )
        for name, kind, text, *least in rows
    )


# fmt: off
FLAGS: tuple[Option, ...] = (
    *_rows(_MODELS, "sglang",
        ("tokenizer_path", str, "Folder of the tokenizer. If none is given, it is the model's."),
        ("tokenizer_mode", Literal["auto", "slow"],
         "Kind of tokenizer: auto is the fast one where the model has it, slow the Python one."),
        ("trust_remote_code", bool, "Run Python code that lies in the model's folder."),
        ("chat_template", str, "Chat template: the name of a built-in one, or a file."),
        ("hf_chat_template_name", str, "Name of the tokenizer's chat template, if it has several."),
        ("completion_template", str, "Completion template: the name of a built-in one, or a file."),
        ("default_chat_template_kwargs", dict[str, Any],
         "Arguments that the chat template gets with every request, as a JSON object."),
        ("reasoning_parser", str,
         "Parser that separates thinking from output: deepseek-r1, qwen3, ..."),
        ("tool_call_parser", str, "Parser of tool calls: qwen25, deepseekv3, glm, ..."),
        ("preferred_sampling_params", dict[str, Any],
         "Sampling parameters that /get_model_info recommends, as a JSON object."),
        ("sampling_defaults", Literal["openai", "model"],
         "Defaults for sampling: those of OpenAI's API, or those of generation_config.json."),
        ("weight_version", str, "Name of these weights, which responses carry."),
        ("stream_interval", int, "Tokens between two pieces of a stream.", 1)),
    *_rows(_HTTP, "sglang",
        ("api_key", str, "Key that clients must send, as `Authorization: Bearer KEY`."),
        ("admin_api_key", str, "Key that the management routes ask for."),
        is_secret=True),
    *_rows(_HTTP, "sglang",
        ("grammar_backend", Literal["xgrammar", "llguidance", "none"],
         "Library that constrains output."),
        ("constrained_json_disable_any_whitespace", bool,
         "Write JSON under a schema without optional whitespace."),
        ("incremental_streaming_output", bool,
         "Send only the new text in each piece of a /generate stream."),
        ("stream_response_default_include_usage", bool,
         "End every stream with its usage, as if include_usage were asked for."),
         ("batch_notify_size", int, "Stream pieces handed over per turn of the event loop.", 1),
         ("enable_response_store", bool,
          "Keep responses of /v1/responses, for previous_response_id, background and retrieval."),
        ("enable_cache_report", bool, "Report cached prompt tokens in the usage of a response."),
        ("allow_auto_truncate", bool, "Cut a prompt that is too long instead of refusing it."),
        ("enable_metrics", bool, "Show SGLang's own metrics beside CrossPool's on /metrics."),
        ("enable_trace", bool,
         "Send an OpenTelemetry trace of every request; needs pip install 'crosspool[otel]'."),
        ("otlp_traces_endpoint", str,
         "Collector to which traces go, by OTLP over gRPC, as HOST:PORT; localhost:4317 if none is "
         "given."),
        ("otlp_service_name", str,
         "Name of the service in traces; OTEL_SERVICE_NAME or crosspool if none is given."),
        ("log_level", str, "Level of all loggers: debug, info, warning, error."),
        ("log_level_http", str, "Level of the HTTP server's logger."),
        ("log_requests", bool, "Log every request."),
        ("log_requests_level", Literal[0, 1, 2, 3],
         "How much of a request is logged: 0 is metadata, 3 everything."),
        ("log_requests_format", Literal["text", "json"], "Format of the request log."),
        ("log_requests_target", list[str], "Where requests are logged: stdout, folders, or both."),
        ("skip_server_warmup", bool, "Send no first request to each model.")),
    *_rows(_IGNORED, "none",
        ("device", str, "The pools' devices say where models run."),
        ("enable_custom_logit_processor", bool,
         "A processor is code of a client; requests that bring one are refused."),
        ("max_total_tokens", int, "The KV pool is sized by --kv-pool-bytes."),
        ("max_prefill_tokens", int, "--chunked-prefill-size bounds the prompt tokens of a step."),
        ("mem_fraction_static", float, "The pools are sized in bytes, not as a fraction."),
        ("schedule_policy", Literal["fcfs"],
         "Requests of a model are admitted in the order in which they come.")),
)

_REASONS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("tp", "tp_size", "tensor_parallel_size", "ep", "ep_size", "expert_parallel_size"),
     "parallelism follows from the weight pool's devices"),
    (("dp", "dp_size", "data_parallel_size", "pp", "pp_size", "pipeline_parallel_size"),
     "parallelism follows from the pools' devices"),
    (("load_format",), "the path tells: a folder of safetensors, or a GGUF file"),
    (("speculative",), "speculative decoding is not supported"),
    (("lora", "enable_lora", "max_lora", "max_loras"), "LoRA adapters are not supported"),
    (("disaggregation", "encoder"), "prefill-decode disaggregation is not supported"),
    (("enable_hierarchical_cache", "hicache"), "the prefix cache lives in the KV pool only"),
    (("radix",), "the prefix cache gives up the least recently used pages of all models"),
    (("is_embedding",), "only text generation is supported"),
    (("enable_multimodal", "mm", "limit_mm", "image", "video", "audio"),
     "only text generation is supported"),
    (("skip_tokenizer_init",), "the front end needs the tokenizer"),
    (("tokenizer_worker_num", "detokenizer_worker_num"), "one front end process serves all models"),
    (("enable_http2", "ssl", "grpc", "smg"), "put a proxy in front for TLS, HTTP/2 or gRPC"),
    (("cuda_graph", "disable_cuda_graph", "attention_backend", "sampling_backend"),
     "CrossPool has its own kernels and no other backend"),
    (("revision", "download_dir"), "models are local folders"),
    (("json_model_override_args",),
     "ranks read the model's own config.json: change a copy of its folder instead"),
)
# fmt: on
BY_NAME: dict[str, Option] = {flag.name: flag for flag in FLAGS}

HIDDEN = "***"
"""What stands where the value of a secret would."""


def without_secrets(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments as SGLang may have them, and whoever asks it: secrets that are set are
    :data:`HIDDEN`. SGLang shows its arguments in answers and writes them into dumps."""
    secrets = {flag.name for flag in FLAGS if flag.is_secret}
    return {
        name: HIDDEN if value and name in secrets else value for name, value in arguments.items()
    }


def reason_refused(name: str) -> str:
    """Why SGLang's argument ``name`` (a field or a flag) is not taken, for the error message."""
    field = name.lstrip("-").replace("-", "_")
    for prefixes, reason in _REASONS:
        if any(field == prefix or field.startswith(prefix + "_") for prefix in prefixes):
            return reason
    return "CrossPool has no such argument"
