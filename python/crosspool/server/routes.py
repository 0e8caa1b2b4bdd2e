"""Every route of the server: who may call it, and who answers.

The table is looked at before any application sees a request, and a path that it lacks is refused.
``test/server/test_routes.py`` compares it with what SGLang's application mounts and with the table
in ``docs/serving.md``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from starlette.routing import compile_path

from crosspool.server.errors import RequestError

Caller = Literal["anyone", "client", "observer", "admin"]
"""Who may call a route; :class:`crosspool.server.keys.Keys` says what each must show."""
Answerer = Literal["server", "either", "model", "every model", "nobody"]
"""Who answers: CrossPool itself; CrossPool, and under ``/m/<model>/`` that model's application; a
model's application; those of all models where none is named; or nobody, since CrossPool does not
support it."""

DEFAULT_MODEL = "default"
"""The name that SGLang's own clients give to the model of a server that has one."""


@dataclass(frozen=True)
class RouteRule:
    path: str
    """Written as Starlette writes paths: ``/v1/models/{name:path}``."""
    methods: tuple[str, ...]
    caller: Caller
    answerer: Answerer
    reason: str = ""
    """Why nobody answers."""

    def fits(self, path: str, *, of_model: bool) -> bool:
        """Whether it is the rule of ``path``, which with ``of_model`` lies under ``/m/<model>``."""
        if of_model and self.answerer == "server":
            return False
        return self._pattern.fullmatch(path) is not None

    @property
    def _pattern(self) -> re.Pattern[str]:
        return _PATTERNS[self.path]


_GET = ("GET",)
_SEEN = ("GET", "HEAD")
_POST = ("POST",)
_PUT = ("POST", "PUT")
_DO = ("GET", "POST")
_ANY = ("GET", "POST", "PUT", "DELETE")


def _rules(
    caller: Caller, answerer: Answerer, methods: tuple[str, ...], *paths: str, reason: str = ""
) -> Iterator[RouteRule]:
    for path in paths:
        yield RouteRule(path, methods, caller, answerer, reason)


def _nobody(reason: str, *paths: str) -> Iterator[RouteRule]:
    return _rules("client", "nobody", _ANY, *paths, reason=reason)


