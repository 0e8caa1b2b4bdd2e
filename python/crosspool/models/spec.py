"""A model as data: the shapes and rules of its attention part and its FFN part.

A family's file turns a Hugging Face ``config.json`` into a :class:`ModelSpec` and names the
checkpoint's tensors (:class:`TensorRef`). Neither this module nor a family's file imports torch, so
the planner, the scheduler and the launcher read models in milliseconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from crosspool.models.schemes import Quantization, Scheme, Stack

DType = Literal["bfloat16", "float32"]
DTYPE_BYTES: dict[str, int] = {"bfloat16": 2, "float32": 4}


@dataclass(frozen=True, kw_only=True)
class RopeSpec:
    """Rotary position embedding. Ranks take its frequencies from transformers' functions."""

    dim: int
    """Number of rotated features per head, the first ones of a GQA head; the others stay as they
    are."""
    interleaved: bool
    """Whether the rotated pairs are (0, 1), (2, 3), ... instead of (i, i + dim / 2)."""
    fp32: bool = False
    """Whether the rotation is computed in float32 whatever the model's dtype (DeepSeek-V2)."""


@dataclass(frozen=True, kw_only=True)
class GQASpec:
    """Grouped-query attention (MHA when ``kv_heads == q_heads``)."""

    q_heads: int
    kv_heads: int
    head_dim: int
    scale: float
    rope: RopeSpec
    qk_norm: Literal["none", "head", "full", "rotated head"] = "none"
    """RMSNorm of q and k: none, per head (Qwen3), over all heads at once (OLMoE), or per head
    behind the rotation (Hunyuan)."""
    qkv_bias: bool = False
    o_bias: bool = False
    sliding_window: int | None = None
    """Number of tokens that a query sees, its own included; None for all."""
    qkv_clip: float | None = None
    """Bound to which q, k and v are clamped after their projections (OLMoE); None for no bound."""
    out_scale: float = 1.0
    """Factor on what the attention adds to the residual (Granite)."""


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
    """Softmax scale, including the family's YaRN mscale correction."""
    rope: RopeSpec
    qkv_bias: bool = False
    """Whether ``q_a_proj``, ``kv_a_proj`` and ``o_proj`` have biases."""
    latent_norm_eps: float = 1e-6
    """Epsilon of the norms of the q and kv latents, which does not follow ``norm_eps``."""


@dataclass(frozen=True, kw_only=True)
class RouterSpec:
    """The rules by which tokens choose experts."""

    score: Literal["softmax", "sigmoid"]
    top_k: int
    groups: int = 1
    """Number of groups of experts; a token chooses experts from its best ``top_groups`` groups."""
    top_groups: int = 1
    group_score: Literal["max", "top2_sum"] = "max"
    """A group's score: that of its best expert (DeepSeek-V2), or the sum of its best two (V3)."""
    correction_bias: bool = False
    """Whether a bias is added to the scores for the choice of experts only (DeepSeek-V3)."""
    renormalize: bool = False
    """Whether the weights of the chosen experts are divided by their sum."""
    scale: float = 1.0
    """Factor by which the weights are multiplied last."""
    fp32_logits: bool = False
    """Whether the router's weight is held, and its matrix product computed, in float32 whatever
    the model's dtype."""


@dataclass(frozen=True, kw_only=True)
class DenseFFN:
    """A gated MLP: down(silu(gate(x)) * up(x))."""

    intermediate: int


@dataclass(frozen=True, kw_only=True)
class MoEFFN:
    """Routed experts, which are gated MLPs, and optionally a shared one for every token."""

    experts: int
    intermediate: int
    """Intermediate size of one expert."""
    router: RouterSpec
    shared_intermediate: int = 0
    """Intermediate size of all shared experts together; 0 without any."""
    shared_gate: bool = False
    """Whether the shared expert's output is multiplied by the sigmoid of a gate (Qwen2-MoE)."""


FFNSpec = DenseFFN | MoEFFN
AttentionSpec = GQASpec | MLASpec


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """All that pools, scheduler and ranks need to know of a model, except its weights."""

    family: str
    """Hugging Face's ``model_type``: ``qwen3_moe``, ``deepseek_v2``, ..."""
    hidden: int
    vocab: int
    context: int
    """Longest sequence in tokens (``max_position_embeddings``, or the user's limit)."""
    dtype: DType
    norm_eps: float
    tied_embeddings: bool
    attention: AttentionSpec
    ffn: tuple[FFNSpec, ...]
    """The FFN of each layer."""
    eos_token_ids: tuple[int, ...]
    quantization: Quantization | None = None
    """How matrices of the checkpoint are quantised; None when none is."""
    embed_scale: float = 1.0
    """Factor on the embeddings (Granite)."""
    logit_scale: float = 1.0
    """Factor on the logits (Granite)."""
    cut_unit: int = 1
    """Multiple at which ranks cut intermediate dimensions, so that no two ranks need weights that
    share a scale."""

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
        """Bytes of KV cache per token over all layers (the paper's kappa)."""
        return self.layers * self.kv_width * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, kw_only=True)
class TensorRef:
    """One tensor of a model: its key, its name in the checkpoint, and how it is split."""

    key: str
    """Name within its part and layer: ``q_proj``, ``experts.3.gate``, ``shared.down``, ..."""
    name: str
    """Name in the checkpoint."""
    shape: tuple[int, ...]
    split: int | None = None
    """Dimension along which tensor-parallel FFN ranks split it; None when every rank holds all."""
    expert: int | None = None
    """Index of the routed expert that it belongs to, or None."""
    keep_fp32: bool = False
    """Whether it is held in float32 whatever the model's dtype."""
    stack: Stack | None = None
    """Where it lies in a tensor of all experts, whose name ``name`` is; None: it is one of its
    own."""
    scheme: Scheme | None = None
    """How the checkpoint stores the matrix; None: as a tensor of floats."""

    @property
    def module(self) -> str:
        """The name of what the tensor belongs to, by which checkpoints name the tensors of a
        quantised matrix."""
        return self.name.removesuffix(".weight")
