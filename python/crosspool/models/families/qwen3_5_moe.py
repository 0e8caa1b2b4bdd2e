"""Qwen3.5-MoE (``qwen3_5_moe_text``): as Qwen3-Next, but every layer has routed experts, which lie
in common tensors, and the projections of gated delta nets are apart by what they are.

A published config is that of a multimodal model, of which the language model is served."""

from __future__ import annotations

from dataclasses import replace

from crosspool.models.config_file import ConfigFile
from crosspool.models.delta_net import delta_net, gated_attention
from crosspool.models.family import Family, FFNNames
from crosspool.models.moe import softmax_moe
from crosspool.models.spec import DeltaNetSpec, FFNSpec


def _delta_net(config: ConfigFile, layers: int) -> DeltaNetSpec | None:
    spec = delta_net(config, layers)
    return None if spec is None else replace(spec, by_kind=True)


def _ffn(config: ConfigFile, layers: int) -> tuple[FFNSpec, ...]:
    routed = softmax_moe(
        config,
        experts=256,
        top_k=8,
        intermediate=config.integer("moe_intermediate_size", 512),
        renormalize=True,
    )
    shared = config.integer("shared_expert_intermediate_size", 512)
    return (replace(routed, shared_intermediate=shared, shared_gate=True),) * layers


QWEN3_5_MOE_TEXT = Family(
    model_type="qwen3_5_moe_text",
    architecture="Qwen3_5MoeForCausalLM",
    further_architectures={
        "Qwen3_5MoeForConditionalGeneration": ("model.", "model.language_model.")
    },
    attention=gated_attention,
    ffn=_ffn,
    delta_net=_delta_net,
    names=FFNNames(
        shared="mlp.shared_expert", stacks=("experts.gate_up_proj", "experts.down_proj")
    ),
    vocab=248320,
    hidden=2048,
    layers=40,
    context=32768,
    norm_eps=1e-6,
    zero_centred=True,
    eos_token_id=None,
)
