"""A step between its launch and its result."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from crosspool.scheduler.sequence import Sequence
from crosspool.transport.messages import Row


@dataclass(frozen=True)
class StepInFlight:
    """A step whose result the rank still owes; under a lease, the next of its steps."""

    step: int
    model: int
    issued: float
    sequences: list[Sequence]
    rows: list[Row]
    lease: int = 1
    """Results that may still come, this step's included."""
    recalled: bool = False

    @cached_property
    def prompt_tokens(self) -> int:
        """Number of tokens in the step's chunks: of prompts, and of replays."""
        pairs = zip(self.sequences, self.rows, strict=True)
        return sum(len(row.tokens) for seq, row in pairs if row.start < seq.prefill_len)
