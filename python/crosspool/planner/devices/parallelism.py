"""The parallelism of a model's attention on several devices, and the part of their KV memory that
one request sees (the two types of the CrossPool paper, arXiv 2606.24506, Figure 2).

Type I has at least as many KV heads as ranks: the heads are split among all ranks, every rank holds
a part of every token, and a request sees all of the memory. Type II has fewer KV heads than ranks,
so that attention runs data-parallel over groups of ``kv_heads`` ranks, and a request sees only the
memory of its group: ``kv_heads / ranks`` of all. MLA has one latent for all heads and counts as one
KV head. Example::

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
    """Number of ranks that split the KV heads and hold a part of every token of a request."""
    heads: int
    """Number of KV heads on the fullest rank."""
    share: float
    """Share of the KV memory of all ranks that one request can fill, 0 to 1."""
    reason: str

    @property
    def groups(self) -> int:
        """Number of groups that run data-parallel, each with requests of its own."""
        return self.ranks // self.group


def parallelism(attention: str, kv_heads: int, ranks: int) -> Parallelism:
    """Returns the paper's parallelism, which monolithic servers use too. Raises ConfigError."""
    if ranks < 1 or kv_heads < 1:
        raise ConfigError(f"{kv_heads} KV heads on {ranks} ranks: both must be at least 1")
    if ranks == 1:
        reason = "there is only one rank"
        return Parallelism(type="I", ranks=1, group=1, heads=kv_heads, share=1.0, reason=reason)
    if kv_heads >= ranks:
        heads = -(-kv_heads // ranks)
        share = kv_heads / (heads * ranks)
        uneven = "" if share == 1 else f"; the fullest has {heads} and fills before the others"
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
        reason=f"{held} on {ranks} ranks: attention runs data-parallel over groups of {size}, and "
        "a request sees one group",
    )


def served(ranks: int) -> Parallelism:
    """Returns the parallelism of CrossPool's server: every attention rank holds the whole attention
    part of every model, and a request lives on one rank."""
    where = "the pool's only rank and sees all of it" if ranks == 1 else f"one rank of {ranks}"
    return Parallelism(
        type="I" if ranks == 1 else "II",
        ranks=ranks,
        group=1,
        heads=0,
        share=1 / ranks,
        reason=f"a request lives on {where}, whatever the model's number of KV heads",
    )


class Room(msgspec.Struct, frozen=True, kw_only=True):
    """KV memory that a model's requests can use; each request lives in one of its groups."""

    groups: tuple[int, ...]
    """Bytes of the model's KV cache that each group can hold."""

    @property
    def total(self) -> int:
        return sum(self.groups)

    def requests(self, request_bytes: int) -> int:
        """Number of requests of ``request_bytes`` that fit at once, each whole in one group."""
        return sum(group // request_bytes for group in self.groups)

    def longest(self, bytes_per_token: int) -> int:
        """Length of the longest request that fits, in tokens."""
        return max(self.groups, default=0) // bytes_per_token


def room(free: Sequence[int], attention: Parallelism) -> Room:
    """Returns the room in ``free`` KV bytes per rank. The ranks of a group fill alike, so the rank
    with the least memory counts."""
    groups = []
    for first in range(0, attention.groups * attention.group, attention.group):
        least = max(0, min(free[first : first + attention.group]))
        even = attention.share * attention.ranks / attention.group
        groups.append(int(least * attention.group * even))
    return Room(groups=tuple(groups))
