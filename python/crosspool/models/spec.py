"""A model as data: the shapes and rules of its attention part and its FFN part.

A family's file turns a Hugging Face ``config.json`` into a :class:`ModelSpec` and names the
checkpoint's tensors (:class:`TensorRef`). Neither this module nor a family's file imports torch, so
the planner, the scheduler and the launcher read models in milliseconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from crosspool.models.schemes import Joined, Quantization, Scheme, Stack

DType = Literal["bfloat16", "float32"]
KVCacheDType = Literal["auto", "fp8_e4m3", "fp8_e5m2"]
"""SGLang's names of the dtypes of a KV cache; auto stands for the model's."""
DTYPE_BYTES: dict[str, int] = {"bfloat16": 2, "float32": 4, "fp8_e4m3": 1, "fp8_e5m2": 1}


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


@dataclass(frozen=True)
class TemperatureTuning:
    """Factors on queries that grow with their positions: 1 + ``scale`` * ln(1 + n), where n is the
    number of times that ``floor`` tokens fit into those up to the query, its own included
    (arXiv 2501.19399)."""

    scale: float
    floor: int


@dataclass(frozen=True, kw_only=True)
class GQASpec:
    """Grouped-query attention (MHA when ``kv_heads == q_heads``)."""

    q_heads: int
    kv_heads: int
    head_dim: int
    scale: float
    rope: RopeSpec
    qk_norm: Literal["none", "head", "full", "rotated head", "unweighted rotated head"] = "none"
    """RMSNorm of q and k: none, per head (Qwen3), over all heads at once (OLMoE), or per head
    behind the rotation, with weights (Hunyuan) or without (Llama 4)."""
    qkv_bias: bool = False
    o_bias: bool = False
    sliding_window: int | None = None
    """Number of tokens that a query sees, its own included; None for all."""
    chunked: bool = False
    """Whether sequences are cut into chunks of ``sliding_window`` tokens, and a query sees those of
    its own chunk (Llama 4)."""
    full_layers: frozenset[int] = frozenset()
    """Layers in which a query sees all tokens in spite of ``sliding_window`` (gpt-oss)."""
    unrotated_layers: frozenset[int] = frozenset()
    """Layers whose q and k are neither rotated nor normed (Llama 4)."""
    temperature: TemperatureTuning | None = None
    """Factors on the queries of ``unrotated_layers``; None: there are none."""
    sinks: bool = False
    """Whether each query head has a learnt sink: one more logit in the softmax, without a value
    (gpt-oss)."""
    qkv_clip: float | None = None
    """Bound to which q, k and v are clamped after their projections (OLMoE); None for no bound."""
    out_scale: float = 1.0
    """Factor on what the attention adds to the residual (Granite)."""
    gated: bool = False
    """Whether what each query head attends to is multiplied by the sigmoid of a gate, whose
    projection lies behind the head's own in ``q_proj`` (Qwen3-Next)."""

    def window(self, layer: int) -> int | None:
        """Number of tokens that a query of a layer sees, its own included; None for all."""
        return None if layer in self.full_layers else self.sliding_window


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
class DeltaNetSpec:
    """A gated delta net (arXiv 2412.06464): linear attention whose keys and values are summed up in
    a state of fixed size, which a request has instead of a KV cache.

    Each value head has a matrix S [k_dim, v_dim], which a token decays by exp(g) and corrects:
    S += k (beta (v - S^T k))^T, and reads as S^T q. Queries, keys and values go through a causal
    convolution over the last ``taps`` tokens first, so the state has the inputs of ``taps`` - 1
    tokens, too. It is float32 whatever the model's dtype, since errors of it would add up."""

    layers: frozenset[int]
    """The layers that have it instead of attention."""
    k_heads: int
    """Number of query heads and of key heads; divides ``v_heads``."""
    v_heads: int
    k_dim: int
    v_dim: int
    taps: int
    """Tokens that the convolution sees, the current one included."""
    by_kind: bool = False
    """Whether the checkpoint has tensors of queries, keys and values, of output gates, of rates and
    of decays (Qwen3.5), not two tensors in the order of key heads."""

    @property
    def group_width(self) -> int:
        """Features that go through the convolution for one key head: its query, its key, and the
        values of its value heads."""
        return 2 * self.k_dim + self.v_heads // self.k_heads * self.v_dim

    @property
    def rows(self) -> int:
        """Rows of ``v_dim`` floats that the state of one key head takes in one layer: the matrices
        of its value heads, then the inputs of the convolution [taps - 1, group_width]."""
        inputs = (self.taps - 1) * self.group_width
        return self.v_heads // self.k_heads * self.k_dim + -(-inputs // self.v_dim)


