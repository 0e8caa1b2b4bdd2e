"""Hostile and fuzzed requests: the short form of ``python -m benchmark.front_door``, with bounds
that hold on a machine that others use too."""

from __future__ import annotations

import itertools
import os
import random
import time
from collections.abc import Iterator

import psutil
import pytest
from support.server import TINY_MODELS, Server

from benchmark.front_door import ending, hostile
from benchmark.front_door.fuzz import Tally, fuzz
from benchmark.front_door.fuzz_program import FLAGS, cases, refused_paths
from benchmark.front_door.hostile_bodies import Place, known_rows, own_rows
from benchmark.front_door.observer import Observer

SEED = int(os.environ.get("CROSSPOOL_FUZZ_SEED", "1"))
REQUESTS = int(os.environ.get("CROSSPOOL_FUZZ_REQUESTS", "800"))
HANG_SECONDS = 30.0
GAP_SECONDS = 10 * hostile.GAP_LIMIT
HEALTH_SECONDS = 20 * hostile.HEALTH_LIMIT
SHORT = (
    "prompt of 11 MB",
    "n = 10,000",
    "EBNF S ::= S S S",
    "JSON schema 300 deep",
    "10^6 messages",
    "a tool with 20,000 properties",
    "token_ids_logprob of 10^6",
    "custom_params 500 deep",
    "10^5 prompts in a batch",
    "10^7 tokens to /detokenize",
)
"""Rows of other kinds than the requests of test_bounds.py."""


@pytest.fixture(scope="module")
def fuzzed() -> Iterator[Server]:
    with Server(FLAGS) as running:
        yield running


def named(server: Server) -> list[tuple[str, psutil.Process]]:
    return [(process.cmdline()[0].rpartition("/")[2], process) for process in server.processes()]


def told(tally: Tally) -> str:
    """The seed, and every fault with its smallest request."""
    lines = [
        f"{found.count} x {key}: {found.case.line()[:500]}" for key, found in tally.faults.items()
    ]
    return "\n".join([f"seed {SEED}", *lines])


def test_fuzzed_requests_are_answered(fuzzed: Server) -> None:
    """No 5xx that hides a failure, no hang, no reset, and no process lost."""
    print(f"seed {SEED}")
    made = cases(fuzzed.url, random.Random(SEED), refused_paths(fuzzed.url))
    drawn = itertools.islice(made, REQUESTS)
    tally = fuzz(fuzzed.url, drawn, named(fuzzed), hang=HANG_SECONDS)
    assert not tally.lost, (tally.lost, told(tally), fuzzed.log[-3000:])
    assert tally.requests == REQUESTS
    assert not tally.faults, told(tally)
    assert tally.statuses[200] > REQUESTS // 10 and tally.statuses[400] > REQUESTS // 10
    assert fuzzed.status("/health") == 200


def test_hostile_requests_stop_nobody(fuzzed: Server) -> None:
    """Other streams go on, ``/health`` answers, and memory stays, whatever a request asks for."""
    place = Place(fuzzed.port, TINY_MODELS)
    pids = [dict(named(fuzzed))[f"crosspool::{name}"].pid for name in ("http", "scheduler")]
    sent = []
    with Observer(fuzzed.port, TINY_MODELS, 3, *pids, tokens=400) as observer:
        assert observer.wait_running(3, 60)
        for row in itertools.chain(known_rows(), own_rows()):
            if row.name not in SHORT:
                continue
            before = observer.since(time.monotonic())
            moment = time.monotonic()
            outcome = row.send(place)
            seen = observer.since(moment)
            sent.append(row.name)
            assert outcome.answered_well(HANG_SECONDS), (row.name, outcome)
            assert seen.gap - seen.lag < GAP_SECONDS, (row.name, seen)
            assert seen.health - seen.lag < HEALTH_SECONDS, (row.name, seen)
            assert not seen.broken and not seen.unhealthy, (row.name, seen)
            assert seen.http_bytes - before.http_bytes < hostile.MEMORY_LIMIT, (row.name, seen)
    assert sorted(sent) == sorted(SHORT)
    assert all(process.is_running() for _, process in named(fuzzed))


def test_sigterm_ends_the_server_while_the_worst_requests_run() -> None:
    rows = list(ending.worst())
    assert len(rows) == len(ending.WORST)
    assert ending.seconds_to_end(rows) < ending.DRAIN_SECONDS + 2 * ending.LIMIT
