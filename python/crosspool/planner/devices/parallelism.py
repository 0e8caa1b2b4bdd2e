"""How a model's attention uses several devices, and so what part of their KV memory one request
sees (the paper's two types; CrossPool, arXiv 2606.24506, Figure 2).

Type I, at least as many KV heads as ranks: the heads are split among all ranks, every rank holds a
part of every token, and a request sees all of the memory. Type II, fewer KV heads than ranks: a
rank has no head of its own to hold, so attention runs data-parallel over groups of ``kv_heads``
ranks, and a request sees the memory of its group only: ``kv_heads / ranks`` of all. MLA has one
latent for all heads and counts as one KV head. Example::

    parallelism("mha", 32, 4).share, parallelism("gqa", 2, 4).share  # (1.0, 0.5)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec

from crosspool.config.errors import ConfigError


class Parallelism(msgspec.Struct, frozen=True, kw_only=True):
    """One model's attention on ``ranks`` ranks."""

    type: Literal["I", "II"]
    ranks: int
    group: int
    """Ranks that split the KV heads among them and hold a part of every token of a request."""
    heads: int
    """KV heads on the fullest rank."""
    share: float
    """Part of the KV memory of all ranks that one request can fill, 0 to 1."""
    reason: str

    @property
    def groups(self) -> int:
        """Groups that run data-parallel, each with requests of its own."""
        return self.ranks // self.group


def parallelism(attention: str, kv_heads: int, ranks: int) -> Parallelism:
    """The paper's way, which a monolithic server goes too. Raises ConfigError."""
    if ranks < 1 or kv_heads < 1:
        raise ConfigError(f"{kv_heads} KV heads on {ranks} ranks: both must be at least 1")
    if ranks == 1:
        reason = "one rank: there is nothing to split"
        return Parallelism(type="I", ranks=1, group=1, heads=kv_heads, share=1.0, reason=reason)
    if kv_heads >= ranks:
        heads = -(-kv_heads // ranks)
        share = kv_heads / (heads * ranks)
        uneven = "" if share == 1 else f", {heads} on the fullest, which is full before the others"
        return Parallelism(
            type="I",
            ranks=ranks,
            group=ranks,
            heads=heads,
            share=share,
            reason=f"{kv_heads} KV heads are split over {ranks} ranks{uneven}",
        )
    heads_text = "one KV head" if kv_heads == 1 else f"{kv_heads} KV heads"
    held = "one latent for all heads" if attention == "mla" else heads_text
    size = "one rank" if kv_heads == 1 else f"{kv_heads} ranks"
    return Parallelism(
        type="II",
        ranks=ranks,
        group=kv_heads,
        heads=1,
        share=kv_heads / ranks,
        reason=f"{held}, {ranks} ranks: attention runs data-parallel over groups of {size}, of "
        "which a request sees one",
    )


def served(ranks: int) -> Parallelism:
    """The way of CrossPool's server: every attention rank holds the attention parts of all models
    whole, and a request lives on one rank."""
    whole = "the pool's only rank and sees all of it" if ranks == 1 else f"one rank of {ranks}"
    return Parallelism(
        type="I" if ranks == 1 else "II",
        ranks=ranks,
        group=1,
        heads=0,
        share=1 / ranks,
        reason=f"a request lives on {whole}, whatever the model's number of KV heads",
    )


class Room(msgspec.Struct, frozen=True, kw_only=True):
    """KV memory as a model's requests find it: a request lives in one of the groups."""

    groups: tuple[int, ...]
    """Bytes that each group holds of this model's KV cache."""

    @property
    def total(self) -> int:
        return sum(self.groups)

    def requests(self, request_bytes: int) -> int:
        """Requests of as many bytes that fit at once, each whole in its group."""
        return sum(group // request_bytes for group in self.groups)

    def longest(self, bytes_per_token: int) -> int:
        """Tokens of the longest request that fits."""
        return max(self.groups, default=0) // bytes_per_token


def room(free: Sequence[int], attention: Parallelism) -> Room:
    """``free``: KV bytes of each rank. The ranks of a group fill alike, so the fullest counts."""
    groups = []
    for first in range(0, attention.groups * attention.group, attention.group):
        least = max(0, min(free[first : first + attention.group]))
        even = attention.share * attention.ranks / attention.group
        groups.append(int(least * attention.group * even))
    return Room(groups=tuple(groups))
