"""Writes the cases that schemathesis makes of an OpenAPI document, one a line.

    python -m benchmark.front_door.schema_cases DOCUMENT OUT PREFIX SEED COUNT

It runs in an environment of its own that has schemathesis, and needs nothing of CrossPool."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from benchmark.front_door.cases import Case

_AT_ONCE = 25


def main(document: str, out: str, prefix: str, seed: str, count: str) -> None:
    import schemathesis
    from schemathesis import GenerationMode

    warnings.simplefilter("ignore")
    schema: Any = schemathesis.openapi.from_dict(json.loads(Path(document).read_text()))
    found = [result.ok() for result in schema.get_all_operations() if hasattr(result, "ok")]
    modes = (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)
    written, turn = 0, 0
    with Path(out).open("w") as file:
        while written < int(count) and found:
            operation, mode = found[turn // 2 % len(found)], modes[turn % 2]
            made = _made(operation, mode, int(seed) + turn)
            for case in made[: int(count) - written]:
                file.write(_line(prefix, case) + "\n")
                written += 1
            turn += 1


def _made(operation: Any, mode: Any, seed: int) -> list[Any]:
    """Cases of one operation; none where schemathesis cannot make any."""
    import hypothesis

    made: list[Any] = []

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=_AT_ONCE,
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(operation.as_strategy(generation_mode=mode))
    def collect(case: Any) -> None:
        made.append(case)

    try:
        collect()
    except hypothesis.errors.Unsatisfiable:
        # An operation without parameters cannot be called wrongly.
        return []
    return made


def _line(prefix: str, case: Any) -> str:
    given = case.as_transport_kwargs(base_url="http://localhost")
    path = given["url"].removeprefix("http://localhost")
    if given.get("params"):
        path += "?" + urlencode(given["params"], doseq=True)
    body = given.get("data")
    if given.get("json") is not None:
        body = json.dumps(given["json"]).encode("utf-8", "surrogatepass")
    if body is not None and not isinstance(body, bytes):
        body = str(body).encode()
    headers = {name: str(value) for name, value in (given.get("headers") or {}).items()}
    if given.get("json") is not None:
        headers.setdefault("Content-Type", "application/json")
    return Case(given["method"], prefix + path, body, headers, "schema").line()


if __name__ == "__main__":
    main(*sys.argv[1:])
