"""SGLang's server arguments that CrossPool takes, as data.

The launcher makes its command line from :data:`FLAGS`; whatever else SGLang knows is refused by
:func:`reason_refused` with what to do instead. The front end hands the arguments whose
``effect`` is ``sglang`` to SGLang's ``ServerArgs`` under the same name.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec


class SGLangFlag(msgspec.Struct, frozen=True, kw_only=True):
    """One server argument of SGLang."""

    name: str
    """ServerArgs field; the flag is ``--`` and the name with dashes."""
    kind: Literal["str", "int", "float", "bool", "json", "list"]
    """``bool``: a switch without value; ``json``: a JSON text; ``list``: several words."""
    scope: Literal["model", "shared"]
    """``model``: may differ between models; ``shared``: one value for the server."""
    effect: Literal["crosspool", "sglang", "none"]
    """``crosspool``: sets the field of Deployment or ModelConfig of that name
    (``served_model_name`` is ``name``, ``model_path`` is ``path``, ``disable_radix_cache`` is no
    ``prefix_cache``). ``sglang``: goes into their
    ``sglang`` mapping. ``none``: taken so that a command line written for SGLang works, and the
    user is warned with the help text."""
    help: str
    choices: tuple[Any, ...] = ()

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")


def _flags(
    scope: Literal["model", "shared"],
    effect: Literal["crosspool", "sglang", "none"],
    *rows: tuple[str, str, str] | tuple[str, str, str, tuple[Any, ...]],
) -> tuple[SGLangFlag, ...]:
    return tuple(
        msgspec.convert(
            {
                "name": row[0],
                "kind": row[1],
                "scope": scope,
                "effect": effect,
                "help": row[2],
                "choices": row[3] if len(row) > 3 else (),
            },
            SGLangFlag,
        )
        for row in rows
    )


FLAGS: tuple[SGLangFlag, ...] = (
    *_flags(
        "model",
        "crosspool",
        ("model_path", "str", "Local folder with config.json, safetensors and tokenizer."),
        ("served_model_name", "str", "The `model` that clients ask for; default: the folder."),
        ("context_length", "int", "Longest sequence in tokens; default: the config's."),
        ("dtype", "str", "Data type of weights and KV cache.", ("auto", "bfloat16", "float32")),
    ),
    *_flags(
        "shared",
        "crosspool",
        ("host", "str", "Address to listen on."),
        ("port", "int", "Port to listen on."),
        ("page_size", "int", "Tokens per KV page."),
        ("chunked_prefill_size", "int", "Prompt tokens of one step at most."),
        ("max_running_requests", "int", "Requests of one model that run at once, per KV device."),
        ("max_queued_requests", "int", "Requests of one model that wait; more are refused (429)."),
        ("watchdog_timeout", "float", "Seconds after which a silent device counts as dead."),
        ("disable_radix_cache", "bool", "Keep no KV cache for later requests that begin alike."),
        ("random_seed", "int", "Seed from which requests without one get theirs."),
    ),
    *_flags(
        "model",
        "sglang",
        ("tokenizer_path", "str", "Folder of the tokenizer; default: the model's."),
        ("tokenizer_mode", "str", "Fast tokenizer if there is one, or slow.", ("auto", "slow")),
        ("trust_remote_code", "bool", "Run code that the model's folder brings."),
        ("chat_template", "str", "A built-in template's name or a template file."),
        ("hf_chat_template_name", "str", "Which of the tokenizer's named templates to use."),
        ("completion_template", "str", "A built-in completion template's name or a file."),
        ("default_chat_template_kwargs", "json", "Template arguments of every request (JSON)."),
        ("reasoning_parser", "str", "How to tell thinking from answer (deepseek-r1, qwen3, ...)."),
        ("tool_call_parser", "str", "How to read tool calls (qwen25, deepseekv3, glm, ...)."),
        ("preferred_sampling_params", "json", "Sampling that /get_model_info recommends (JSON)."),
        (
            "sampling_defaults",
            "str",
            "Default sampling: OpenAI's, or the model's generation_config.json.",
            ("openai", "model"),
        ),
        ("weight_version", "str", "A name for these weights that answers carry."),
        ("stream_interval", "int", "Tokens between two pieces of a stream."),
    ),
    *_flags(
        "shared",
        "sglang",
        ("api_key", "str", "Key that clients must send as `Authorization: Bearer KEY`."),
        ("admin_api_key", "str", "Key for the management routes."),
        ("grammar_backend", "str", "Grammar library.", ("xgrammar", "none")),
        ("constrained_json_disable_any_whitespace", "bool", "Compact JSON under a schema."),
        ("incremental_streaming_output", "bool", "Streams of /generate carry only what is new."),
        ("stream_response_default_include_usage", "bool", "Every stream ends with its usage."),
        ("batch_notify_size", "int", "Stream notifications batched per event-loop turn."),
        ("enable_cache_report", "bool", "Report cached prompt tokens in the usage."),
        ("allow_auto_truncate", "bool", "Cut an over-long prompt instead of refusing it."),
        ("enable_metrics", "bool", "SGLang's own metrics beside CrossPool's on /metrics."),
        ("log_level", "str", "Level of all loggers."),
        ("log_level_http", "str", "Level of the HTTP server's log."),
        ("log_requests", "bool", "Log every request."),
        ("log_requests_level", "int", "How much of a request to log.", (0, 1, 2, 3)),
        ("log_requests_format", "str", "Format of the request log.", ("text", "json")),
        ("log_requests_target", "list", "stdout and/or folders for the request log."),
        ("skip_server_warmup", "bool", "Do not send a first request to every model."),
    ),
    *_flags(
        "shared",
        "none",
        ("device", "str", "Where models run is said by the pools' devices."),
        ("max_total_tokens", "int", "The KV pool is sized by its bytes."),
        ("max_prefill_tokens", "int", "A step's prompt tokens: --chunked-prefill-size."),
        ("mem_fraction_static", "float", "Pools are sized in bytes, not as a fraction."),
        (
            "schedule_policy",
            "str",
            "Requests of a model start first come, first served.",
            ("fcfs",),
        ),
        ("nnodes", "int", "All devices are on this host.", (1,)),
        ("node_rank", "int", "All devices are on this host.", (0,)),
        ("dist_init_addr", "str", "All devices are on this host."),
    ),
)
BY_NAME: dict[str, SGLangFlag] = {flag.name: flag for flag in FLAGS}

_REASONS: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        ("tp", "tp_size", "tensor_parallel_size", "ep", "ep_size", "expert_parallel_size"),
        "parallelism follows from the weight pool's devices",
    ),
    (
        ("dp", "dp_size", "data_parallel_size", "pp", "pp_size", "pipeline_parallel_size"),
        "parallelism follows from the pools' devices",
    ),
    (("quantization", "kv_cache_dtype", "load_format"), "only bfloat16 and float32 safetensors"),
    (("speculative",), "speculative decoding is not supported"),
    (("lora", "enable_lora", "max_lora", "max_loras"), "LoRA adapters are not supported"),
    (("disaggregation", "encoder"), "prefill-decode disaggregation is not supported"),
    (("enable_hierarchical_cache", "hicache"), "the prefix cache lives in the KV pool only"),
    (("radix",), "the prefix cache gives up the least recently used pages of all models"),
    (("is_embedding",), "only text generation is supported"),
    (
        ("enable_multimodal", "mm", "limit_mm", "image", "video", "audio"),
        "only text generation is supported",
    ),
    (("skip_tokenizer_init",), "the front end needs the tokenizer"),
    (("tokenizer_worker_num", "detokenizer_worker_num"), "one front end process serves all models"),
    (("enable_http2", "ssl", "grpc", "smg"), "put a proxy in front for TLS, HTTP/2 or gRPC"),
    (
        ("cuda_graph", "disable_cuda_graph", "attention_backend", "sampling_backend"),
        "no such backend",
    ),
    (("revision", "download_dir"), "models are local folders"),
    (
        ("json_model_override_args",),
        "ranks read the model's own config.json: change a copy of its folder instead",
    ),
)


def reason_refused(name: str) -> str:
    """Why SGLang's argument ``name`` (a field or a flag) is not taken, for the error message."""
    field = name.lstrip("-").replace("-", "_")
    for prefixes, reason in _REASONS:
        if any(field == prefix or field.startswith(prefix + "_") for prefix in prefixes):
            return reason
    return "CrossPool has no such argument"
