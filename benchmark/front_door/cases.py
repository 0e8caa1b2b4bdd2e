"""Requests from which fuzzing begins: valid bodies, and every operation that a server describes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

SAMPLING = {
    "max_new_tokens": 6,
    "temperature": 0.7,
    "top_p": 0.9,
    "top_k": 20,
    "min_p": 0.01,
    "n": 1,
    "stop": ["\n\n"],
    "stop_token_ids": [5],
    "frequency_penalty": 0.1,
    "presence_penalty": 0.1,
    "repetition_penalty": 1.1,
    "min_new_tokens": 1,
    "ignore_eos": False,
    "skip_special_tokens": True,
    "logit_bias": {"7": 1.5},
    "custom_params": {"a": 1},
    "sampling_seed": 3,
}
_GRAMMARS: list[dict[str, Any]] = [
    {"regex": "[a-z]{1,5}"},
    {"ebnf": 'root ::= "a" | "b" root'},
    {"json_schema": '{"type": "object", "properties": {"a": {"type": "integer"}}}'},
]
_TOOL = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Looks a word up.",
        "parameters": {"type": "object", "properties": {"word": {"type": "string"}}},
    },
}
_MESSAGES = [
    {"role": "system", "content": "You explain Python."},
    {"role": "user", "content": [{"type": "text", "text": "What is a module?"}]},
]
_OPENAI = {
    "max_tokens": 6,
    "temperature": 0.7,
    "top_p": 0.9,
    "n": 1,
    "seed": 1,
    "stop": ["zq"],
    "frequency_penalty": 0.1,
    "presence_penalty": 0.1,
    "logit_bias": {"7": 1},
    "user": "someone",
}
_TEXT = "The import statement"

NEVER = {
    "/pause_generation": "stops every model until somebody continues it",
    "/configure_logging": "writes prompts into a folder of the caller's choice",
    "/update_weights_from_disk": "has a folder of the caller's choice served",
    "/update_weight_version": "ends every request before it answers",
    "/start_profile": "writes profiles into a folder of the caller's choice",
}
"""Paths that are fuzzed only where the server refuses them, and what they do by design."""


@dataclass(frozen=True)
class Case:
    """One request of the fuzzer."""

    method: str
    path: str
    body: bytes | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    origin: str = ""
    """What made it."""

    def line(self) -> str:
        """Return it as one line of JSON."""
        body = None if self.body is None else self.body.decode("latin-1")
        fields = [self.method, self.path, body, dict(self.headers), self.origin]
        return json.dumps(fields)


def case_of(line: str) -> Case:
    """Return the case of a :meth:`Case.line`."""
    method, path, body, headers, origin = json.loads(line)
    return Case(method, path, None if body is None else body.encode("latin-1"), headers, origin)


def valid_bodies(models: Sequence[str]) -> list[tuple[str, dict[str, Any]]]:
    """Return paths and bodies that a server should answer, over all ``models``."""
    found: list[tuple[str, dict[str, Any]]] = []
    for model in models:
        chat = {"model": model, "messages": _MESSAGES, **_OPENAI}
        completion = {"model": model, "prompt": _TEXT, **_OPENAI}
        native = f"/m/{model}"
        found += [
            (f"{native}/generate", {"text": _TEXT, "sampling_params": SAMPLING}),
            (
                f"{native}/generate",
                {"input_ids": [5, 6, 7], "sampling_params": SAMPLING, "stream": True, "rid": "r"},
            ),
            (
                f"{native}/generate",
                {
                    "text": [_TEXT, "A module"],
                    "sampling_params": [SAMPLING, SAMPLING],
                    "return_logprob": True,
                    "logprob_start_len": 0,
                    "top_logprobs_num": 2,
                    "token_ids_logprob": [5, 6],
                },
            ),
            *(
                (f"{native}/generate", {"text": _TEXT, "sampling_params": {**SAMPLING, **grammar}})
                for grammar in _GRAMMARS
            ),
            ("/v1/completions", {**completion, "logprobs": 2, "echo": True}),
            ("/v1/completions", {**completion, "stream": True, "suffix": None}),
            ("/v1/completions", {**completion, "prompt": [[5, 6], [7]], **_GRAMMARS[0]}),
            ("/v1/chat/completions", chat),
            (
                "/v1/chat/completions",
                {**chat, "stream": True, "stream_options": {"include_usage": True}},
            ),
            ("/v1/chat/completions", {**chat, "tools": [_TOOL], "tool_choice": "auto"}),
            ("/v1/chat/completions", {**chat, "tools": [_TOOL], "tool_choice": "required"}),
            ("/v1/chat/completions", {**chat, "logprobs": True, "top_logprobs": 2}),
            (
                "/v1/chat/completions",
                {
                    **chat,
                    "response_format": {
                        "type": "json_schema",
                        "json_schema": {"name": "a", "schema": {"type": "object"}},
                    },
                    "chat_template_kwargs": {"enable_thinking": False},
                },
            ),
            (
                "/v1/responses",
                {
                    "model": model,
                    "input": _TEXT,
                    "max_output_tokens": 6,
                    "tools": [],
                    "store": False,
                },
            ),
            (
                "/v1/messages",
                {
                    "model": model,
                    "max_tokens": 6,
                    "messages": [{"role": "user", "content": _TEXT}],
                    "system": "s",
                    "stop_sequences": ["zq"],
                    "temperature": 0.5,
                    "tools": [{"name": "t", "input_schema": {"type": "object"}}],
                },
            ),
            (
                "/v1/messages/count_tokens",
                {"model": model, "messages": [{"role": "user", "content": _TEXT}]},
            ),
            (
                "/api/chat",
                {
                    "model": model,
                    "messages": [{"role": "user", "content": _TEXT}],
                    "stream": False,
                    "options": {"num_predict": 6, "temperature": 0.5},
                },
            ),
            ("/api/generate", {"model": model, "prompt": _TEXT, "options": {"num_predict": 6}}),
            ("/api/show", {"model": model}),
            (f"{native}/v1/tokenize", {"model": model, "prompt": [_TEXT, "a"]}),
            ("/v1/tokenize", {"model": model, "prompt": _TEXT, "add_special_tokens": True}),
            ("/v1/detokenize", {"model": model, "tokens": [[5, 6], [7]]}),
            (
                "/v1/score",
                {"model": model, "query": "a", "items": ["b", "c"], "label_token_ids": [5, 6]},
            ),
            ("/v1/rerank", {"query": "a", "documents": ["b", "c"]}),
            ("/v1/embeddings", {"model": model, "input": _TEXT}),
            ("/v1/classify", {"model": model, "input": _TEXT}),
            ("/abort_request", {"rid": "nobody"}),
            (f"{native}/encode", {"text": _TEXT}),
            (f"{native}/open_session", {"capacity_of_str_len": 100, "session_id": "s"}),
            (f"{native}/close_session", {"session_id": "s"}),
            (
                f"{native}/parse_function_call",
                {"tools": [_TOOL], "text": "a", "tool_call_parser": "qwen25"},
            ),
            (f"{native}/separate_reasoning", {"text": "a", "reasoning_parser": "deepseek-r1"}),
            (f"{native}/vertex_generate", {"instances": [{"text": "a"}], "parameters": {}}),
            ("/invocations", chat),
        ]
    return found


def operations(document: Mapping[str, Any]) -> list[tuple[str, str, list[str]]]:
    """Return method, path and names of the body's members of every operation of an OpenAPI
    ``document``."""
    found = []
    for path, methods in document.get("paths", {}).items():
        for method, operation in methods.items():
            contents = operation.get("requestBody", {}).get("content", {})
            names = [
                name
                for content in contents.values()
                for name in _members(content.get("schema", {}), document)
            ]
            found.append((method.upper(), path, names))
    return found


def _members(schema: Mapping[str, Any], document: Mapping[str, Any]) -> list[str]:
    parts: Iterable[Mapping[str, Any]] = [schema, *schema.get("anyOf", [])]
    names: list[str] = []
    for part in parts:
        name = part.get("$ref", "").rpartition("/")[2]
        whole = document.get("components", {}).get("schemas", {}).get(name, part)
        names += whole.get("properties", {})
    return names
