"""The judge of the front door: what it sends, and what it takes for a fault."""

from __future__ import annotations

import json
import random
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
import pytest
from crosspool.config.deployment import Deployment

from benchmark.front_door import hostile
from benchmark.front_door.cases import Case, case_of, operations, valid_bodies
from benchmark.front_door.exchange import Outcome, post
from benchmark.front_door.fuzz import Answer, Tally, fuzz
from benchmark.front_door.fuzz_program import harmless
from benchmark.front_door.hostile_bodies import Row, nested_schema
from benchmark.front_door.mutation import Mutator
from benchmark.front_door.observer import Window

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"
BUSY = b"HTTP/1.1 503 Oh\r\nContent-Length: 15\r\n\r\nmax_connections"
REFUSED = b"HTTP/1.1 413 Too Large\r\nConnection: close\r\nContent-Length: 2\r\n\r\n{}"


@contextmanager
def answering(answer: bytes, *, unread: bool = False) -> Iterator[int]:
    """A server that gives every connection one ``answer`` and closes it; its port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection:
                    if not unread:
                        connection.recv(1 << 16)
                    connection.sendall(answer)
                    connection.shutdown(socket.SHUT_WR)
                    while connection.recv(1 << 20):
                        pass

        threading.Thread(target=serve, daemon=True).start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)


def cases(*paths: str) -> Iterator[Case]:
    return iter([Case("POST", path, b"{}", {}) for path in paths])


def test_an_answer_is_read_while_the_body_is_sent() -> None:
    with answering(REFUSED, unread=True) as port:
        outcome = post(port, "/", b" " * 20_000_000, timeout=20)
    assert outcome.status == 413 and outcome.note == "{}"


def test_silence_is_no_answer() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        outcome = post(listener.getsockname()[1], "/", {}, timeout=0.2)
    assert outcome.status == 0 and not outcome.answered_well(2)


@pytest.mark.parametrize(
    ("status", "seconds", "good"),
    [
        (200, 20.0, True),
        (400, 1.0, True),
        (400, 3.0, False),
        (500, 0.1, False),
        (0, 30.0, False),
        (503, 1.0, True),
    ],
)
def test_a_good_answer_is_served_or_refused_soon(status: int, seconds: float, good: bool) -> None:
    assert Outcome(status, seconds).answered_well(2.0) is good


SPENT = "finding which token may come next has taken more than the server's `grammar_mask_timeout`"


@pytest.mark.parametrize(
    ("budget", "status", "seconds", "note", "good"),
    [
        ("grammar_mask_timeout", 200, 4.0, "{}", True),
        ("grammar_mask_timeout", 400, 6.5, SPENT, True),
        ("grammar_mask_timeout", 400, 11.0, SPENT, False),
        ("grammar_mask_timeout", 400, 6.5, "`grammar_timeout`", False),
        ("grammar_mask_timeout", 500, 0.1, SPENT, False),
        (None, 400, 6.5, SPENT, False),
    ],
)
def test_a_row_that_needs_its_whole_budget_may_be_served_or_refused_for_it(
    budget: str | None, status: int, seconds: float, note: str, good: bool
) -> None:
    outcome = Outcome(status, seconds, note)
    row = Row("a", False, lambda _: outcome, budget=budget)
    within = hostile.refused_within(row, outcome)
    verdict = hostile.Verdict(
        *("a", False, outcome, window(), window(), (), True, 1.0, 0.0, 0.0), refused_within=within
    )
    assert (verdict.faults == []) is good


def test_rows_with_a_budget_name_an_option() -> None:
    budgets = {row.name: row.budget for row in hostile.rows() if row.budget is not None}
    assert {"EBNF S ::= S S S", "EBNF of nullable rules"} <= budgets.keys()
    assert set(budgets.values()) <= {field.name for field in msgspec.structs.fields(Deployment)}


def window(**seen: Any) -> Window:
    quiet = {
        **{"gap": 0.05, "health": 0.01, "unhealthy": 0, "lag": 0.0, "broken": 0, "running": 20},
        **{"pieces": 100, "http_bytes": 10**9, "scheduler_bytes": 10**8},
    }
    return Window(**{**quiet, **seen})


@pytest.mark.parametrize(
    ("seen", "fault"),
    [
        ({}, []),
        ({"gap": 0.6}, ["stream gap"]),
        ({"gap": 0.6, "lag": 0.2}, []),
        ({"health": 0.2}, ["health"]),
        ({"unhealthy": 1}, ["health"]),
        ({"broken": 1}, ["streams broken"]),
        ({"http_bytes": 10**9 + (200 << 20)}, ["memory"]),
    ],
)
def test_bounds_of_a_row(seen: dict[str, Any], fault: list[str]) -> None:
    verdict = hostile.Verdict(
        "a", False, Outcome(200, 1.0), window(), window(**seen), (), True, 1, 0, 0
    )
    assert verdict.faults == fault


def test_a_tally_counts_server_errors_and_resets() -> None:
    for answer, kind in (
        (OK, ""),
        (OK.replace(b"200 OK", b"500 Oh"), "5xx"),
        (OK.replace(b"200 OK", b"503 Oh"), "5xx"),
        (BUSY, ""),
        (b"", "reset"),
        (OK.replace(b": 2", b": 9"), "reset"),
    ):
        with answering(answer) as port:
            tally = fuzz(f"http://127.0.0.1:{port}", cases("/a"), [])
        assert tally.requests == 1
        assert [key[0].split()[0] for key in tally.faults] == ([kind] if kind else [])


def test_a_late_answer_is_a_hang() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        tally = fuzz(url, cases("/a", "/b"), [], hang=0.3)
    assert tally.count("hang") == 2


def test_the_smallest_case_of_a_fault_is_kept() -> None:
    tally, answer = Tally(), Answer(500, 0.1, "5xx", "no")
    for body in (b"12345", b"1", b"123"):
        tally.add(Case("POST", "/m/a/generate", body), answer)
        tally.add(Case("POST", "/m/b/generate", body), answer)
    ((key, found),) = tally.faults.items()
    assert key[1] == "/m/MODEL/generate"
    assert found.count == 6 and found.case.body == b"1"


def mutator(seed: int) -> Mutator:
    document = {
        "paths": {"/a": {"post": {"requestBody": {"content": {"j": {"schema": {"$ref": "#/A"}}}}}}},
        "components": {"schemas": {"A": {"properties": {"named": {}}}}},
    }
    found = operations(document)
    assert found == [("POST", "/a", ["named"])]
    return Mutator(random.Random(seed), valid_bodies(["m"]), found)


def test_a_seed_gives_the_same_cases_again() -> None:
    first, again, other = (mutator(seed) for seed in (1, 1, 2))
    drawn = [first.draw() for _ in range(500)]
    assert drawn == [again.draw() for _ in range(500)]
    assert drawn != [other.draw() for _ in range(500)]
    assert {"mutated", "operation"} == {case.origin for case in drawn}
    assert all(case_of(case.line()) == case for case in drawn)


def test_valid_bodies_are_not_changed_by_mutation() -> None:
    seeds = valid_bodies(["m"])
    drawing = Mutator(random.Random(3), seeds, [("POST", "/a", ["b"])])
    for _ in range(2000):
        drawing.draw()
    assert seeds == valid_bodies(["m"])


def test_what_stops_a_server_by_design_is_left_out_unless_refused() -> None:
    case = Case("POST", "/m/a/pause_generation", b"{}")
    assert not harmless(case, [])
    assert harmless(case, ["/pause_generation"])
    every = Case("POST", "/abort_request", b'{"abort_all": true}')
    assert not harmless(every, [])
    assert harmless(Case("POST", "/abort_request", b'{"rid": "a"}'), [])


def test_rows_have_names_of_their_own() -> None:
    """There are as many rows again as those that once stopped a server."""
    rows = [(row.name, row.known) for row in hostile.rows()]
    assert len({name for name, _ in rows}) == len(rows)
    assert 15 < sum(known for _, known in rows) <= len(rows) // 2


def test_a_deep_schema_is_valid_json() -> None:
    schema = json.loads(nested_schema(50))
    depth = 0
    while "properties" in schema:
        schema, depth = schema["properties"]["a"], depth + 1
    assert depth == 50
