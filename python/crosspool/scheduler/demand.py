"""What the demand for models' weights leads to: orders to devices, and which models make steps on
which attention rank."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence, Set

from crosspool.config.deployment import Deployment
from crosspool.scheduler.rank_state import RankState
from crosspool.scheduler.residency import ResidencyPolicy, WakeRefusal
from crosspool.transport.messages import Sleep, Wake


class WeightDemand:
    """Tells ``policy`` who has work, and the attention ranks and devices what it decides."""

    def __init__(
        self, deployment: Deployment, policy: ResidencyPolicy, ranks: Sequence[RankState]
    ) -> None:
        self.policy = policy
        self._ranks = ranks
        self._devices = [deployment.devices.index(d) for d in deployment.kv_pool_devices]
        """The device of each attention rank, as an index into the deployment's devices."""
        self._barred_at = -1
        """The policy's version at which the ranks were told which models make no steps; -1 when
        they are to be told again."""

    def changed(self) -> None:
        """Other models are suspended than before."""
        self._barred_at = -1

    def hopeless(self, models: Collection[int], now: float) -> Iterator[tuple[int, WakeRefusal]]:
        """Yields those of ``models``, which have requests, that cannot be woken, and why."""
        for model in sorted(models):
            if (refusal := self.policy.refusal(model, now)) is not None:
                yield model, refusal

    def follow(
        self, work: Set[int], suspended: Set[int], now: float
    ) -> Iterator[tuple[int, Wake | Sleep]]:
        """Decides which models are in memory, where those in ``work`` have requests; has the ranks
        follow, and yields what to tell which device."""
        policy = self.policy
        policy.decide(work, now)
        yield from policy.orders({model for rank in self._ranks for model in rank.flights})
        if self._barred_at != policy.version:
            self._barred_at = policy.version
            for rank, device in zip(self._ranks, self._devices, strict=True):
                early = policy.early(device) - suspended
                rank.bar((policy.barred(device) | suspended) - early, early)

    def note_stalls(self, ffn_is_away: bool, now: float) -> None:
        """Notes which ranks have steps that wait for weights or for an FFN rank."""
        for rank, device in zip(self._ranks, self._devices, strict=True):
            if ffn_is_away or self.policy.stand_still(device, rank.flights):
                rank.stalled = True
            elif rank.stalled:
                rank.unstall(now)