# fmt: off
ROUTES: tuple[RouteRule, ...] = (
    *_rules("anyone", "either", _SEEN,
        "/health", "/ready", "/ping", "/health_generate", "/metrics"),
    *_rules("anyone", "server", _SEEN, "/ui", "/ui/{file}"),
    *_rules("client", "either", _SEEN, "/v1/models", "/v1/models/{name:path}", "/api/tags"),
    *_rules("observer", "server", _SEEN,
        "/crosspool/status", "/crosspool/pools", "/crosspool/tensors", "/crosspool/counters",
        "/crosspool/histograms", "/crosspool/models"),
    *_rules("admin", "server", _POST, "/crosspool/models"),
    *_rules("admin", "server", _POST, "/crosspool/trace/start", "/crosspool/trace/stop",
        "/crosspool/models/{name:path}/sleep", "/crosspool/models/{name:path}/wake",
        "/crosspool/models/{name:path}/pin"),
    *_rules("admin", "server", ("DELETE",), "/crosspool/models/{name:path}"),

    *_rules("client", "model", _SEEN,
        "/", "/openapi.json", "/docs", "/docs/oauth2-redirect", "/redoc"),
    *_rules("client", "model", _GET,
        "/get_model_info", "/model_info", "/get_server_info", "/server_info", "/v1/loads",
        "/v1/responses/{response_id}"),
    *_rules("client", "model", _POST,
        "/v1/completions", "/v1/chat/completions", "/v1/score", "/v1/decisions", "/v1/systemone",
        "/v1/responses", "/v1/responses/{response_id}/cancel",
        "/v1/messages", "/v1/messages/count_tokens",
        "/api/chat", "/api/generate", "/api/show", "/invocations", "/vertex_generate",
        "/tokenize", "/v1/tokenize", "/detokenize", "/v1/detokenize",
        "/parse_function_call", "/separate_reasoning"),
    *_rules("client", "model", _PUT, "/generate"),
    *_rules("client", "every model", _POST, "/abort_request"),

    *_rules("admin", "every model", _DO, "/configure_logging", "/flush_cache", "/freeze_gc"),
    *_rules("admin", "every model", _POST, "/continue_generation", "/pause_generation"),
    *_rules("observer", "either", _GET, "/is_sleeping"),
    *_rules("admin", "either", _POST, "/sleep", "/wake_up"),
    *_rules("admin", "either", _DO, "/release_memory_occupation", "/resume_memory_occupation"),
    *_rules("admin", "model", _POST, "/update_weight_version", "/update_weights_from_disk"),

    *_nobody("only text generation is supported",
        "/classify", "/encode", "/v1/audio/transcriptions", "/v1/classify", "/v1/embeddings",
        "/v1/realtime", "/v1/rerank"),
    *_nobody("LoRA adapters are not supported",
        "/load_lora_adapter", "/load_lora_adapter_from_tensors", "/unload_lora_adapter"),
    *_nobody("weights are read from a folder alone: POST /update_weights_from_disk",
        "/begin_weight_update", "/destroy_weights_update_group", "/end_weight_update",
        "/get_remote_instance_transfer_engine_info", "/get_weights_by_name",
        "/init_weights_send_group_for_remote_instance", "/init_weights_update_group",
        "/remote_instance_transfer_engine_info", "/send_weights_to_remote_instance",
        "/update_weights_from_distributed", "/update_weights_from_ipc",
        "/update_weights_from_tensor", "/weights_checker"),
    *_nobody("the prefix cache lives in the KV pool only",
        "/hicache/storage-backend", "/hicache/storage-backend/clear"),
    *_nobody("sessions are not supported; the prefix cache keeps what requests have in common",
        "/open_session", "/close_session"),
    *_nobody("speculative decoding is not supported",
        "/add_external_corpus", "/list_external_corpora", "/remove_external_corpus"),
    *_nobody("there is no torch profiler; POST /crosspool/trace/start records lane events",
        "/start_profile", "/stop_profile"),
    *_nobody("--enable-trace traces every request, and the client's traceparent says of which",
        "/set_trace_level"),
    *_nobody("parallelism follows from the pools' devices",
        "/dump_expert_distribution_record", "/is_scaling_elastic_ep", "/pd_role_switch",
        "/scale_elastic_ep", "/start_expert_distribution_record",
        "/stop_expert_distribution_record"),
    *_nobody("options are set when the server starts", "/set_internal_state", "/slow_down"),
)
# fmt: on
_PATTERNS = {rule.path: compile_path(rule.path)[0] for rule in ROUTES}


def find(method: str, path: str, *, of_model: bool) -> RouteRule:
    """The rule of a request; ``path`` is decoded and, with ``of_model``, what follows
    ``/m/<model>``. Raises RequestError where there is none."""
    rules = [rule for rule in ROUTES if rule.fits(path, of_model=of_model)]
    if not rules:
        raise RequestError(404, f"there is no route {path[:200]!r}{_like(path)}", "no_such_route")
    for rule in rules:
        if method in rule.methods or rule.answerer == "nobody":
            return rule
    allowed = ", ".join(dict.fromkeys(method for rule in rules for method in rule.methods))
    text = f"{rules[0].path} takes {allowed}, not {method}"
    raise RequestError(405, text, headers={"allow": allowed})


def _like(path: str) -> str:
    """The routes that begin like ``path``, for a message."""
    first = path.split("/")[1] if path.startswith("/") else ""
    found = sorted(rule.path for rule in ROUTES if first and rule.path.startswith(f"/{first}/"))
    return f"; there are {', '.join(found)}" if found else ""


def split(path: str, models: Iterable[str]) -> tuple[str, str]:
    """The model that ``path`` begins with, and the path within its application. Names may have
    slashes: the longest that fits is meant. Where none fits, it is the first part of the path."""
    fitting = (name for name in models if f"{path}/".startswith(f"{name}/"))
    name = max(fitting, key=len, default=path.partition("/")[0])
    return name, "/" + path.removeprefix(name).removeprefix("/")