@dataclass(frozen=True, kw_only=True)
class RouterSpec:
    """The rules by which tokens choose experts."""

    score: Literal["softmax", "sigmoid", "sparsemixer"]
    """What an expert's logit becomes. By sparsemixer a token chooses its experts one after another:
    the weight of one is its softmax over those left whose logits are close to its own (Phi-3.5-MoE,
    arXiv 2409.12136)."""
    top_k: int
    groups: int = 1
    """Number of groups of experts; a token chooses experts from its best ``top_groups`` groups."""
    top_groups: int = 1
    group_score: Literal["max", "top2_sum"] = "max"
    """A group's score: that of its best expert (DeepSeek-V2), or the sum of its best two (V3)."""
    logit_bias: bool = False
    """Whether the projection to the logits has a bias (gpt-oss)."""
    correction_bias: bool = False
    """Whether a bias is added to the scores for the choice of experts only (DeepSeek-V3)."""
    renormalize: bool = False
    """Whether the weights of the chosen experts are divided by their sum."""
    scale: float = 1.0
    """Factor by which the weights are multiplied last."""
    jitter: float = 0.0
    """Half the relative distance up to which logits are close to the largest (sparsemixer)."""
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
    biases: bool = False
    """Whether the projections of routed experts have biases."""
    swiglu_limit: float | None = None
    """Where experts compute down((up + 1) * gate * sigmoid(1.702 * gate)), with gate at most this
    and up between minus this and this (gpt-oss); None: they are plain gated MLPs."""
    weighs_input: bool = False
    """Whether a routed expert's weight is a factor on its input, not on its output (Llama 4)."""
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
    """The attention of the layers that have some."""
    ffn: tuple[FFNSpec, ...]
    """The FFN of each layer."""
    eos_token_ids: tuple[int, ...]
    delta_net: DeltaNetSpec | None = None
    """What some layers have instead of attention; None: all layers have attention."""
    quantization: Quantization | None = None
    """How matrices of the checkpoint are quantised; None when none is."""
    kv_cache_dtype: KVCacheDType = "auto"
    """How elements of the KV cache are held."""
    embed_scale: float = 1.0
    """Factor on the embeddings (Granite)."""
    logit_scale: float = 1.0
    """Factor on the logits (Granite)."""
    layer_norms: bool = False
    """Whether a layer's two norms and the final one are LayerNorms with biases (Phi-3.5-MoE);
    otherwise they are RMSNorms."""
    head_bias: bool = False
    """Whether the LM head has a bias (Phi-3.5-MoE)."""
    renamed: tuple[str, str] = ("", "")
    """What names of tensors begin with, and what stands instead of it in the checkpoint: that of a
    multimodal model names the tensors of its language model otherwise."""
    gguf: bool = False
    """Whether the checkpoint is a GGUF file, in which gate and up of all experts of a layer lie in
    one tensor each, whatever the family's checkpoints have."""
    cut_unit: int = 1
    """Multiple at which ranks cut intermediate dimensions, so that no two ranks need weights that
    share a scale."""

    @property
    def layers(self) -> int:
        return len(self.ffn)

    @property
    def kv_layers(self) -> int:
        """Number of layers that have KV: those with attention."""
        return self.layers - (len(self.delta_net.layers) if self.delta_net else 0)

    def kv_layer(self, layer: int) -> int:
        """Index of a layer with attention among those, as which the KV cache has it."""
        if self.delta_net is None:
            return layer
        return layer - sum(other < layer for other in self.delta_net.layers)

    def has_delta_net(self, layer: int) -> bool:
        """Whether a layer has a gated delta net instead of attention."""
        return self.delta_net is not None and layer in self.delta_net.layers

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
        return self.kv_layers * self.kv_width * DTYPE_BYTES[self.kv_dtype]

    @property
    def state_bytes(self) -> int:
        """Bytes of recurrent state per request over all layers, however long it is."""
        delta = self.delta_net
        if delta is None:
            return 0
        return len(delta.layers) * delta.k_heads * delta.rows * self.state_row

    @property
    def state_row(self) -> int:
        """Bytes of recurrent state that lie together in one page; 1 without any state."""
        return 1 if self.delta_net is None else 4 * self.delta_net.v_dim

    @property
    def kv_dtype(self) -> str:
        """The dtype of the KV cache's elements, a key of :data:`DTYPE_BYTES`."""
        return self.dtype if self.kv_cache_dtype == "auto" else self.kv_cache_dtype


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
    once: bool = False
    """Whether one alone of the tensor-parallel FFN ranks holds it, since their outputs are summed:
    the bias of a down projection."""
    keep_fp32: bool = False
    """Whether it is held in float32 whatever the model's dtype."""
    stack: Stack | None = None
    """Where it lies in a tensor of all experts, whose name ``name`` is; None: it is one of its
    own."""
    joined: Joined | None = None
    """The tensors whose rows it consists of; None: it is one tensor."""
    scheme: Scheme | None = None
    """How the checkpoint stores the matrix; None: as a tensor of floats."""
    zero_centred: bool = False
    """Whether the checkpoint stores what is to be added to one: the weight of Qwen3-Next's norms.
    It is in float32 then, as the sum would lose what is near zero."""

    @property
    def on_demand(self) -> bool:
        """Whether it is a matrix of a routed expert, which may be in memory on demand; its biases
        are in memory with the model."""
        return self.expert is not None and len(self.shape) > 1

    @property
    def module(self) -> str:
        """The name of what the tensor belongs to, by which checkpoints name the tensors of a
        quantised matrix."""
        return self.name.removesuffix(".weight")
