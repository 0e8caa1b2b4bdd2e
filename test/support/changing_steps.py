"""Steps that differ in every input from the step before on their lane: a device that reads an input
of an earlier step computes other tokens.

Each case is a prompt's step and a lease. Tokens, lengths, positions, number of rows, draws and stop
tokens are the case's; pages and lines of the page table are new with every turn, and do not change
what is computed."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from crosspool.kernels.cuda_loop import ModelStages
from crosspool.ranks.gpu.host_side import HostSide
from crosspool.ranks.gpu.launch import EagerLauncher
from crosspool.ranks.gpu.loop import HostLaunchedLoop
from crosspool.ranks.gpu.scratch import LaneBuffers
from crosspool.ranks.gpu.stages import HasStages

from benchmark.gpu_lanes import Draw, Lanes, Row

Tokens = list[list[int]]
"""Chosen tokens by step and sequence."""


@dataclass(frozen=True)
class Case:
    """A prompt of each sequence, and the steps of the lease that follows."""

    prompts: Sequence[Sequence[int]]
    draws: Sequence[Draw | None]
    stops: Sequence[Sequence[int]]
    lease: int

    def rows(self, pages: Sequence[Sequence[int]], first: Sequence[int] | None) -> list[Row]:
        """The rows of the prompt's step; with its tokens ``first``, those of the lease's step."""
        return [
            Row(prompt, 0, of, draw)
            if first is None
            else Row([first[i]], len(prompt), of, draw, stops)
            for i, (prompt, of, draw, stops) in enumerate(
                zip(self.prompts, pages, self.draws, self.stops, strict=True)
            )
        ]


def eager_loop(
    models: Sequence[ModelStages],
    lanes: Sequence[LaneBuffers],
    stages: Mapping[tuple[int, int, int], HasStages],
    buckets: Sequence[int],
    *,
    host: HostSide,
    resident: bool,
) -> HostLaunchedLoop:
    """Takes the place of :func:`crosspool.ranks.gpu.lanes.join_loop`: calls the stages one by one,
    without graphs, on any device."""
    assert not resident
    del buckets, host
    return HostLaunchedLoop(models, len(lanes), EagerLauncher(lanes, stages))


def make_cases(
    count: int, vocab: int, leases: range, *, rows: int, sequences: int, seed: int
) -> list[Case]:
    """Draws cases of up to ``sequences`` sequences without stop tokens, their prompts up to
    ``rows`` tokens together."""
    draw = random.Random(seed)
    return [_case(draw, vocab, leases, rows, draw.randint(1, sequences)) for _ in range(count)]


def _case(draw: random.Random, vocab: int, leases: range, rows: int, sequences: int) -> Case:
    lengths = [1] * sequences
    for _ in range(draw.randint(0, rows - sequences)):
        lengths[draw.randrange(sequences)] += 1
    return Case(
        prompts=[[draw.randrange(6, vocab) for _ in range(length)] for length in lengths],
        draws=[_draw(draw) for _ in range(sequences)],
        stops=[()] * sequences,
        lease=draw.choice(leases),
    )


def _draw(draw: random.Random) -> Draw | None:
    if draw.random() < 0.25:
        return None
    return Draw(
        temperature=draw.uniform(0.5, 3.0),
        seed=draw.randrange(1 << 62),
        top_k=draw.choice([-1, draw.randint(2, 40)]),
        top_p=draw.choice([1.0, draw.uniform(0.3, 0.95)]),
        min_p=draw.choice([0.0, draw.uniform(0.05, 0.6)]),
    )


def with_stops(cases: Sequence[Case], tokens: Sequence[Tokens], seed: int) -> list[Case]:
    """Gives most cases stop tokens, one of which each sequence chooses in its lease; ``tokens``:
    what the cases choose without them."""
    draw = random.Random(seed)
    return [
        replace(
            case,
            stops=[[*{draw.choice(of[1:]) for _ in range(2)}] for of in zip(*found, strict=True)],
        )
        if draw.random() < 0.7
        else case
        for case, found in zip(cases, tokens, strict=True)
    ]


def until_stop(case: Case, tokens: Tokens) -> Tokens:
    """The tokens of a case up to the step of its lease that ends it."""
    for step, chosen in enumerate(tokens[1:], 1):
        if any(token in stops for token, stops in zip(chosen, case.stops, strict=True)):
            return tokens[: step + 1]
    return tokens


def run_at_once(
    lanes: Lanes,
    jobs: Mapping[int, Case],
    pages: Mapping[int, Sequence[int]],
    draw: random.Random,
    meanwhile: Callable[[], None] = lambda: None,
) -> dict[int, Tokens]:
    """Runs a case on each lane; returns the tokens by lane. ``pages``: the lanes' own pages, of
    which every sequence gets others with each call; ``meanwhile`` is called when the leases have
    been sent."""
    page_size = lanes.models[0].kv.shape[2]
    taken: dict[int, list[list[int]]] = {}
    for lane, case in jobs.items():
        free = draw.sample(pages[lane], len(pages[lane]))
        needs = [-(-(len(prompt) + case.lease) // page_size) for prompt in case.prompts]
        taken[lane] = [[free.pop() for _ in range(need)] for need in needs]
    found: dict[int, Tokens] = {}
    for first in (True, False):
        for lane, case in jobs.items():
            rows = case.rows(taken[lane], None if first else found[lane][0])
            lines = draw.sample(range(len(rows)), len(rows))
            lanes.push(lane, 0, rows, 1 if first else case.lease, lines)
        if not first:
            meanwhile()
        for _ in jobs:
            lane, tokens = lanes.pop()
            found[lane] = [*found.get(lane, []), *tokens.tolist()]
    return found
