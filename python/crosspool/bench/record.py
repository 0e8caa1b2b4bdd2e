"""What is recorded of one request."""

from __future__ import annotations

import msgspec


class RequestRecord(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One request and what came of it. ``ttft``, ``tbt`` and ``e2e`` are in seconds from when it
    was sent."""

    model: str
    arrival: float
    """When it was due, in seconds after the workload's start."""
    sent: float = 0.0
    """When it was sent, on the same clock."""
    wanted_prompt_tokens: int
    """Tokens that its prompt was made to have."""
    max_tokens: int
    """Output tokens that it asked for."""
    status: int = 0
    """HTTP status; 0 without a response."""
    failure: str = ""
    """The kind of its failure; empty for a complete output."""
    error: str = ""
    """What the server or the connection said of the failure."""
    finish_reason: str | None = None
    prompt_tokens: int | None = None
    """Prompt tokens, as the server's ``usage`` has them; None where it has none."""
    output_tokens: int | None = None
    """Output tokens, likewise."""
    cached_tokens: int | None = None
    """Prompt tokens that a prefix cache had, likewise."""
    ttft: float | None = None
    """Time to the first piece with text; None where there was none."""
    tbt: list[float] = []
    """Times between pieces with text."""
    e2e: float | None = None
    """Time to the last line of the stream."""

    def fail(self, kind: str, error: str = "") -> None:
        self.failure, self.error = kind, error

    @property
    def complete(self) -> bool:
        return not self.failure

    @property
    def tokens(self) -> int:
        """Output tokens; without the server's count, the number of pieces with text."""
        if self.output_tokens is not None:
            return self.output_tokens
        return 0 if self.ttft is None else 1 + len(self.tbt)

    @property
    def tpot(self) -> float | None:
        """Mean time per output token behind the first; None for outputs of one token."""
        if self.ttft is None or self.e2e is None or self.tokens < 2:
            return None
        return (self.e2e - self.ttft) / (self.tokens - 1)

    @property
    def lateness(self) -> float:
        """Seconds by which the client sent it late."""
        return self.sent - self.arrival
