"""The description of a family that its file provides."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from crosspool.models.config_file import ConfigFile
from crosspool.models.spec import AttentionSpec, DeltaNetSpec, FFNSpec


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
    rows_last: bool = False
    """Whether rows are the last dimension of ``stacks``; else columns are."""
    alternates: bool = False
    """Whether the rows of gate and up alternate in the first of ``stacks``; else all rows of gate
    come before those of up."""
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
    """The name in published configs."""
    further_architectures: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    """Other names of the same, with :attr:`crosspool.models.spec.ModelSpec.renamed`."""
    attention: Callable[[ConfigFile, int], AttentionSpec]
    """Reads the attention, given the file and the hidden size."""
    ffn: Callable[[ConfigFile, int], tuple[FFNSpec, ...]]
    """Reads the FFN of every layer, given the file and the number of layers."""
    delta_net: Callable[[ConfigFile, int], DeltaNetSpec | None] = lambda config, layers: None
    """Likewise what some layers have instead of attention."""
    names: FFNNames = FFNNames()
    vocab: int
    hidden: int
    layers: int
    context: int
    qk_norms: tuple[str, str] = ("q_norm", "k_norm")
    """Names of the norms of q and k beneath ``model.layers.N.self_attn.``, where there are any."""
    norm_eps: float
    zero_centred: bool = False
    """Whether the weights of norms are stored as what is to be added to one; the norms of gated
    delta nets are not."""
    tied_embeddings: bool = False
    embed_factor: str | None = None
    """The config's field for a factor on embeddings; None: there is none."""
    logit_divisor: str | None = None
    """Likewise for a divisor of logits."""
    layer_norms: bool = False
    """Whether norms are LayerNorms with biases, not RMSNorms."""
    head_bias: str | None = None
    """The config's field for whether the LM head has a bias; None: it has none."""
    eos_token_id: int | None
