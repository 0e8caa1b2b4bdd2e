"""The FFN rank: a pure function of hidden states, applied to any dispatch that has come."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from crosspool.models.spec import ModelSpec
from crosspool.observability.trace import LaneTrace
from crosspool.ranks.host.ffn import FFNPart
from crosspool.transport.data_path import FFNLink, LaneError


class FFNRank:
    """One FFN rank. It never waits for an attention rank.

    By the model: ``specs`` has those that there are at any time, ``models`` those of them that lie
    on the rank, and ``parts``, of these, what is in memory."""

    def __init__(
        self,
        rank: int,
        specs: Mapping[int, ModelSpec],
        parts: Mapping[int, FFNPart],
        models: set[int],
        trace: LaneTrace,
    ) -> None:
        self.rank = rank
        self.parts = parts
        self.links: Sequence[FFNLink] = ()
        """The rank's ends of the lanes of all attention ranks."""
        self.models = models
        self.newest = max(specs, default=-1)
        """Largest number of a model that this device has been told of."""
        self.refusing: set[int] = set()
        """Models whose weights cannot be read."""
        self._specs = specs
        self._trace = trace

    def serve(self, link: FFNLink) -> bool:
        """Carries out or refuses the link's dispatch, if there is one and it need not wait for its
        model to come or to be woken; returns whether it did.

        Raises LaneError for a model that does not lie here."""
        header = link.poll()
        if header is None:
            return False
        if header.model not in self._specs:
            # One that is still to come is waited for: this device was started again, and has yet to
            # be told. Of others, an attention rank that died may have left a dispatch behind.
            if header.model > self.newest:
                return False
            link.refuse()
            return True
        if header.model not in self.models:
            raise LaneError(f"FFN rank {self.rank} holds nothing of model {header.model}")
        part = self.parts.get(header.model)
        if part is None:
            if header.model not in self.refusing:
                return False  # it waits until the model has been woken
            link.refuse()
            return True
        start = self._trace.now()
        hidden = link.hidden(getattr(torch, self._specs[header.model].dtype))
        link.reply(part.forward(header.layer, hidden))
        if self._trace.on:
            self._trace.record(
                role="ffn",
                rank=self.rank,
                attention_rank=link.attention_rank,
                lane=link.lane,
                step=-1,
                model=header.model,
                layer=header.layer,
                part="ffn",
                rows=header.rows,
                start_ns=start,
            )
        return True

    def refuse_left(self, model: int) -> None:
        """Refuses dispatches of a model whose weights go. Nobody has steps of it in flight, so that
        attention ranks have left them behind which died."""
        for link in self.links:
            header = link.poll()
            if header is not None and header.model == model:
                link.refuse()
