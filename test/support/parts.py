"""Runs attention part and FFN parts in-process, as the ranks do, over a KV cache full of NaN."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from crosspool.kvpool.layout import KVLayout
from crosspool.models.registry import read_model
from crosspool.models.spec import KVCacheDType
from crosspool.ranks.host.attention import AttentionPart
from crosspool.ranks.host.ffn import FFNPart
from crosspool.ranks.host.step_batch import RowSpan, StepBatch
from crosspool.ranks.weights import TORCH_DTYPES
from crosspool.weightpool.placement import FFNShard
from support.families import reference_model

PAGE_SIZE = 4
_PROMPT, _DECODE_STEPS = 19, 32


class Parts:
    """One model on one attention rank and ``ranks`` FFN ranks."""

    def __init__(
        self,
        path: Path,
        ranks: int = 1,
        parallel: Literal["tp", "ep"] = "tp",
        pages: int = 128,
        dtype: str = "auto",
        *,
        kv_cache_dtype: KVCacheDType = "auto",
    ) -> None:
        self.spec = read_model(path, dtype=dtype, kv_cache_dtype=kv_cache_dtype)
        self.attention = AttentionPart(self.spec, path, lambda _: None)
        self.ffn = [
            FFNPart(
                self.spec,
                path,
                FFNShard(rank=rank, ranks=ranks, parallel=parallel, unit=self.spec.cut_unit),
                lambda _: None,
            )
            for rank in range(ranks)
        ]
        self._layout = KVLayout(self.spec, PAGE_SIZE, chunk_bytes=2 << 20)
        shape = (pages, self.spec.kv_layers, PAGE_SIZE, self.spec.kv_width)
        self.kv = torch.full(shape, torch.nan, dtype=TORCH_DTYPES[self.spec.kv_dtype])
        self._free = torch.randperm(pages, generator=torch.Generator().manual_seed(1)).tolist()
        self._sequences: dict[int, tuple[int, list[int]]] = {}

    def step(self, rows: dict[int, list[int]]) -> dict[int, torch.Tensor]:
        """The next tokens of each request -> float32 [tokens, vocab] logits of each."""
        segments: list[RowSpan] = []
        positions: list[int] = []
        tokens: list[int] = []
        for request, new in rows.items():
            start, pages = self._sequences.get(request, (0, []))
            while len(pages) < self._layout.pages_for(start + len(new)):
                pages.append(self._free.pop())
            kv, state = pages[self._layout.state_pages :], pages[: self._layout.state_pages]
            segments.append(
                RowSpan(
                    first_row=len(tokens),
                    rows=len(new),
                    start=start,
                    pages=torch.tensor(kv),
                    state=torch.tensor(state, dtype=torch.int64),
                )
            )
            positions += range(start, start + len(new))
            tokens += new
            self._sequences[request] = (start + len(new), pages)
        batch = StepBatch(positions=torch.tensor(positions), segments=segments)
        residual = self.attention.embed(torch.tensor(tokens))
        for layer in range(self.spec.layers):
            residual, normed = self.attention.attend(layer, residual, batch, self.kv)
            partial_sums = [ffn.forward(layer, normed).float() for ffn in self.ffn]
            residual = residual + torch.stack(partial_sums).sum(0).to(residual.dtype)
        logits = self.attention.logits(residual)
        return dict(zip(rows, logits.split([len(new) for new in rows.values()]), strict=True))


@torch.inference_mode()
def assert_logits_of_floats(parts: Parts, floats: Path) -> None:
    """Asserts that a prompt and the decode steps after it have the logits of transformers' model
    on the checkpoint ``floats``, in float32."""
    tokens = torch.randint(
        parts.spec.vocab, (_PROMPT + _DECODE_STEPS,), generator=torch.Generator().manual_seed(5)
    )
    expected = reference_model(floats, torch.float32)(tokens[None]).logits[0]
    assert expected.std() > 0.3  # else the tolerance would say nothing
    found = [parts.step({0: tokens[:_PROMPT].tolist()})[0]]
    found += [parts.step({0: [int(token)]})[0] for token in tokens[_PROMPT:]]
    torch.testing.assert_close(torch.cat(found), expected, atol=1e-3, rtol=0)
