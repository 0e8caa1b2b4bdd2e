"""What an attention rank does next: which model, and which rows of it."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator

from crosspool.scheduler.attention_rank import AttentionRank
from crosspool.scheduler.sequence import Sequence


def next_model(rank: AttentionRank, lanes: int) -> int | None:
    """The model least recently served among those with work and no step in flight; None when
    there is none, or when ``lanes`` steps are at work and one more waits behind them."""
    if len(rank.flights) > lanes:
        return None
    ready = [
        model
        for model, running in enumerate(rank.running)
        if len(running) > len(rank.paused[model]) and model not in rank.flights
    ]
    return min(ready, key=lambda model: rank.last_step[model], default=None)


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
