"""What a model is, as data: the shapes and rules that its attention part and its FFN part follow.

A family's file turns a Hugging Face ``config.json`` into a :class:`ModelSpec` and names the
checkpoint's tensors (:class:`TensorRef`). Nothing here or in a family's file imports torch, so
that the planner, the scheduler and the launcher read models in milliseconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

DType = Literal["bfloat16", "float32"]
DTYPE_BYTES: dict[str, int] = {"bfloat16": 2, "float32": 4}


@dataclass(frozen=True, kw_only=True)
class RopeSpec:
    """Rotary position embedding. Frequencies come from transformers' rope functions in the rank."""

    dim: int
    """Rotated features per head."""
    interleaved: bool
    """True: pairs are (0, 1), (2, 3), ...; False: pairs are (i, i + dim / 2)."""
    fp32: bool = False
    """The rotation is computed in float32 whatever the model's dtype (DeepSeek-V2)."""


@dataclass(frozen=True, kw_only=True)
class GQASpec:
    """Grouped-query attention (MHA when ``kv_heads == q_heads``)."""

    q_heads: int
    kv_heads: int
    head_dim: int
    scale: float
    rope: RopeSpec
    qk_norm: Literal["none", "head", "full"] = "none"
    """RMSNorm of q and k: none, per head (Qwen3), or over all heads at once (OLMoE)."""
    qkv_bias: bool = False
    o_bias: bool = False
    sliding_window: int | None = None
    """Tokens that a query sees, itself included; None: all."""
    qkv_clip: float | None = None
    """q, k and v are clamped to [-clip, clip] after their projections (OLMoE)."""


@dataclass(frozen=True, kw_only=True)
class MLASpec:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434)."""

    q_heads: int
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    scale: float
    """Softmax scale, with the family's YaRN mscale correction already in it."""
    rope: RopeSpec
    qkv_bias: bool = False
    """``q_a_proj``, ``kv_a_proj`` and ``o_proj`` have a bias."""
    latent_norm_eps: float = 1e-6
    """Epsilon of the norms of the q and kv latents, whatever the model's ``norm_eps``."""


@dataclass(frozen=True, kw_only=True)
class RouterSpec:
    """How tokens choose experts."""

    score: Literal["softmax", "sigmoid"]
    top_k: int
    groups: int = 1
    """Experts are split into this many groups, of which the best ``top_groups`` may be chosen."""
    top_groups: int = 1
    group_score: Literal["max", "top2_sum"] = "max"
    """A group's score: its best expert (DeepSeek-V2), or the sum of its best two (V3)."""
    correction_bias: bool = False
    """A bias is added to the scores for the choice of experts only (DeepSeek-V3)."""
    renormalize: bool = False
    """The chosen experts' weights are divided by their sum."""
    scale: float = 1.0
    """The weights are multiplied by this last."""
    fp32_logits: bool = False
    """The router's matrix product runs in float32 whatever the model's dtype; its weight is held
    in float32."""


@dataclass(frozen=True, kw_only=True)
class DenseFFN:
    """A gated MLP: down(silu(gate(x)) * up(x))."""

    intermediate: int


@dataclass(frozen=True, kw_only=True)
class MoEFFN:
    """Routed gated-MLP experts, plus an optional shared gated MLP that every token takes."""

    experts: int
    intermediate: int
    """Intermediate size of one expert."""
    router: RouterSpec
    shared_intermediate: int = 0
    """Intermediate size of all shared experts together; 0: none."""


FFNSpec = DenseFFN | MoEFFN
AttentionSpec = GQASpec | MLASpec


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """One model: everything that pools, scheduler and ranks need to know of it but its weights."""

    family: str
    """The HF ``model_type``: ``qwen3_moe``, ``deepseek_v2``, ..."""
    hidden: int
    vocab: int
    context: int
    """Longest sequence in tokens (``max_position_embeddings``, or the user's limit)."""
    dtype: DType
    norm_eps: float
    tied_embeddings: bool
    attention: AttentionSpec
    ffn: tuple[FFNSpec, ...]
    """One per layer."""
    eos_token_ids: tuple[int, ...]

    @property
    def layers(self) -> int:
        return len(self.ffn)

    @property
    def kv_width(self) -> int:
        """KV elements per token and layer: K and V of every KV head, or the MLA latent and rope."""
        a = self.attention
        if isinstance(a, GQASpec):
            return 2 * a.kv_heads * a.head_dim
        return a.kv_lora_rank + a.qk_rope_head_dim

    @property
    def kv_bytes_per_token(self) -> int:
        """KV bytes of one token over all layers (the paper's kappa)."""
        return self.layers * self.kv_width * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, kw_only=True)
class TensorRef:
    """One tensor of a model: what we call it, what the checkpoint calls it, and how it splits."""

    key: str
    """Our name within its part and layer: ``q_proj``, ``experts.3.gate``, ``shared.down``, ..."""
    name: str
    """The checkpoint's name."""
    shape: tuple[int, ...]
    split: int | None = None
    """Dimension along which tensor-parallel FFN ranks share it; None: every rank holds all."""
    expert: int | None = None
    """Index of the routed expert that it belongs to; None: not an expert's."""
    keep_fp32: bool = False
    """Held in float32 whatever the model's dtype (the router's correction bias)."""
