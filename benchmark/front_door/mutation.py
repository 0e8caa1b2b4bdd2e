"""Makes requests that no client would send from requests that one would."""

from __future__ import annotations

import copy
import itertools
import json
import random
import string
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from benchmark.front_door.cases import SAMPLING, Case

_METHODS = ("GET", "POST", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS")
_NUMBERS: tuple[float, ...] = (
    *(0, -1, 1, 2, 127, 128, 255, 1000, 2**31 - 1, 2**31, -(2**31) - 1, 2**63 - 1, 2**63, 2**64),
    *(-(2**63) - 1, 10**30, 10**400, 0.5, -0.5, 1e-320, 1e308, -0.0, 3.0),
    *(float("nan"), float("inf"), float("-inf")),
)
_TEXTS = (
    *("", " ", "a", "\x00", "\ud800", "\U0010ffff", "é" * 50, "\u202e", "null", "true", "1", "1e5"),
    *("{}", "[a-", "(?P<", '{"type": "object"}', "root ::= root", "root ::= ", "$", "auto", "none"),
    *("x" * 5000, "../../etc/passwd", "%00", "http://127.0.0.1:1/", "{{ 1 / 0 }}", "json_object"),
)
_TYPES = (
    "application/json",
    "text/plain",
    "",
    "application/x-www-form-urlencoded",
    "multipart/form-data",
)
_MOST_PLACES = 2000
"""Places from which on a body is large enough: what repeats in what repeats can have millions."""
_LONGEST_REPEATED = 10_000
"""Characters of JSON up to which a value is repeated."""
_MAX_TOKENS = ("max_tokens", "max_new_tokens", "max_completion_tokens", "max_output_tokens")


class Mutator:
    """Draws cases from ``seeds``, pairs of a path and a valid body, and from ``operations``."""

    def __init__(
        self,
        rng: random.Random,
        seeds: Sequence[tuple[str, dict[str, Any]]],
        operations: Sequence[tuple[str, str, Sequence[str]]],
    ) -> None:
        self._rng = rng
        self._seeds = seeds
        self._operations = operations
        named = {name for _, _, members in operations for name in members}
        self._names = sorted(named | SAMPLING.keys())
        self._changes: tuple[Callable[[Any, Any], None], ...] = (
            self._replace,
            self._replace,
            self._drop,
            self._add,
            self._wrap,
            self._move,
            self._repeat,
        )

    def draw(self) -> Case:
        """Return one request."""
        kind = self._rng.random()
        if kind < 0.08:
            return self._of_operation()
        path, body = self._rng.choice(self._seeds)
        body = copy.deepcopy(body)
        for _ in range(self._rng.choice((0, 1, 1, 1, 2, 2, 3, 6))):
            self._change(body)
        data = self._encoded(body)
        headers = {"Content-Type": "application/json"}
        if kind < 0.16:
            data = self._garbled(data)
        elif kind < 0.2:
            path = self._other_path(path)
        elif kind < 0.24:
            headers |= self._other_headers()
        method = self._rng.choice(_METHODS) if kind > 0.98 else "POST"
        return Case(method, path, data, headers, "mutated")

    def value(self, depth: int = 0) -> Any:
        """Return any JSON value."""
        kind = self._rng.randrange(8 if depth < 3 else 5)
        if kind == 0:
            return self._rng.choice((None, True, False))
        if kind in (1, 2):
            return self._rng.choice(_NUMBERS)
        if kind in (3, 4):
            return self._rng.choice(_TEXTS)
        members = range(self._rng.choice((0, 1, 2, 5)))
        if kind == 5:
            return [self.value(depth + 1) for _ in members]
        if kind == 6:
            return {self._name(): self.value(depth + 1) for _ in members}
        return _nested(self._rng.choice((3, 30, 300)), self._rng.random() < 0.5)

    # --- changes of a body

    def _change(self, body: dict[str, Any]) -> None:
        places = list(itertools.islice(_places(body), _MOST_PLACES)) or [(body, self._name())]
        if len(places) == _MOST_PLACES:
            return
        holder, key = self._rng.choice(places)
        self._rng.choice(self._changes)(holder, key)

    def _replace(self, holder: Any, key: Any) -> None:
        holder[key] = self.value()

    def _drop(self, holder: Any, key: Any) -> None:
        # A request without a bound may generate for long, which is no fault.
        if key not in _MAX_TOKENS and (isinstance(holder, list) or key in holder):
            del holder[key]

    def _add(self, holder: Any, key: Any) -> None:
        if isinstance(holder, dict):
            holder[self._name()] = self.value()
        else:
            holder.insert(key, self.value())

    def _wrap(self, holder: Any, key: Any) -> None:
        value = holder.get(key) if isinstance(holder, dict) else holder[key]
        holder[key] = self._rng.choice(([value], {"a": value}, [value, value], str(value)))

    def _move(self, holder: Any, key: Any) -> None:
        if isinstance(holder, dict) and key in holder:
            holder[self._name()] = holder[key]

    def _repeat(self, holder: Any, key: Any) -> None:
        value = holder.get(key) if isinstance(holder, dict) else holder[key]
        if isinstance(value, str | list) and len(json.dumps(value)) < _LONGEST_REPEATED:
            holder[key] = value * self._rng.choice((2, 50))

    def _name(self) -> str:
        if self._rng.random() < 0.1:
            return self._rng.choice(_TEXTS)
        return self._rng.choice(self._names)

    # --- changes of what is sent

    def _encoded(self, body: Any) -> bytes:
        text = json.dumps(body, ensure_ascii=self._rng.random() < 0.5)
        return text.encode("utf-8", "surrogatepass")

    def _garbled(self, data: bytes) -> bytes:
        where = self._rng.randrange(len(data) + 1)
        kind = self._rng.randrange(5)
        if kind == 0:
            return data[:where]
        if kind == 1:
            return data[:where] + self._rng.randbytes(self._rng.choice((1, 4, 50))) + data[where:]
        if kind == 2:
            return data + data
        if kind == 3:
            return json.dumps(self.value()).encode()
        return self._rng.randbytes(self._rng.choice((0, 1, 100)))

    def _other_path(self, path: str) -> str:
        return self._rng.choice(
            (
                path + "/",
                "/" + path,
                path.upper(),
                path.replace("/", "/%2e/", 1),
                path + "?model=nobody",
                path + "?stream=true&stream=false&%FF=%00",
                f"/m/nobody{path}",
                "/" + "".join(self._rng.choices(string.printable[:62], k=12)),
                path.rpartition("/")[0] or "/",
            )
        )

    def _other_headers(self) -> dict[str, str]:
        return self._rng.choice(
            (
                {"Content-Type": self._rng.choice(_TYPES)},
                {"Authorization": "Bearer \xe9"},
                {"Authorization": self._rng.choice(("", "Basic YTpi", "Bearer", "Bearer a b c"))},
                {"Accept": "text/event-stream", "Accept-Encoding": "gzip, zstd, br"},
                {"Content-Encoding": self._rng.choice(("gzip", "br", "nonsense"))},
                {"X-Request-Id": "a" * 5000},
                {"Cookie": "a=b; " * 200},
                {"Host": "\xe9"},
                {"Origin": "http://a.example", "Access-Control-Request-Method": "POST"},
                {"X-Data-Parallel-Rank": self._rng.choice(("-1", "a", "99999999999999999999"))},
                {"traceparent": "00-zz-zz-00"},
            )
        )

    def _of_operation(self) -> Case:
        """Any operation with any body of its members, half of the time by another method."""
        method, path, names = self._rng.choice(self._operations)
        if self._rng.random() < 0.3:
            method = self._rng.choice(_METHODS)
        body: Any = {name: self.value() for name in names if self._rng.random() < 0.5}
        if self._rng.random() < 0.2:
            body = self.value()
        data = (
            None if method in ("GET", "HEAD") and self._rng.random() < 0.7 else self._encoded(body)
        )
        return Case(method, path, data, {"Content-Type": "application/json"}, "operation")


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield every place in a tree, as its holder and its key there, the outer ones first."""
    holders = deque([value])
    while holders:
        holder = holders.popleft()
        items = holder.items() if isinstance(holder, dict) else enumerate(holder)
        for key, part in items:
            yield holder, key
            if isinstance(part, dict | list):
                holders.append(part)


def _nested(depth: int, as_list: bool) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value] if as_list else {"a": value}
    return value
