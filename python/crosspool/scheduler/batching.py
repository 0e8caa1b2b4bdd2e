"""Which step an attention rank makes next: of which model, and with which rows."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator

from crosspool.scheduler.flight import StepInFlight
from crosspool.scheduler.rank_state import RankState
from crosspool.scheduler.sequence import Sequence


def next_model(rank: RankState, lanes: int) -> int | None:
    """The least recently served model among those with work and no step in flight; None without
    such a model, or when ``lanes`` steps are at work and one more waits behind them."""
    if len(rank.flights) > lanes:
        return None
    ready = [model for model in _with_work(rank, lanes) if model not in rank.flights]
    return min(ready, key=lambda model: rank.last_step[model], default=None)


def lease_steps(rank: RankState, lanes: int, most: int) -> int:
    """Longest lease for the next step, in steps: ``most``, or 1 where a lease would keep another
    model's step from being launched."""
    busy = sum(
        bool(running) and model not in rank.barred for model, running in rank.running.items()
    )
    return most if busy <= lanes + 1 else 1


def leases_in_the_way(rank: RankState, lanes: int) -> list[StepInFlight]:
    """Leases to recall: one of their requests is over, a further request of their model could join,
    their model makes no steps now, or another model's step cannot be launched."""
    leases = [f for f in rank.flights.values() if f.lease > 1 and not f.recalled]
    if not leases:
        return []
    joining = set(_with_work(rank, lanes))
    blocked = len(rank.flights) > lanes and not joining <= rank.flights.keys()
    return [
        lease
        for lease in leases
        if blocked
        or lease.model in joining
        or lease.model in rank.barred
        or any(seq.over for seq in lease.sequences)
    ]


def _with_work(rank: RankState, lanes: int) -> Iterator[int]:
    """Models with a request that could be in a step and is in none."""
    reader = prompt_reader(rank)
    early = _may_begin_early(rank, lanes)
    for model, running in rank.running.items():
        if (
            running
            and model not in rank.barred
            and (early or model not in rank.early)
            and any(
                not seq.in_flight
                and not seq.undecided
                and seq.number not in rank.paused[model]
                and (seq.decoding or reader in (None, model))
                for seq in running.values()
            )
        ):
            yield model


def _may_begin_early(rank: RankState, lanes: int) -> bool:
    """Whether a step that holds a lane until its weights are read is in nobody's way: there is
    another lane, no other such step, and no request whose steps would go on."""
    held = rank.barred | rank.early
    others = any(running and model not in held for model, running in rank.running.items())
    return lanes > 1 and not others and rank.early.isdisjoint(rank.flights)


NOBODY = -1


def prompt_reader(rank: RankState) -> int | None:
    """The one model whose next step may take prompt tokens, or NOBODY; None where every model's
    may.

    While any request here generates, one step at a time reads prompts, and models with prompts take
    turns. The next prompt step starts only when every model that waited for the last one has had a
    token. So a token waits for at most one prompt chunk of other models, under any load."""
    generating = rank.generating
    if not generating:
        return None
    flights = (f for f in rank.flights.values() if f.model not in rank.early)
    if generating & rank.delayed or any(f.prompt_tokens for f in flights):
        return NOBODY
    reading = (
        model
        for model, running in rank.running.items()
        if running
        and model not in rank.barred
        and model not in rank.early
        and any(not seq.decoding for seq in running.values())
    )
    return min(reading, key=lambda model: rank.last_prompt_step[model], default=NOBODY)


def form_batch(
    running: Iterable[Sequence], paused: Container[int], prompt_tokens: int
) -> Iterator[tuple[Sequence, int]]:
    """The requests of one step, each with the number of tokens that the step takes of it: 1 of a
    request that decodes, and up to ``prompt_tokens`` of all prompts together, in order of
    admission. Requests whose numbers are in ``paused`` and undecided ones are left out."""
    for seq in running:
        if seq.number in paused or seq.undecided:
            continue
        if seq.decoding:
            yield seq, 1
        elif prompt_tokens:
            chunk = min(prompt_tokens, seq.prefill_len - seq.computed)
            prompt_tokens -= chunk
            yield seq, chunk
