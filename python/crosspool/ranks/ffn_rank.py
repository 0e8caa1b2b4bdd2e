"""The FFN rank: a pure function of hidden states, applied to whichever dispatch is there."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from crosspool.models.spec import ModelSpec
from crosspool.observability.trace import LaneTrace
from crosspool.ranks.ffn_part import FFNPart
from crosspool.transport.data_path import FFNLink


class FFNRank:
    """One FFN rank; ``parts`` is indexed by model. It never waits for an attention rank."""

    def __init__(
        self,
        rank: int,
        specs: Sequence[ModelSpec],
        parts: Sequence[FFNPart],
        trace: LaneTrace,
    ) -> None:
        self.rank = rank
        self.parts = parts
        self.links: Sequence[FFNLink] = ()
        """Its ends of every lane of every attention rank."""
        self._dtypes = [getattr(torch, spec.dtype) for spec in specs]
        self._trace = trace

    def serve(self, link: FFNLink) -> bool:
        """Carries out the link's dispatch, if there is one; says whether there was."""
        header = link.poll()
        if header is None:
            return False
        start = self._trace.now()
        hidden = link.hidden(self._dtypes[header.model])
        link.reply(self.parts[header.model].forward(header.layer, hidden))
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
