"""What the scheduler counts, for metrics and the pools' table. Every counter only grows."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from crosspool.scheduler.flight import StepInFlight
from crosspool.scheduler.request import Finish
from crosspool.scheduler.sequence import Sequence


@dataclass
class ModelCounters:
    """One model's traffic since the scheduler's start."""

    requests: int = 0
    """Requests received, refused ones included."""
    admitted: int = 0
    finished: Counter[str] = field(default_factory=Counter)
    """Requests that ended by ``stop`` or ``length``."""
    aborted: Counter[int] = field(default_factory=Counter)
    """Requests refused or aborted, by status."""
    prompt_tokens: int = 0
    """Prompt tokens computed."""
    cached_tokens: int = 0
    """Prompt tokens that the prefix cache had."""
    prefix_hits: int = 0
    """Requests admitted with cached tokens."""
    pauses: int = 0
    """Times that a running request had to wait for further pages (growth policy)."""
    output_tokens: int = 0
    """Tokens sampled."""
    steps: int = 0
    decode_rows: int = 0
    """Rows that fed back a sampled token; over ``steps``: the mean decode batch."""
    largest_batch: int = 0
    """Most requests in one step."""

    def admit(self, seq: Sequence) -> None:
        self.admitted += 1
        self.cached_tokens += seq.cached
        self.prefix_hits += seq.cached > 0

    def end(self, finish: Finish) -> None:
        if finish.kind == "abort":
            self.aborted[finish.status] += 1
        else:
            self.finished[finish.kind] += 1

    def step(self, flight: StepInFlight) -> None:
        self.steps += 1
        self.largest_batch = max(self.largest_batch, len(flight.rows))
        for seq, row in zip(flight.sequences, flight.rows, strict=True):
            if row.start < seq.prompt_len:
                self.prompt_tokens += len(row.tokens)
            else:
                self.decode_rows += 1

    def as_dict(self) -> dict[str, Any]:
        return {
            "requests": self.requests,
            "admitted": self.admitted,
            "finished": {kind: self.finished[kind] for kind in ("stop", "length")},
            "aborted": {str(status): number for status, number in sorted(self.aborted.items())},
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "prefix_hits": self.prefix_hits,
            "pauses": self.pauses,
            "output_tokens": self.output_tokens,
            "steps": self.steps,
            "decode_rows": self.decode_rows,
            "largest_batch": self.largest_batch,
        }
