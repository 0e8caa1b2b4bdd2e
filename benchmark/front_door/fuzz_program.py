"""Runs the fuzzer against servers of its own and tells what it found."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import re
import subprocess
import tempfile
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import aiohttp

from benchmark.front_door.cases import NEVER, Case, case_of, operations, valid_bodies
from benchmark.front_door.fuzz import HANG_SECONDS, Found, Tally, exchange, fuzz, session_of
from benchmark.front_door.mutation import Mutator
from benchmark.records import ROOT
from benchmark.server import TINY_MODELS, Server

FLAGS = ("--kv-pool-bytes", "128MiB", "--context-length", "512", "--tool-call-parser", "qwen25")
"""Contexts are short, so that a request that asks for as much as it may get ends soon."""
_REFUSED = {400, 401, 403, 404, 405}
_SHRINK_REQUESTS = 60
_EXCEPTION = re.compile(
    r"^((?:\w+\.)*\w+(?:Error|Exception|Exit|Interrupt)\b.{0,90})", re.MULTILINE
)
"""The last line of a traceback, without what differs at its end."""


def cases(url: str, rng: random.Random, refused: Sequence[str]) -> Iterator[Case]:
    """Yield mutated cases without end, for the server at ``url``. ``refused`` are paths that this
    server refuses to everybody; those that stop it by design and are not refused are left out."""
    found = operations(document(url, "/openapi.json"))
    for model in TINY_MODELS:
        inner = operations(document(url, f"/m/{model}/openapi.json"))
        found += [(method, f"/m/{model}{path}", names) for method, path, names in inner]
    mutator = Mutator(rng, valid_bodies(TINY_MODELS), found)
    while True:
        case = mutator.draw()
        if harmless(case, refused):
            yield case


def harmless(case: Case, refused: Sequence[str]) -> bool:
    """Whether ``case`` is none that stops the server for everybody by design."""
    path = case.path.lower()
    if any(never in path and never not in refused for never in NEVER):
        return False
    return "/abort_request" in refused or b"abort_all" not in (case.body or b"")


def refused_paths(url: str) -> list[str]:
    """Return those paths of :data:`NEVER` that the server refuses to a caller without a key."""
    found = []
    for path in NEVER:
        try:
            status = _post(url + path, {})
        except urllib.error.HTTPError as error:
            status = error.code
        if status in _REFUSED:
            found.append(path)
        elif path == "/pause_generation":
            _post(url + "/continue_generation", {})
    return found


def _post(url: str, body: Any) -> int:
    data = json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return int(answer.status)


def document(url: str, path: str) -> Mapping[str, Any]:
    """Return the OpenAPI document at ``path``."""
    with urllib.request.urlopen(url + path, timeout=60) as answer:
        found = json.loads(answer.read())
    assert isinstance(found, dict)
    return found


def generated(python: str, url: str, seed: int, count: int, refused: Sequence[str]) -> list[Case]:
    """Return ``count`` cases that schemathesis makes of the server's descriptions. ``python`` is
    that of an environment that has it."""
    prefixes = ("", f"/m/{TINY_MODELS[1]}")
    found: list[Case] = []
    with tempfile.TemporaryDirectory() as folder:
        file, made = Path(folder) / "openapi.json", Path(folder) / "cases.jsonl"
        for prefix in prefixes:
            file.write_text(json.dumps(document(url, f"{prefix}/openapi.json")))
            words = [python, "-m", "benchmark.front_door.schema_cases", str(file), str(made)]
            part = str(count // len(prefixes))
            subprocess.run([*words, prefix, str(seed), part], cwd=ROOT, check=True)
            found += (case_of(line) for line in made.read_text().splitlines())
    random.Random(seed).shuffle(found)
    return [case for case in found if harmless(case, refused)]


def run(seed: int, requests: int, python: str | None) -> Tally:
    """Send ``requests`` cases, a tenth of them by schemathesis where ``python`` has it. A server
    that loses a process is followed by a new one."""
    rng, total = random.Random(seed), Tally()
    source: Iterator[Case] | None = None
    while total.requests < requests:
        with Server(FLAGS) as server:
            if source is None:
                refused = refused_paths(server.url)
                mutated = cases(server.url, rng, refused)
                made = []
                if python is not None:
                    made = generated(python, server.url, seed, requests // 10, refused)
                source = _alternate(mutated, iter(made))
            left = itertools.islice(source, requests - total.requests)
            before = total.requests
            processes = list(server.processes().items())
            total.join(fuzz(server.url, left, processes, looks=max(requests // 10, 1)))
            if total.lost:
                print(f"lost {total.lost[-1]} after {total.requests} requests; log:")
                print(server.log[-1500:], flush=True)
                if total.requests - before < 10:
                    break
            else:
                shrink(server.url, total)
            total.exceptions += Counter(_EXCEPTION.findall(server.log))
    return total


def _alternate(first: Iterator[Case], second: Iterator[Case]) -> Iterator[Case]:
    """Yield from both by turns, and from ``first`` alone once ``second`` has ended."""
    for case in first:
        yield case
        yield from itertools.islice(second, 1)


def shrink(url: str, tally: Tally) -> None:
    """Make the cases of faults smaller, as long as each shows its fault."""
    for found in tally.faults.values():
        kind = found.answer.fault
        if kind.startswith("5xx"):
            asyncio.run(_shrink(url, found))


async def _shrink(url: str, found: Found) -> None:
    left = _SHRINK_REQUESTS
    async with session_of() as session:
        smaller = True
        while smaller and left > 0:
            smaller = False
            for body in _smaller(found.case.body):
                case = Case(found.case.method, found.case.path, body, found.case.headers, "smaller")
                left -= 1
                if await _same(session, url, case, found):
                    found.case, smaller = case, True
                    break
                if left <= 0:
                    break


async def _same(session: aiohttp.ClientSession, url: str, case: Case, found: Found) -> bool:
    answer = await exchange(session, url, case, HANG_SECONDS)
    return answer.signature(case) == found.answer.signature(found.case)


def _smaller(body: bytes | None) -> Iterator[bytes]:
    """Yield bodies with one member less, at the first two levels."""
    try:
        data = json.loads(body or b"")
    except (ValueError, RecursionError):
        return
    if not isinstance(data, dict):
        return
    for name, value in data.items():
        yield json.dumps({key: data[key] for key in data if key != name}).encode()
        if isinstance(value, dict):
            for inner in value:
                part = {key: value[key] for key in value if key != inner}
                yield json.dumps({**data, name: part}).encode()
        if isinstance(value, list) and len(value) > 1:
            yield json.dumps({**data, name: value[:1]}).encode()
