"""What the requests of one model take, from their arrival to their end."""

from __future__ import annotations

from crosspool.observability.histograms import ModelHistograms
from crosspool.scheduler.request import Finish
from crosspool.scheduler.sequence import Sequence


class RequestTimes:
    """Fills a model's histograms, and the timelines of its requests that are traced. ``now`` is a
    time of the scheduler's clock."""

    def __init__(self) -> None:
        self.histograms = ModelHistograms()

    def admitted(self, seq: Sequence, now: float) -> None:
        if seq.timeline is not None and not seq.replayed:
            seq.timeline.enter("prefill", now)
        if seq.is_timed and not seq.replayed:
            self.histograms.queue_seconds.observe(now - seq.arrived)

    def sampled(self, seq: Sequence, now: float) -> None:
        """A token of the request has been sampled."""
        if seq.timeline is not None:
            seq.timeline.enter("decode", now)
        if not seq.is_timed:
            return
        if seq.sampled_at is None:
            self.histograms.first_token_seconds.observe(now - seq.arrived)
        else:
            self.histograms.between_tokens_seconds.observe(now - seq.sampled_at)
        seq.sampled_at = now

    def lost(self, seq: Sequence, now: float) -> None:
        """The request is to be computed again from its tokens."""
        if seq.timeline is not None:
            seq.timeline.enter("replay", now)

    def passed(self, seq: Sequence, tokens: int, now: float) -> None:
        """The request has sampled ``tokens`` tokens at even times, and samples another one now."""
        if not seq.is_timed or seq.sampled_at is None:
            return
        gap = (now - seq.sampled_at) / (tokens + 1)
        self.histograms.between_tokens_seconds.observe(gap, tokens)
        seq.sampled_at += tokens * gap

    def ended(self, seq: Sequence, finish: Finish, now: float) -> None:
        if seq.timeline is not None:
            seq.timeline.end(now)
        if not seq.is_timed or finish.kind == "abort":
            return
        self.histograms.end_to_end_seconds.observe(now - seq.arrived)
        self.histograms.prompt_tokens.observe(seq.prompt_len)
        self.histograms.output_tokens.observe(len(seq.tokens) - seq.prompt_len)
