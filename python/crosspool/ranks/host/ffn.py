"""A model's FFN part on one FFN rank: routers, experts, shared experts, dense MLPs."""

from __future__ import annotations

from pathlib import Path

import torch

from crosspool.kernels.moe import gated_mlp, moe_experts, route, shared_weights
from crosspool.models.registry import ffn_tensors
from crosspool.models.spec import DenseFFN, ModelSpec, MoEFFN, TensorRef
from crosspool.observability.progress import Progress
from crosspool.ranks.weights import TORCH_DTYPES, TensorListing, fill
from crosspool.weightpool.checkpoint import Read
from crosspool.weightpool.placement import FFNShard


class FFNPart:
    """One FFN rank's share of a model's FFN part.

    Example, the second of two tensor-parallel ranks::

        part = FFNPart(spec, path, FFNShard(rank=1, ranks=2, parallel="tp"), progress=bar.update)
        partial = part.forward(layer=0, x=hidden)  # to be added to the other rank's
    """

    def __init__(self, spec: ModelSpec, path: Path, shard: FFNShard, progress: Progress) -> None:
        """Loads this rank's share; ``progress`` is called with bytes read.

        Raises ConfigError when the checkpoint lacks a tensor or has another shape than its
        config.json says."""
        self._layers: list[_Dense | _MoE] = []
        reads: list[tuple[int | None, Read]] = []
        for layer, ffn in enumerate(spec.ffn):
            block = (
                _Dense(spec, ffn, shard) if isinstance(ffn, DenseFFN) else _MoE(spec, ffn, shard)
            )
            self._layers.append(block)
            for ref in ffn_tensors(spec, layer):
                if (index := shard.slice(ref, ffn)) is not None:
                    reads.append((layer, Read(ref, index, block.place(ref))))
        self._listing = fill(path, reads, progress)

    def forward(self, layer: int, x: torch.Tensor) -> torch.Tensor:
        """Returns this rank's partial sum of the layer's FFN; ``x`` and the result are [T, hidden]
        in the model's dtype."""
        return self._layers[layer].forward(x)

    def tensors(self) -> list[TensorListing]:
        """Lists every share of a tensor that the rank holds."""
        return self._listing


class _GatedMLP:
    """Weights of one gated MLP, or of a stack of them: gate and up in one tensor, gate first."""

    def __init__(
        self, spec: ModelSpec, width: int, stack: tuple[int, ...] = (), *, biases: bool = False
    ) -> None:
        dtype = TORCH_DTYPES[spec.dtype]
        self._width = width
        self.gate_up = torch.empty(*stack, 2 * width, spec.hidden, dtype=dtype)
        self.down = torch.empty(*stack, spec.hidden, width, dtype=dtype)
        self.gate_up_bias: torch.Tensor | None = None
        self.down_bias: torch.Tensor | None = None
        """Zeros where another rank holds it."""
        if biases:
            self.gate_up_bias = torch.empty(*stack, 2 * width, dtype=dtype)
            self.down_bias = torch.zeros(*stack, spec.hidden, dtype=dtype)

    def place(self, ref: TensorRef, *index: int) -> torch.Tensor:
        """Returns the place of the tensor; ``index`` chooses from the stack."""
        part = ref.key.rpartition(".")[2]
        name, _, bias = part.partition("_")
        down, gate_up = (self.down_bias, self.gate_up_bias) if bias else (self.down, self.gate_up)
        assert down is not None and gate_up is not None, ref.key
        if name == "down":
            return down[index]
        gate, up = torch.split(gate_up[index], self._width)
        return gate if name == "gate" else up


class _Dense:
    def __init__(self, spec: ModelSpec, ffn: DenseFFN, shard: FFNShard) -> None:
        self._mlp = _GatedMLP(spec, shard.width(ffn.intermediate))

    def place(self, ref: TensorRef) -> torch.Tensor:
        return self._mlp.place(ref)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return gated_mlp(x, self._mlp.gate_up, self._mlp.down)


class _MoE:
    def __init__(self, spec: ModelSpec, ffn: MoEFFN, shard: FFNShard) -> None:
        self._rules = ffn.router
        self._swiglu_limit, self._weighs_input = ffn.swiglu_limit, ffn.weighs_input
        dtype = torch.float32 if ffn.router.fp32_logits else TORCH_DTYPES[spec.dtype]
        self._router = torch.empty(ffn.experts, spec.hidden, dtype=dtype)
        self._bias = torch.empty(ffn.experts) if ffn.router.correction_bias else None
        self._logit_bias = torch.empty(ffn.experts, dtype=dtype) if ffn.router.logit_bias else None
        held = shard.experts(ffn)
        self._first_expert = held.start
        width = ffn.intermediate if shard.parallel == "ep" else shard.width(ffn.intermediate)
        self._experts = _GatedMLP(spec, width, (len(held),), biases=ffn.biases)
        self._shared: _GatedMLP | None = None
        if ffn.shared_intermediate:
            self._shared = _GatedMLP(spec, shard.width(ffn.shared_intermediate))
        self._shared_gate = torch.empty(1, spec.hidden, dtype=dtype) if ffn.shared_gate else None

    def place(self, ref: TensorRef) -> torch.Tensor:
        if ref.expert is not None:
            return self._experts.place(ref, ref.expert - self._first_expert)
        if ref.key == "router":
            return self._router
        if ref.key == "router_bias" and self._bias is not None:
            return self._bias.view(ref.shape)
        if ref.key == "logit_bias" and self._logit_bias is not None:
            return self._logit_bias
        if ref.key == "shared_gate" and self._shared_gate is not None:
            return self._shared_gate
        assert self._shared is not None, ref.key
        return self._shared.place(ref)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rules = self._rules
        experts, weights = route(
            x,
            self._router,
            self._bias,
            logit_bias=self._logit_bias,
            score=rules.score,
            top_k=rules.top_k,
            groups=rules.groups,
            top_groups=rules.top_groups,
            group_score=rules.group_score,
            renormalize=rules.renormalize,
            scale=rules.scale,
            jitter=rules.jitter,
        )
        out = moe_experts(
            x,
            experts,
            weights,
            gate_up=self._experts.gate_up,
            down=self._experts.down,
            first_expert=self._first_expert,
            gate_up_bias=self._experts.gate_up_bias,
            down_bias=self._experts.down_bias,
            swiglu_limit=self._swiglu_limit,
            weighs_input=self._weighs_input,
        )
        if self._shared is not None:
            shared = gated_mlp(x, self._shared.gate_up, self._shared.down)
            if self._shared_gate is None:
                out += shared
            else:
                out += shared_weights(x, self._shared_gate) * shared
        return out.to(x.dtype)
