"""The FFN rank: a pure function of hidden states, applied to any dispatch that has come."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch

from crosspool.models.spec import ModelSpec
from crosspool.observability.trace import LaneTrace
from crosspool.ranks.host.ffn import FFNPart
from crosspool.transport.data_path import FFNLink, LaneError


class FFNRank:
    """One FFN rank. It never waits for an attention rank.

    ``models``: those that lie on the rank, by their index; ``parts``: of these, what is in
    memory."""

    def __init__(
        self,
        rank: int,
        specs: Sequence[ModelSpec],
        parts: Mapping[int, FFNPart],
        models: Collection[int],
        trace: LaneTrace,
    ) -> None:
        self.rank = rank
        self.parts = parts
        self.links: Sequence[FFNLink] = ()
        """The rank's ends of the lanes of all attention ranks."""
        self._models = models
        self._dtypes = [getattr(torch, spec.dtype) for spec in specs]
        self._trace = trace

    def serve(self, link: FFNLink) -> bool:
        """Carries out the link's dispatch, if there is one and its model does not sleep; returns
        whether there was.

        Raises LaneError for a model that does not lie here."""
        header = link.poll()
        if header is None:
            return False
        if header.model not in self._models:
            raise LaneError(f"FFN rank {self.rank} holds nothing of model {header.model}")
        part = self.parts.get(header.model)
        if part is None:
            return False  # it waits until the model has been woken
        start = self._trace.now()
        hidden = link.hidden(self._dtypes[header.model])
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
