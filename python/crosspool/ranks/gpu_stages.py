"""The stages of a step on a GPU: callables over a lane's fixed buffers, launched or captured.

A stage reads what changes (the layer, the rows, the inputs' address) from device memory, allocates
nothing and never asks the host, so that one captured graph serves every step of a row bucket and
every layer of a kind. The same callables run on CPU tensors where Triton interprets its kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from crosspool.kernels.cuda_loop import Stage
from crosspool.kernels.triton.argmax import ArgmaxWorkspace, argmax
from crosspool.kernels.triton.attention import AttentionWorkspace, attend
from crosspool.kernels.triton.batch import DeviceBatch
from crosspool.kernels.triton.expert_plan import ExpertPlan, plan_experts
from crosspool.kernels.triton.experts import FFNWorkspace, gated_mlps
from crosspool.kernels.triton.gqa import gqa_prepare
from crosspool.kernels.triton.inputs import feed, take_inputs
from crosspool.kernels.triton.linear import LinearWorkspace, head_logits, linear
from crosspool.kernels.triton.mla import mla_append, mla_queries, mla_values
from crosspool.kernels.triton.norm import add_rms_norm, embed, rms_norm
from crosspool.kernels.triton.router import route
from crosspool.kernels.triton.sampling import SamplingRules, SamplingWorkspace, sample
from crosspool.models.spec import GQASpec, MLASpec, ModelSpec, MoEFFN
from crosspool.ranks.gpu_inputs import InputLayout
from crosspool.ranks.gpu_weights import GPUFFN, FFNKind, GPUAttention
from crosspool.ranks.weights import TORCH_DTYPES

StageCall = Callable[[], None]

MIXED_FROM = 32
"""Buckets of so many rows and more attend to a sequence's rows in blocks; in smaller ones every
row reads its keys itself."""
_ALIGNMENT = 256


@dataclass(frozen=True)
class GPUModel:
    """A model as one GPU holds it: both parts and its KV."""

    spec: ModelSpec
    attention: GPUAttention
    ffn: GPUFFN
    kv: Tensor
    """[pages, layers, page_size, kv_width]."""

    @property
    def kinds(self) -> tuple[bool, ...]:
        """Per layer, whether its FFN part is a MoE. Raises ValueError where two dense or two MoE
        layers differ in shape: the loop knows a graph for each of the two."""
        moe = [isinstance(kind.ffn, MoEFFN) for kind in self.ffn.kinds]
        if len(set(moe)) != len(moe):
            raise ValueError("FFN layers of one kind differ in shape: a GPU does not drive that")
        return tuple(moe[kind] for kind in self.ffn.kind_of)

    @property
    def pages_of_sequence(self) -> int:
        """Pages of the longest sequence."""
        return -(-self.attention.positions // self.kv.shape[2])


class DeviceInputs:
    """A step's inputs on the device, as the kernels take them. ``count``: int32 [1], its rows."""

    def __init__(self, layout: InputLayout, memory: Tensor, count: Tensor) -> None:
        flat = memory[: layout.elements]
        self.flat = flat
        fields = {
            name: flat[at : at + size * (dtype.itemsize // 4)].view(dtype)
            for name, (at, size, dtype) in layout.fields.items()
        }
        self.tokens = fields["tokens"]
        self.wanted_rows = fields["wanted_rows"]
        self.wanted_count = flat[2:3]
        self.batch = DeviceBatch(
            count=count,
            positions=fields["positions"],
            sequences=fields["row_sequences"],
            page_table=flat[layout.head :].view(layout.sequences, layout.pages),
        )
        self.rules = SamplingRules(
            temperature=fields["temperature"],
            top_k=fields["top_k"],
            top_p=fields["top_p"],
            min_p=fields["min_p"],
            seed=fields["seed"],
            position=fields["position"],
        )


class LanePlaces:
    """What a lane has for all models and buckets: the loop's words, the chosen tokens, and memory
    that every (model, bucket) lays out anew, since only one is on the lane."""

    def __init__(self, device: torch.device, largest_bucket: int, arena_bytes: int) -> None:
        self.device = device
        self.words = torch.zeros(8, dtype=torch.int32, device=device)
        """:class:`crosspool.kernels.cuda_loop_structs.StageWords`."""
        self.chosen = torch.zeros(largest_bucket, dtype=torch.int32, device=device)
        self.arena = torch.zeros(arena_bytes, dtype=torch.uint8, device=device)
        self.linear = LinearWorkspace.allocate(device)

    @property
    def address(self) -> Tensor:
        """int64 [1]: where the step's inputs are."""
        return self.words[:2].view(torch.int64)

    @property
    def layer(self) -> Tensor:
        return self.words[2:3]

    @property
    def count(self) -> Tensor:
        """int32 [1]: rows of the step."""
        return self.words[4:5]


class Carver:
    """Cuts tensors out of a lane's arena; without one, only says how large it must be."""

    def __init__(self, arena: Tensor | None) -> None:
        self._arena = arena
        self.used = 0

    def take(self, dtype: torch.dtype, *shape: int) -> Tensor:
        """A tensor of any content."""
        begin, size = self.used, torch.Size(shape).numel() * dtype.itemsize
        self.used = -(-(begin + size) // _ALIGNMENT) * _ALIGNMENT
        if self._arena is None:
            return torch.empty(shape, dtype=dtype, device="meta")
        return self._arena[begin : begin + size].view(dtype).view(shape)


class Scratch:
    """The tensors of one (model, bucket) on a lane; rows are the bucket's unless said."""

    def __init__(self, spec: ModelSpec, layout: InputLayout, carver: Carver) -> None:
        dtype, rows, wanted = TORCH_DTYPES[spec.dtype], layout.bucket, layout.wanted

        def take(*shape: int) -> Tensor:
            return carver.take(dtype, *shape)

        self.inputs = carver.take(torch.int32, layout.elements)
        self.residual = take(rows, spec.hidden)
        self.normed = take(rows, spec.hidden)
        self.payload = take(rows, spec.hidden)
        """What a dispatch carries: the FFN part's input."""
        self.partial = take(rows, spec.hidden)
        """What a combine brings: the FFN part's output."""
        a = spec.attention
        if isinstance(a, GQASpec):
            self.projected = take(rows, (a.q_heads + 2 * a.kv_heads) * a.head_dim)
            self.q = take(rows, a.q_heads, a.head_dim)
            self.attended = take(rows, a.q_heads, a.head_dim)
        else:
            lora, cached = a.q_lora_rank or 0, a.kv_lora_rank + a.qk_rope_head_dim
            self.projected = take(rows, lora + cached)
            self.q_normed = take(rows, lora)
            self.plain = take(rows, a.q_heads, a.qk_nope_head_dim + a.qk_rope_head_dim)
            self.q = take(rows, a.q_heads, cached)
            self.latents = take(rows, a.q_heads, a.kv_lora_rank)
            self.attended = take(rows, a.q_heads, a.v_head_dim)
        moe = [ffn for ffn in spec.ffn if isinstance(ffn, MoEFFN)]
        experts = max((ffn.experts for ffn in moe), default=0)
        top_k = max((ffn.router.top_k for ffn in moe), default=0)
        fp32 = any(ffn.router.fp32_logits for ffn in moe)
        self.router = carver.take(torch.float32 if fp32 else dtype, rows, experts)
        self.experts = carver.take(torch.int32, rows, top_k)
        self.expert_weights = carver.take(torch.float32, rows, top_k)
        self.last = take(wanted, spec.hidden)
        """Residuals of the wanted rows [wanted, hidden]."""
        self.last_partial = take(wanted, spec.hidden)
        self.last_normed = take(wanted, spec.hidden)
        self.logits = carver.take(torch.float32, wanted, spec.vocab)
        self.best = carver.take(torch.int32, wanted)
        self.sampling = SamplingWorkspace(
            probs=carver.take(torch.float32, wanted, spec.vocab),
            candidates=carver.take(torch.float32, wanted, spec.vocab),
            tokens=carver.take(torch.int32, wanted, spec.vocab),
        )

    @classmethod
    def bytes(cls, spec: ModelSpec, layout: InputLayout) -> int:
        """What it takes of an arena."""
        carver = Carver(None)
        cls(spec, layout, carver)
        return carver.used


class Stages:
    """The stages of one model on one lane in one row bucket."""

    def __init__(self, model: GPUModel, layout: InputLayout, lane: LanePlaces) -> None:
        self.model, self.layout, self.lane = model, layout, lane
        self.scratch = Scratch(model.spec, layout, Carver(lane.arena))
        self.inputs = DeviceInputs(layout, self.scratch.inputs, lane.count)
        spec, device = model.spec, lane.device
        a = spec.attention
        gqa = isinstance(a, GQASpec)
        self._workspace = AttentionWorkspace.allocate(
            layout.bucket,
            a.q_heads,
            a.kv_heads if isinstance(a, GQASpec) else 1,
            a.head_dim if isinstance(a, GQASpec) else a.kv_lora_rank,
            device,
        )
        self._attend = self._gqa if gqa else self._mla
        self._ffns = {
            Stage.MOE_FFN if isinstance(kind.ffn, MoEFFN) else Stage.DENSE_FFN: self._ffn(kind)
            for kind in model.ffn.kinds
        }
        self._argmax = ArgmaxWorkspace.allocate(layout.wanted, spec.vocab, device)
        self._first = torch.zeros(1, dtype=torch.int32, device=device)

    @property
    def calls(self) -> dict[Stage, StageCall]:
        """Every stage that the model has."""
        return {
            Stage.EMBED: self.embed,
            Stage.FEED: self.feed,
            Stage.ATTENTION: self.attention,
            **self._ffns,
            Stage.HEAD: self.head,
        }

    def embed(self) -> None:
        """Takes the inputs over and embeds their tokens."""
        layout = self.layout
        take_inputs(self.lane.address, self.inputs.flat, layout.head, layout.pages)
        self._embed()

    def feed(self) -> None:
        """A lease's next step: the chosen tokens, one position further. Row i's is chosen[i]."""
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
        """One layer's attention part: combine, input norm, attention, residual sum, post norm."""
        s, tables, lane = self.scratch, self.model.attention.tables, self.lane
        layer, count, eps = lane.layer, lane.count, self.model.spec.norm_eps
        add_rms_norm(s.residual, s.partial, tables["input_norm"], layer, count, s.normed, eps=eps)
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

    def head(self) -> None:
        """Logits of the wanted rows, and their tokens by their rules, to the lane's chosen ones."""
        s, wanted = self.scratch, self.inputs.wanted_count
        self.gather()
        self.logits()
        argmax(s.logits, wanted, s.best, self._argmax)
        chosen = self.lane.chosen[: self.layout.wanted]
        sample(s.logits, s.best, self.inputs.rules, wanted, chosen, s.sampling)

    def gather(self) -> None:
        """The wanted rows' residuals after the last layer, to ``scratch.last``."""
        s, rows = self.scratch, self.inputs.wanted_rows
        torch.index_select(s.residual, 0, rows, out=s.last)
        torch.index_select(s.partial, 0, rows, out=s.last_partial)
        s.last.add_(s.last_partial)

    def logits(self) -> None:
        """Logits of ``scratch.last``: float32 [wanted, vocab] to ``scratch.logits``."""
        s, part, wanted = self.scratch, self.model.attention, self.inputs.wanted_count
        eps = self.model.spec.norm_eps
        rms_norm(s.last, part.final_norm, self._first, wanted, s.last_normed, eps=eps)
        head_logits(s.last_normed, part.lm_head, self._first, wanted, s.logits)

    def _embed(self) -> None:
        s = self.scratch
        embed(self.model.attention.embed, self.inputs.tokens, self.lane.count, s.residual)
        s.partial.zero_()  # of the layer before the first

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
            self._workspace,
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
            self._workspace,
            kv_heads=1,
            scale=a.scale,
            mixed=self.layout.bucket >= MIXED_FROM,
        )
        mla_values(s.latents, kv_b, batch, layer, s.attended, nope=nope)

    def _ffn(self, kind: FFNKind) -> StageCall:
        ffn, s, lane = kind.ffn, self.scratch, self.lane
        rules = ffn.router if isinstance(ffn, MoEFFN) else None
        top_k = 0 if rules is None else rules.top_k
        bucket, shared = self.layout.bucket, kind.weights.shared_gate_up is not None
        held = kind.held if kind.weights.gate_up is not None else 0
        work = ExpertPlan.allocate(bucket, top_k, held, shared, lane.device)
        workspace = FFNWorkspace.allocate(bucket, self.model.spec.hidden, kind.weights, work)
        experts = None if rules is None else s.experts
        weights = None if rules is None else s.expert_weights

        def call() -> None:
            routed = None
            if rules is not None:
                routed = s.experts, s.expert_weights
                assert kind.router is not None
                linear(s.payload, kind.router, lane.layer, lane.count, s.router, lane.linear)
                route(
                    s.router,
                    kind.router_bias,
                    lane.layer,
                    lane.count,
                    *routed,
                    score=rules.score,
                    groups=rules.groups,
                    top_groups=rules.top_groups,
                    group_score=rules.group_score,
                    renormalize=rules.renormalize,
                    scale=rules.scale,
                )
            plan_experts(experts, weights, lane.count, bucket, work, first_expert=kind.first_expert)
            gated_mlps(
                s.payload,
                kind.weights,
                lane.layer,
                lane.count,
                work,
                routed,
                s.partial,
                workspace,
                first_expert=kind.first_expert,
            )

        return call


def buckets_up_to(rows: int) -> list[int]:
    """Row buckets: powers of two, and ``rows`` itself last."""
    powers = [1 << i for i in range(rows.bit_length()) if 1 << i < rows]
    return [*powers, rows]


def layouts_of(model: GPUModel, buckets: Sequence[int], sequences: int) -> list[InputLayout]:
    """One per bucket; ``sequences``: of a step at most."""
    return [
        InputLayout(bucket, min(bucket, sequences), model.pages_of_sequence) for bucket in buckets
    ]
