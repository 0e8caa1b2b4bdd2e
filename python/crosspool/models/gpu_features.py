"""What a model may have that the GPU's kernels do not compute yet."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from crosspool.config.errors import ConfigError
from crosspool.models.spec import GQASpec, ModelSpec, MoEFFN

if TYPE_CHECKING:
    from crosspool.config.deployment import ModelConfig


def check_features(model: ModelConfig, spec: ModelSpec) -> None:
    """Raises ConfigError that names what of the model the GPU's kernels do not compute."""
    if lacking := ", ".join(_lacking(spec)):
        raise ConfigError(
            f"{model.name}: model_type={spec.family!r} is served on CPUs alone, since the GPU's "
            f"kernels do not compute {lacking}: name CPUs in kv_pool_devices and "
            "weight_pool_devices"
        )


def _lacking(spec: ModelSpec) -> Iterator[str]:
    attention = spec.attention
    moes = [ffn for ffn in dict.fromkeys(spec.ffn) if isinstance(ffn, MoEFFN)]
    factors = {spec.embed_scale, spec.logit_scale}
    if isinstance(attention, GQASpec):
        if attention.rope.dim != attention.head_dim:
            yield "heads that rotate in part"
        if attention.qk_norm.endswith("rotated head"):
            yield "norms of rotated heads"
        if attention.sinks:
            yield "attention sinks"
        if attention.sliding_window is not None and attention.full_layers:
            yield "sliding windows in some layers alone"
        if attention.chunked:
            yield "attention within chunks"
        if attention.unrotated_layers:
            yield "layers without rotations"
        if attention.gated:
            yield "gates on what heads attend to"
        factors.add(attention.out_scale)
    if spec.layer_norms:
        yield "LayerNorms"
    if spec.head_bias:
        yield "a bias of the LM head"
    if spec.delta_net is not None:
        yield "gated delta nets"
    if factors != {1.0}:
        yield "factors on embeddings, attention or logits"
    if any(moe.weighs_input for moe in moes):
        yield "weights of experts on their inputs"
    if any(moe.shared_gate for moe in moes):
        yield "a shared expert with a gate"
    if any(moe.swiglu_limit is not None for moe in moes):
        yield "clamped SwiGLU"
    if any(moe.biases for moe in moes):
        yield "biases of experts"
    if any(moe.router.score == "sparsemixer" for moe in moes):
        yield "routing by sparsemixer"
    if any(moe.router.logit_bias for moe in moes):
        yield "biases of routers"
