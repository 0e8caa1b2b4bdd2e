"""A model's shape: enough of a ``config.json`` to count its bytes, for the planner.

Unlike :mod:`crosspool.models.spec` it also describes models that the server does not run, dense
ones among them. :mod:`crosspool.planner.shapes.reader` reads one from a file,
:mod:`crosspool.planner.shapes.catalogue` has those of public models. Example::

    shape = catalogue.load("Qwen3-30B-A3B")
    shape.kv_bytes_per_token, round(shape.ffn_share, 3)  # (98304, 0.95)
"""

from __future__ import annotations

from typing import Literal

import msgspec

from crosspool.models.spec import KVCacheDType

AttentionKind = Literal["mha", "gqa", "mqa", "mla"]
_FP32_BYTES = 4


class ModelShape(msgspec.Struct, frozen=True, kw_only=True):
    """Sizes of one model. Weights are counted in ``dtype_bytes``, as GPUs hold them, unless the
    bytes of their codes are given, which CPUs hold. Layers for multi-token prediction, which some
    checkpoints carry, are left out."""

    id: str
    layers: int
    hidden: int
    vocab: int
    context: int
    """Longest sequence in tokens."""
    attention: AttentionKind
    q_heads: int
    kv_heads: int
    """1 for MLA: all query heads read one latent."""
    head_dim: int
    """Features of a query head and, but for MLA, of a KV head."""
    kv_lora_rank: int = 0
    """Features of MLA's latent; 0 without MLA."""
    q_lora_rank: int = 0
    """Features of MLA's query latent; 0 where queries are projected at once."""
    qk_rope_head_dim: int = 0
    v_head_dim: int = 0
    """Value features of an MLA head."""
    sliding_layers: int = 0
    """Number of layers whose queries see only ``sliding_window`` tokens."""
    sliding_window: int | None = None
    experts: int = 0
    """Routed experts of an MoE layer; 0 for a dense model."""
    top_k: int = 0
    """Routed experts that a token is sent to."""
    moe_intermediate: int = 0
    shared_intermediate: int = 0
    """Intermediate size of all shared experts together; 0 without any."""
    dense_layers: int = 0
    """Layers with a dense FFN; the others are MoE layers."""
    dense_intermediate: int = 0
    tied_embeddings: bool = False
    dtype_bytes: int = 2
    kv_cache_dtype: KVCacheDType = "auto"
    """How the KV cache is held; auto: in the dtype."""
    held_attention_bytes: int | None = None
    """Bytes of weights outside the FFNs where quantised ones are held as codes; None: all are in
    the dtype."""
    held_ffn_bytes: int | None = None
    """The same for FFN weights."""

    qkv_bias: bool = False
    """The q, k and v projections have biases; with MLA, the projections into the latents."""
    o_bias: bool = False
    qk_norm: Literal["none", "head", "full"] = "none"
    """RMSNorm of q and k: none, per head, or over all heads at once."""
    sinks: bool = False
    """Every query head has a learnt attention sink (gpt-oss)."""
    norm_bias: bool = False
    lm_head_bias: bool = False
    ffn_bias: bool = False
    """The gate, up and down projections of every FFN have biases."""
    router_bias: bool = False
    correction_bias: bool = False
    """Every expert has a float32 bias for the choice of experts only (DeepSeek-V3)."""
    router_fp32: bool = False
    """The router's weight is held in float32 whatever the model's dtype."""
    shared_gate: bool = False
    """The shared experts have a gate of one output in front of them (Qwen1.5-MoE)."""
    gated: bool = False
    """What a query head attends to has a gate, so that ``q_proj`` is twice as wide (Qwen3-Next)."""
    delta_layers: int = 0
    """Number of layers with a gated delta net instead of attention."""
    delta_parameters: int = 0
    """Parameters of the gated delta net of one layer."""
    state_bytes: int = 0
    """Bytes of recurrent state per request over all layers; 0 for none."""
    state_row: int = 1
    """Bytes of recurrent state that lie together in one page."""
    fp32_parameters: int = 0
    """Parameters outside the FFNs that are held in float32 whatever the model's dtype."""

    @property
    def moe_layers(self) -> int:
        return self.layers - self.dense_layers

    @property
    def kv_width(self) -> int:
        """KV elements per token and layer: K and V of every KV head, or the MLA latent and rope
        key."""
        if self.attention == "mla":
            return self.kv_lora_rank + self.qk_rope_head_dim
        return 2 * self.kv_heads * self.head_dim

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of KV cache per token over all layers (the paper's kappa). Layers with a sliding
        window count in full: the paged cache holds every token of a request in every layer."""
        each = self.dtype_bytes if self.kv_cache_dtype == "auto" else 1
        return (self.layers - self.delta_layers) * self.kv_width * each

    @property
    def embedding_parameters(self) -> int:
        """Parameters of the token embedding and the LM head."""
        tables = 1 if self.tied_embeddings else 2
        return tables * self.vocab * self.hidden + (self.vocab if self.lm_head_bias else 0)

    @property
    def attention_parameters(self) -> int:
        """Parameters outside the FFNs: attention, norms, embeddings, LM head."""
        mixers = (self.layers - self.delta_layers) * self._layer_attention
        mixers += self.delta_layers * self.delta_parameters
        norms = (2 * self.layers + 1) * self._norm
        return mixers + norms + self.embedding_parameters

    @property
    def ffn_parameters(self) -> int:
        """Parameters of routers, experts, shared experts and dense FFNs in all layers."""
        moe = self._router + self.experts * self._gated(self.moe_intermediate) + self._shared
        return self.moe_layers * moe + self.dense_layers * self._gated(self.dense_intermediate)

    @property
    def parameters(self) -> int:
        return self.attention_parameters + self.ffn_parameters

    @property
    def ffn_bytes(self) -> int:
        """Bytes of FFN weights, which the weight pool holds."""
        return self._float_ffn_bytes if self.held_ffn_bytes is None else self.held_ffn_bytes

    @property
    def attention_bytes(self) -> int:
        """Bytes of all weights outside the FFNs, which every attention rank holds."""
        if self.held_attention_bytes is not None:
            return self.held_attention_bytes
        wider = max(0, _FP32_BYTES - self.dtype_bytes)
        return self.attention_parameters * self.dtype_bytes + self.fp32_parameters * wider

    @property
    def embedding_bytes(self) -> int:
        """The part of ``attention_bytes`` that is token embedding and LM head."""
        return self.embedding_parameters * self.dtype_bytes

    @property
    def weight_bytes(self) -> int:
        return self.ffn_bytes + self.attention_bytes

    @property
    def ffn_share(self) -> float:
        """Share of the parameters that are in FFNs, 0 to 1 (the paper's Table 1)."""
        return self.ffn_parameters / self.parameters

    @property
    def active_ffn_bytes_per_token(self) -> int:
        """Bytes of FFN weights that are read for one token in all layers. Codes are taken to be
        spread over all FFN weights alike."""
        active = self._active_ffn * self.dtype_bytes + self.moe_layers * self._router_fp32_bytes
        return active * self.ffn_bytes // self._float_ffn_bytes

    @property
    def _float_ffn_bytes(self) -> int:
        """Bytes of FFN weights in the dtype."""
        return self.ffn_parameters * self.dtype_bytes + self.moe_layers * self._router_fp32_bytes

    @property
    def _norm(self) -> int:
        return self.hidden * (2 if self.norm_bias else 1)

    @property
    def _layer_attention(self) -> int:
        return self._mla if self.attention == "mla" else self._gqa

    @property
    def _gqa(self) -> int:
        q, kv = self.q_heads * self.head_dim, self.kv_heads * self.head_dim
        norms = {"none": 0, "head": 2 * self.head_dim, "full": q + kv}[self.qk_norm]
        projected = (2 * q if self.gated else q) + 2 * kv
        biases = (projected if self.qkv_bias else 0) + (self.hidden if self.o_bias else 0)
        sinks = self.q_heads if self.sinks else 0
        return self.hidden * (projected + q) + norms + biases + sinks

    @property
    def _mla(self) -> int:
        nope = self.head_dim - self.qk_rope_head_dim
        q, kv = self.q_heads * self.head_dim, self.q_heads * (nope + self.v_head_dim)
        rank, latent = self.q_lora_rank, self.kv_lora_rank
        query = rank * (self.hidden + 1 + q) if rank else self.hidden * q
        key = self.hidden * (latent + self.qk_rope_head_dim) + latent + latent * kv
        biases = rank + latent + self.qk_rope_head_dim if self.qkv_bias else 0
        biases += self.hidden if self.o_bias else 0
        return query + key + self.q_heads * self.v_head_dim * self.hidden + biases

    def _gated(self, intermediate: int) -> int:
        biases = 2 * intermediate + self.hidden if self.ffn_bias else 0
        return 3 * self.hidden * intermediate + biases

    @property
    def _shared(self) -> int:
        if not self.shared_intermediate:
            return 0
        gate = self.hidden if self.shared_gate else 0
        return self._gated(self.shared_intermediate) + gate

    @property
    def _router(self) -> int:
        return self.experts * (self.hidden + self.router_bias + self.correction_bias)

    @property
    def _router_fp32_bytes(self) -> int:
        """Bytes that a layer's router takes beyond its size in the model's dtype."""
        fp32 = self.hidden * self.router_fp32 + self.correction_bias
        return self.experts * fp32 * (_FP32_BYTES - self.dtype_bytes)

    @property
    def _active_ffn(self) -> int:
        moe = self._router + self.top_k * self._gated(self.moe_intermediate) + self._shared
        return self.moe_layers * moe + self.dense_layers * self._gated(self.dense_intermediate)
