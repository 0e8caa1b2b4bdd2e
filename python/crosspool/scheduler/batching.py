"""What an attention rank does next: which model, and which rows of it."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator

from crosspool.scheduler.flight import StepInFlight
from crosspool.scheduler.rank_state import RankState
from crosspool.scheduler.sequence import Sequence


def next_model(rank: RankState, lanes: int) -> int | None:
    """The model least recently served among those with work and no step in flight; None when
    there is none, or when ``lanes`` steps are at work and one more waits behind them."""
    if len(rank.flights) > lanes:
        return None
    ready = [model for model in _with_work(rank) if model not in rank.flights]
    return min(ready, key=lambda model: rank.last_step[model], default=None)


def lease_steps(rank: RankState, lanes: int, most: int) -> int:
    """Steps of a lease: 1 where it would keep the step of another model from being launched."""
    busy = sum(map(bool, rank.running))
    return most if busy <= lanes + 1 else 1


def leases_in_the_way(rank: RankState, lanes: int) -> list[StepInFlight]:
    """Leases that are to end: one of their requests is over, another of their model could join
    them, or another model's step cannot be launched."""
    leases = [f for f in rank.flights.values() if f.lease > 1 and not f.recalled]
    if not leases:
        return []
    joining = set(_with_work(rank))
    blocked = len(rank.flights) > lanes and not joining <= rank.flights.keys()
    return [
        lease
        for lease in leases
        if blocked or lease.model in joining or any(seq.over for seq in lease.sequences)
    ]


def _with_work(rank: RankState) -> Iterator[int]:
    """Models of which a request could be in a step and is in none."""
    reader = prompt_reader(rank)
    for model, running in enumerate(rank.running):
        if any(
            not seq.in_flight
            and seq.number not in rank.paused[model]
            and (seq.decoding or reader in (None, model))
            for seq in running.values()
        ):
            yield model


NOBODY = -1


def prompt_reader(rank: RankState) -> int | None:
    """The one model whose next step may take prompt tokens, or NOBODY; None: every model's.

    While a request answers here, prompts are read by one step at a time, models with prompts in
    turn, and by the next only when every model that waited for it has had its token: so a token
    waits for at most one prompt chunk of other models, however many come in."""
    generating = rank.generating
    if not generating:
        return None
    if generating & rank.delayed or any(f.prompt_tokens for f in rank.flights.values()):
        return NOBODY
    reading = (
        model
        for model, running in enumerate(rank.running)
        if any(not seq.decoding for seq in running.values())
    )
    return min(reading, key=lambda model: rank.last_prompt_step[model], default=NOBODY)


def form_batch(
    running: Iterable[Sequence], paused: Container[int], prompt_tokens: int
) -> Iterator[tuple[Sequence, int]]:
    """One step's requests, each with the number of tokens that it takes: one of every request
    that decodes, and up to ``prompt_tokens`` of prompts, first admitted first; none of those whose
    numbers are in ``paused``."""
    for seq in running:
        if seq.number in paused:
            continue
        if seq.decoding:
            yield seq, 1
        elif prompt_tokens:
            chunk = min(prompt_tokens, seq.prompt_len - seq.computed)
            prompt_tokens -= chunk
            yield seq, chunk
