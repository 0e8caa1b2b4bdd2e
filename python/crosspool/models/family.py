"""The description of a family that its file provides."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from crosspool.models.config_file import ConfigFile
from crosspool.models.spec import AttentionSpec, FFNSpec


@dataclass(frozen=True, kw_only=True)
class FFNNames:
    """Names of FFN tensors in a family's checkpoints, beneath ``model.layers.N.``."""

    block: str = "mlp"
    """Prefix of the router, its bias, the experts, and of a dense layer's projections."""
    router: str = "gate"
    """The router, beneath ``block``."""
    correction_bias: str = "gate.e_score_correction_bias"
    bias_in_row: bool = False
    """Whether the correction bias is a matrix of one row."""
    stacks: tuple[str, str] | None = None
    """Tensors that hold gate and up, and down, of all experts of a layer; None: every expert has
    tensors of its own."""
    alternates: bool = False
    """Whether the rows of gate and up alternate in the first of ``stacks``, in which rows are the
    last dimension; else all rows of gate come before those of up, and columns are the last."""
    shared: str = "mlp.shared_experts"
    shared_gate: str = "mlp.shared_expert_gate"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"


@dataclass(frozen=True, kw_only=True)
class Family:
    """A family of models. Its numbers are transformers' defaults for fields that a config.json may
    leave out."""

    model_type: str
    architecture: str
    attention: Callable[[ConfigFile, int], AttentionSpec]
    """Reads the attention, given the file and the hidden size."""
    ffn: Callable[[ConfigFile, int], tuple[FFNSpec, ...]]
    """Reads the FFN of every layer, given the file and the number of layers."""
    names: FFNNames = FFNNames()
    vocab: int
    hidden: int
    layers: int
    context: int
    qk_norms: tuple[str, str] = ("q_norm", "k_norm")
    """Names of the norms of q and k beneath ``model.layers.N.self_attn.``, where there are any."""
    norm_eps: float
    tied_embeddings: bool = False
    embed_factor: str | None = None
    """The config's field for a factor on embeddings; None: there is none."""
    logit_divisor: str | None = None
    """Likewise for a divisor of logits."""
    eos_token_id: int | None
