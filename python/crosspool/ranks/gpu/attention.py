"""Attention stages of a GPU: callables over a lane's fixed buffers, launched or captured.

They are the embedding, a layer's attention part, dispatch and combine where FFN ranks live on other
devices, and the LM head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from crosspool.kernels.cuda_loop import GPUStage
from crosspool.kernels.triton.argmax import argmax
from crosspool.kernels.triton.attention import attend
from crosspool.kernels.triton.exchange import combine_rows, send_rows
from crosspool.kernels.triton.gqa import gqa_prepare
from crosspool.kernels.triton.inputs import feed, take_inputs
from crosspool.kernels.triton.linear import head_logits, linear
from crosspool.kernels.triton.mla import mla_append, mla_queries, mla_values
from crosspool.kernels.triton.norm import embed, rms_norm
from crosspool.kernels.triton.sampling import sample
from crosspool.models.spec import GQASpec, MLASpec
from crosspool.ranks.gpu.ffn import StageCall
from crosspool.ranks.gpu.inputs import InputLayout
from crosspool.ranks.gpu.links import Crossing, LanePayloads
from crosspool.ranks.gpu.model import GPUModel
from crosspool.ranks.gpu.scratch import Carver, DeviceInputs, LaneBuffers, Scratch

MIXED_FROM = 32
"""Buckets of at least so many rows attend to a sequence's rows in blocks that share the keys they
read; in smaller buckets every row reads its keys itself."""


class AttentionStages:
    """Attention stages of one model on one lane in one row bucket."""

    def __init__(
        self, model: GPUModel, layout: InputLayout, lane: LaneBuffers, crossing: Crossing
    ) -> None:
        """``crossing``: how rows leave the device."""
        self.model, self.layout, self.lane = model, layout, lane
        spec = model.spec
        self.scratch = Scratch(model, layout, Carver(lane.arena))
        self.inputs = DeviceInputs(layout, self.scratch.inputs, lane.count)
        device = lane.device
        self._attend = self._gqa if isinstance(spec.attention, GQASpec) else self._mla
        self._payloads: LanePayloads | None = None
        if crossing.links:
            own = None if crossing.own is None else (crossing.own, self.scratch.partial)
            self._payloads = LanePayloads.of([lane.links[i] for i in crossing.links], device, own)
        self._first = torch.zeros(1, dtype=torch.int32, device=device)

    @property
    def input_elements(self) -> int:
        """int32 elements of a step's inputs that ``embed`` reads."""
        return self.layout.elements

    @property
    def attention_calls(self) -> dict[GPUStage, StageCall]:
        """Every attention stage that the model has on this device."""
        crossing = {GPUStage.DISPATCH: self.dispatch, GPUStage.COMBINE: self.combine}
        return {
            GPUStage.EMBED: self.embed,
            GPUStage.FEED: self.feed,
            GPUStage.ATTENTION: self.attention,
            **(crossing if self._payloads is not None else {}),
            GPUStage.HEAD: self.head,
        }

    def embed(self) -> None:
        """Fetches the step's inputs and embeds their tokens."""
        layout = self.layout
        take_inputs(self.lane.address, self.inputs.flat, layout.head, layout.pages)
        self._embed()

    def feed(self) -> None:
        """Embeds the chosen tokens one position further, for a lease's next step. The token of row
        i is chosen[i]."""
        rows = self.layout.wanted
        feed(
            self.lane.chosen,
            self.lane.count,
            self.inputs.tokens[:rows],
            self.inputs.batch.positions[:rows],
            self.inputs.rules.position,
        )
        self._embed()

    def attention(self) -> None:
        """Runs one layer's attention part: combine, input norm, attention, residual sum, post
        norm."""
        s, tables, lane = self.scratch, self.model.attention.tables, self.lane
        layer, count, eps = lane.layer, lane.count, self.model.spec.norm_eps
        norm = tables["input_norm"]
        rms_norm(s.residual, norm, layer, count, s.normed, eps=eps, addend=s.partial)
        self._attend()
        linear(
            s.attended.flatten(1),
            tables["o_proj"],
            layer,
            count,
            s.residual,
            lane.linear,
            bias=tables.get("o_proj_bias"),
            add=True,
        )
        rms_norm(s.residual, tables["post_norm"], layer, count, s.payload, eps=eps)

    def dispatch(self) -> None:
        """Writes the attention part's output into the dispatch payloads of the model's links."""
        assert self._payloads is not None
        send_rows(self.scratch.payload, self._payloads.dispatched, self.lane.count)

    def combine(self) -> None:
        """Adds up the partial sums of all FFN ranks of the model, including this device's."""
        assert self._payloads is not None
        combine_rows(self._payloads.combined, self.lane.count, self.scratch.partial)

    def head(self) -> None:
        """Computes logits of the wanted rows and chooses their tokens, into the lane's
        ``chosen``."""
        s, wanted = self.scratch, self.inputs.wanted_count
        self.gather()
        self.logits()
        argmax(s.logits, wanted, s.best, s.argmax)
        chosen = self.lane.chosen[: self.layout.wanted]
        sample(s.logits, s.best, self.inputs.rules, wanted, chosen, s.sampling)

    def gather(self) -> None:
        """Gathers the wanted rows' residuals after the last layer into ``scratch.last``."""
        s, rows = self.scratch, self.inputs.wanted_rows
        torch.index_select(s.residual, 0, rows, out=s.last)
        torch.index_select(s.partial, 0, rows, out=s.last_partial)
        s.last.add_(s.last_partial)

    def logits(self) -> None:
        """Computes logits of ``scratch.last`` into ``scratch.logits``, float32 [wanted, vocab]."""
        s, part, wanted = self.scratch, self.model.attention, self.inputs.wanted_count
        eps = self.model.spec.norm_eps
        rms_norm(s.last, part.final_norm, self._first, wanted, s.last_normed, eps=eps)
        head_logits(s.last_normed, part.lm_head, self._first, wanted, s.logits)

    def _embed(self) -> None:
        s = self.scratch
        embed(self.model.attention.embed, self.inputs.tokens, self.lane.count, s.residual)
        s.partial.zero_()  # the first layer has no combine before it

    def _gqa(self) -> None:
        a = self.model.spec.attention
        assert isinstance(a, GQASpec)
        s, tables, lane = self.scratch, self.model.attention.tables, self.lane
        linear(
            s.normed,
            tables["qkv"],
            lane.layer,
            lane.count,
            s.projected,
            lane.linear,
            bias=tables.get("qkv_bias"),
        )
        gqa_prepare(
            s.projected,
            self.inputs.batch,
            lane.layer,
            self.model.attention.rope,
            s.q,
            self.model.kv,
            kv_heads=a.kv_heads,
            q_norm=tables.get("q_norm"),
            k_norm=tables.get("k_norm"),
            eps=self.model.spec.norm_eps,
            clip=a.qkv_clip,
        )
        attend(
            s.q,
            self.model.kv,
            self.inputs.batch,
            lane.layer,
            s.attended,
            s.splits,
            kv_heads=a.kv_heads,
            scale=a.scale,
            window=a.sliding_window,
            mixed=self.layout.bucket >= MIXED_FROM,
        )

    def _mla(self) -> None:
        a = self.model.spec.attention
        assert isinstance(a, MLASpec)
        s, part, lane, batch = self.scratch, self.model.attention, self.lane, self.inputs.batch
        tables, layer = part.tables, lane.layer

        def project(x: Tensor, key: str, out: Tensor) -> None:
            bias = tables.get(f"{key}_bias")
            linear(x, tables[key], layer, lane.count, out, lane.linear, bias=bias)

        if a.q_lora_rank is None:
            project(s.normed, "kv_a", s.projected)
            project(s.normed, "q_proj", s.plain.flatten(1))
        else:
            project(s.normed, "down", s.projected)
            rms_norm(
                s.projected[:, : a.q_lora_rank],
                tables["q_a_norm"],
                layer,
                lane.count,
                s.q_normed,
                eps=a.latent_norm_eps,
            )
            project(s.q_normed, "q_b_proj", s.plain.flatten(1))
        compressed = s.projected[:, a.q_lora_rank or 0 :]
        eps, nope = a.latent_norm_eps, a.qk_nope_head_dim
        kv, kv_b = self.model.kv, tables["kv_b_proj"]
        mla_append(compressed, tables["kv_a_norm"], batch, layer, part.rope, kv, eps=eps)
        mla_queries(s.plain, kv_b, batch, layer, part.rope, s.q, nope=nope)
        attend(
            s.q,
            kv,
            batch,
            layer,
            s.latents,
            s.splits,
            kv_heads=1,
            scale=a.scale,
            mixed=self.layout.bucket >= MIXED_FROM,
        )
        mla_values(s.latents, kv_b, batch, layer, s.attended, nope=nope)
