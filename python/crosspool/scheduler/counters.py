"""What the scheduler counts of each model, for metrics and the pools' table."""

from __future__ import annotations

from crosspool.scheduler.flight import StepInFlight
from crosspool.scheduler.request import Finish
from crosspool.scheduler.sequence import Sequence
from crosspool.transport.inspection import ModelCounts


class ModelCounters(ModelCounts):
    """Counts one model's traffic; every number only grows."""

    def admit(self, seq: Sequence) -> None:
        if seq.replayed:
            self.replayed_requests += 1
            return
        self.admitted += 1
        self.cached_tokens += seq.cached
        self.prefix_hits += seq.cached > 0

    def end(self, finish: Finish) -> None:
        if finish.kind == "abort":
            status = str(finish.status)
            self.aborted[status] = self.aborted.get(status, 0) + 1
        else:
            self.finished[finish.kind] += 1

    def step(self, flight: StepInFlight, steps: int = 1) -> None:
        """``steps`` of them have begun, one after another, of which ``flight`` is the latest."""
        self.steps += steps
        self.largest_batch = max(self.largest_batch, len(flight.rows))
        for seq, row in zip(flight.sequences, flight.rows, strict=True):
            if row.start >= seq.prefill_len:
                self.decode_rows += steps
                continue
            end = row.start + len(row.tokens)
            new = max(0, min(end, seq.prompt_len) - max(row.start, seq.reached))
            self.prompt_tokens += new
            self.replayed_tokens += len(row.tokens) - new
