"""Lists the tensors of a spec: keys, names in the checkpoint, shapes and splits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from crosspool.models.family import FFNNames
from crosspool.models.schemes import Stack
from crosspool.models.spec import GQASpec, MLASpec, ModelSpec, MoEFFN, TensorRef


def attention_part(
    spec: ModelSpec, qk_norms: tuple[str, str]
) -> Iterator[tuple[int | None, TensorRef]]:
    """Yields every tensor of the attention part with its layer, None for the whole model's.
    ``qk_norms``: the names of the norms of q and k."""
    vocabulary = (spec.vocab, spec.hidden)
    yield None, TensorRef(key="embed", name="model.embed_tokens.weight", shape=vocabulary)
    for layer in range(spec.layers):
        prefix = f"model.layers.{layer}"
        for key, name in (
            ("input_norm", "input_layernorm"),
            ("post_norm", "post_attention_layernorm"),
        ):
            yield layer, TensorRef(key=key, name=f"{prefix}.{name}.weight", shape=(spec.hidden,))
        for key, name, shape in _projections(spec, qk_norms):
            yield layer, TensorRef(key=key, name=f"{prefix}.self_attn.{name}", shape=shape)
    yield None, TensorRef(key="final_norm", name="model.norm.weight", shape=(spec.hidden,))
    if not spec.tied_embeddings:
        yield None, TensorRef(key="lm_head", name="lm_head.weight", shape=vocabulary)


def _projections(
    spec: ModelSpec, qk_norms: tuple[str, str]
) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    attention = spec.attention
    if isinstance(attention, GQASpec):
        yield from _gqa(attention, spec.hidden, qk_norms)
    else:
        yield from _mla(attention, spec.hidden)


def _gqa(
    a: GQASpec, hidden: int, qk_norms: tuple[str, str]
) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    q, kv = a.q_heads * a.head_dim, a.kv_heads * a.head_dim
    for letter, width in (("q", q), ("k", kv), ("v", kv)):
        yield f"{letter}_proj", f"{letter}_proj.weight", (width, hidden)
        if a.qkv_bias:
            yield f"{letter}_bias", f"{letter}_proj.bias", (width,)
    yield "o_proj", "o_proj.weight", (hidden, q)
    if a.o_bias:
        yield "o_bias", "o_proj.bias", (hidden,)
    if a.sinks:
        yield "sinks", "sinks", (a.q_heads,)
    if a.qk_norm != "none":
        per_head = a.qk_norm != "full"
        q_norm, k_norm = qk_norms
        yield "q_norm", f"{q_norm}.weight", (a.head_dim if per_head else q,)
        yield "k_norm", f"{k_norm}.weight", (a.head_dim if per_head else kv,)


def _mla(a: MLASpec, hidden: int) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    q = a.q_heads * (a.qk_nope_head_dim + a.qk_rope_head_dim)
    latent = a.kv_lora_rank
    if a.q_lora_rank is None:
        yield "q_proj", "q_proj.weight", (q, hidden)
    else:
        yield "q_a_proj", "q_a_proj.weight", (a.q_lora_rank, hidden)
        if a.qkv_bias:
            yield "q_a_bias", "q_a_proj.bias", (a.q_lora_rank,)
        yield "q_a_norm", "q_a_layernorm.weight", (a.q_lora_rank,)
        yield "q_b_proj", "q_b_proj.weight", (q, a.q_lora_rank)
    yield "kv_a_proj", "kv_a_proj_with_mqa.weight", (latent + a.qk_rope_head_dim, hidden)
    if a.qkv_bias:
        yield "kv_a_bias", "kv_a_proj_with_mqa.bias", (latent + a.qk_rope_head_dim,)
    yield "kv_a_norm", "kv_a_layernorm.weight", (latent,)
    expanded = a.q_heads * (a.qk_nope_head_dim + a.v_head_dim)
    yield "kv_b_proj", "kv_b_proj.weight", (expanded, latent)
    yield "o_proj", "o_proj.weight", (hidden, a.q_heads * a.v_head_dim)
    if a.qkv_bias:
        yield "o_bias", "o_proj.bias", (hidden,)


def ffn_part(spec: ModelSpec, layer: int, names: FFNNames) -> Iterator[TensorRef]:
    """Yields every tensor of one layer's FFN part."""
    ffn = spec.ffn[layer]
    block = f"model.layers.{layer}.{names.block}"
    if not isinstance(ffn, MoEFFN):
        yield from _gated("mlp", block, names, spec.hidden, ffn.intermediate)
        return
    router = ffn.router
    yield TensorRef(
        key="router",
        name=f"{block}.{names.router}.weight",
        shape=(ffn.experts, spec.hidden),
        keep_fp32=router.fp32_logits,
    )
    if router.logit_bias:
        yield TensorRef(key="logit_bias", name=f"{block}.{names.router}.bias", shape=(ffn.experts,))
    if router.correction_bias:
        yield TensorRef(
            key="router_bias",
            name=f"{block}.{names.correction_bias}",
            shape=(1, ffn.experts) if names.bias_in_row else (ffn.experts,),
            keep_fp32=True,
        )
    for expert in range(ffn.experts):
        if names.stacks is not None:
            yield from _stacked(block, names, spec.hidden, ffn, expert)
            continue
        prefix = f"{block}.experts.{expert}"
        yield from _gated(
            f"experts.{expert}", prefix, names, spec.hidden, ffn.intermediate, expert=expert
        )
    if ffn.shared_intermediate:
        prefix = f"model.layers.{layer}.{names.shared}"
        yield from _gated("shared", prefix, names, spec.hidden, ffn.shared_intermediate)
    if ffn.shared_gate:
        name = f"model.layers.{layer}.{names.shared_gate}.weight"
        yield TensorRef(
            key="shared_gate", name=name, shape=(1, spec.hidden), keep_fp32=router.fp32_logits
        )


def _gated(
    key: str,
    prefix: str,
    names: FFNNames,
    hidden: int,
    intermediate: int,
    *,
    expert: int | None = None,
) -> Iterator[TensorRef]:
    for part, name in (("gate", names.gate), ("up", names.up), ("down", names.down)):
        down = part == "down"
        yield TensorRef(
            key=f"{key}.{part}",
            name=f"{prefix}.{name}.weight",
            shape=(hidden, intermediate) if down else (intermediate, hidden),
            split=1 if down else 0,
            expert=expert,
        )


def _stacked(
    block: str, names: FFNNames, hidden: int, ffn: MoEFFN, expert: int
) -> Iterator[TensorRef]:
    """One expert's places in the tensors of all experts of a layer."""
    assert names.stacks is not None
    width, turns = ffn.intermediate, names.alternates
    both, down = (f"{block}.{name}" for name in names.stacks)
    gate = Stack(
        index=expert,
        count=ffn.experts,
        height=2 * width,
        step=2 if turns else 1,
        rows_last=turns,
    )
    places = (
        ("gate", both, (width, hidden), gate),
        ("up", both, (width, hidden), replace(gate, first=1 if turns else width)),
        ("down", down, (hidden, width), replace(gate, height=hidden, step=1)),
    )
    for part, name, shape, stack in places:
        is_down = part == "down"
        key = f"experts.{expert}.{part}"
        yield TensorRef(
            key=key, name=name, shape=shape, split=1 if is_down else 0, expert=expert, stack=stack
        )
        if ffn.biases:
            yield TensorRef(
                key=f"{key}_bias",
                name=f"{name}_bias",
                shape=shape[:1],
                split=None if is_down else 0,
                expert=expert,
                once=is_down,
                stack=stack,
            )
