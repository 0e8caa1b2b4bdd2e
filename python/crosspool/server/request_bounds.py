"""Sizes of what a request asks for, checked before SGLang works on it.

The fields of all APIs that SGLang serves are checked by name: a name means the same in each.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from crosspool.config.deployment import Deployment
from crosspool.server.errors import RequestError

if TYPE_CHECKING:
    from crosspool.frontend.model_app import ModelApp

_PROMPTS = frozenset(
    {"documents", "input", "input_ids", "items", "prompt", "query", "text", "tokens"}
)
"""Fields that hold one prompt, as text or token ids, or a list of prompts."""
_SAMPLES = frozenset({"n", "best_of"})
_STOPS = frozenset({"stop", "stop_sequences", "stop_regex"})
_IDS = frozenset(
    {
        "cache_salt",
        "conversation_id",
        "extra_key",
        "previous_response_id",
        "prompt_cache_key",
        "request_id",
        "rid",
        "routing_key",
        "safety_identifier",
        "session_id",
        "user",
    }
)


@dataclass(frozen=True)
class RequestBounds:
    """What one request of one model may ask for."""

    context: int
    """The model's longest sequence, in tokens."""
    text_bytes: int
    """Bytes of the longest text that fits into the context."""
    vocabulary: int
    """Number of token ids, which go from 0 on."""
    list_entries: int
    tools: int
    samples: int
    stop_bytes: int
    id_bytes: int

    @classmethod
    def of(cls, deployment: Deployment, model: ModelApp) -> RequestBounds:
        return cls(
            context=model.context_length,
            text_bytes=model.context_length * model.longest_token,
            vocabulary=model.vocabulary,
            list_entries=deployment.max_list_entries,
            tools=deployment.max_tools,
            samples=deployment.max_samples,
            stop_bytes=deployment.max_stop_bytes,
            id_bytes=deployment.max_id_bytes,
        )

    def check(self, body: dict[str, Any]) -> None:
        """Raises RequestError with status 400 or 413, naming the field and the bound, for a decoded
        ``body`` that asks for more."""
        self._check_length("body", body)
        if body.get("messages") == []:
            raise _refused("`messages` must have at least one message")
        prompts, samples = 1, 1
        for name, fields in _groups(body, self.samples):
            for key, value in fields.items():
                field = f"{name}{key}"
                if value is None or (not name and key in ("sampling_params", "options")):
                    continue
                if key in _SAMPLES:
                    samples = max(samples, self._sample_count(field, value))
                elif key == "logit_bias":
                    self._check_biases(field, value)
                elif key in _STOPS:
                    self._check_stops(field, value)
                elif key == "tools" and not name:
                    self._check_tools(value)
                elif key in _IDS:
                    self._check_id(field, value)
                elif key in _PROMPTS and not name:
                    prompts = max(prompts, self._prompt_count(field, value))
                else:
                    self._check_any(field, value)
        if prompts * samples > self.samples:
            raise _refused(
                f"{prompts} prompts times `n` = {samples} are more than {self.samples} outputs"
            )

    def _sample_count(self, field: str, value: Any) -> int:
        if type(value) is not int:
            raise _refused(f"`{field}` must be an integer")
        if not 1 <= value <= self.samples:
            raise _refused(f"`{field}` must be from 1 to {self.samples}, got {value}")
        return value

    def _check_biases(self, field: str, value: Any) -> None:
        self._check_any(field, value)
        keys = value if isinstance(value, dict) else ()
        wrong = [repr(key[:20]) for key in keys if not (key.isascii() and key.isdigit())]
        if wrong:
            named = ", ".join(wrong[:5] + ["..."] * (len(wrong) > 5))
            raise _refused(f"`{field}` has as keys {named}; keys must be token ids")

    def _check_tools(self, tools: Any) -> None:
        self._check_any("tools", tools)
        if not isinstance(tools, list):
            raise _refused("`tools` must be a list")
        if len(tools) > self.tools:
            raise _refused(f"`tools` has {len(tools)} tools; at most {self.tools} are allowed")
        for index, tool in enumerate(tools):
            given = tool if isinstance(tool, dict) else {}
            function = given.get("function")
            holder = function if isinstance(function, dict) else given
            parameters = holder.get("parameters")
            if parameters is not None and not isinstance(parameters, dict):
                where = "" if holder is given else ".function"
                raise _refused(f"`tools[{index}]{where}.parameters` must be an object")

    def _check_stops(self, field: str, value: Any) -> None:
        stops = value if isinstance(value, list) else [value]
        self._check_length(field, stops)
        if not all(isinstance(stop, str) for stop in stops):
            raise _refused(f"`{field}` must be a string or a list of strings")
        total = sum(_size(stop) for stop in stops)
        if total > self.stop_bytes:
            raise _refused(f"`{field}` has {total} bytes; at most {self.stop_bytes} are allowed")

    def _check_id(self, field: str, value: Any) -> None:
        ids = value if isinstance(value, list) else [value]
        self._check_length(field, ids)
        for one in ids:
            if isinstance(one, str) and _size(one) > self.id_bytes:
                raise _refused(
                    f"`{field}` has {_size(one)} bytes; at most {self.id_bytes} are allowed"
                )

    def _prompt_count(self, field: str, value: Any) -> int:
        """Number of prompts in ``value``."""
        if not isinstance(value, list):
            self._check_any(field, value)
            return 1
        if value and _are_ids(field, value):
            self._check_token_ids(field, value)
            return 1
        if value and isinstance(value[0], dict):  # messages, or documents with a text each
            self._check_any(field, value)
            return 1
        if len(value) > self.samples:
            raise _refused(
                f"`{field}` has {len(value)} prompts; at most {self.samples} are allowed"
            )
        for index, one in enumerate(value):
            if isinstance(one, list) and one and _are_ids(field, one):
                self._check_token_ids(f"{field}[{index}]", one)
            else:
                self._check_any(f"{field}[{index}]", one)
        return len(value)

    def _check_token_ids(self, field: str, ids: list[Any]) -> None:
        if len(ids) > self.context:
            raise _refused(
                f"`{field}` has {len(ids)} tokens, more than the model's context of "
                f"{self.context} tokens"
            )
        for index, token in enumerate(ids):
            if type(token) is not int:
                raise _refused(f"`{field}[{index}]` must be an integer")
            if not 0 <= token < self.vocabulary:
                raise _refused(
                    f"`{field}[{index}]` is {token}, which is out of vocabulary; "
                    f"ids go from 0 to {self.vocabulary - 1}"
                )

    def _check_any(self, field: str, value: Any) -> None:
        left, text = [value], 0
        while left:
            value = left.pop()
            if isinstance(value, str):
                text += len(value) if value.isascii() else _size(value)
            elif isinstance(value, dict | list):
                self._check_length(field, value)
                left.extend(value.values() if isinstance(value, dict) else value)
        if text > self.text_bytes:
            raise RequestError(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                f"`{field}` has {text} bytes of text; the model's context of {self.context} "
                f"tokens cannot hold more than {self.text_bytes}",
            )

    def _check_length(self, field: str, value: dict[str, Any] | list[Any]) -> None:
        if len(value) > self.list_entries:
            raise _refused(
                f"`{field}` has a list or an object with {len(value)} entries; "
                f"at most {self.list_entries} are allowed"
            )


def _groups(body: dict[str, Any], most: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects with fields that have a meaning of their own, and what comes before the fields'
    names."""
    yield "", body
    for key in ("sampling_params", "options"):
        value = body.get(key)
        if isinstance(value, dict):
            yield f"{key}.", value
        elif isinstance(value, list):
            if len(value) > most:
                raise _refused(f"`{key}` has {len(value)} entries; at most {most} are allowed")
            for index, one in enumerate(value):
                if not isinstance(one, dict):
                    raise _refused(f"`{key}[{index}]` must be an object")
                yield f"{key}[{index}].", one
        elif value is not None:
            raise _refused(f"`{key}` must be an object")


def _size(text: str) -> int:
    return len(text.encode("utf-8", "surrogatepass"))


def _refused(message: str) -> RequestError:
    return RequestError(HTTPStatus.BAD_REQUEST, message)


def _are_ids(field: str, values: list[Any]) -> bool:
    """Whether a list that is not empty has token ids. ``tokens`` can hold nothing else, and SGLang
    would take strings there, of any number of digits."""
    return type(values[0]) is int or (field == "tokens" and not isinstance(values[0], list))
