"""Both ends of a link's signals and headers in plain Python, for host-launched loops of one
process."""

from __future__ import annotations

from dataclasses import dataclass

from crosspool.transport.data_path import DispatchHeader


@dataclass
class Ends:
    """The attention rank's and the FFN rank's end in one."""

    attention_rank: int = 0
    lane: int = 0
    outstanding: DispatchHeader | None = None
    row_bytes: int = 0
    replied: bool = False
    dispatches: int = 0

    @property
    def free(self) -> bool:
        return self.outstanding is None

    def announce(self, header: DispatchHeader, row_bytes: int) -> None:
        assert self.free
        self.outstanding, self.row_bytes, self.replied = header, row_bytes, False
        self.dispatches += 1

    def ready(self) -> bool:
        return self.replied

    def accept(self) -> None:
        assert self.replied
        self.outstanding, self.replied = None, False

    def poll(self) -> DispatchHeader | None:
        return None if self.replied else self.outstanding

    def announce_reply(self) -> None:
        assert self.poll() is not None
        self.replied = True


class NeverRings:
    """A doorbell for loops that are driven in turn."""

    def wait(self, timeout: float) -> bool:
        return False
