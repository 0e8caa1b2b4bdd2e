"""Lists the tensors of a spec: keys, names in the checkpoint, shapes and splits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from crosspool.models.family import FFNNames
from crosspool.models.schemes import Joined, RowRange, Stack
from crosspool.models.spec import DeltaNetSpec, GQASpec, MLASpec, ModelSpec, MoEFFN, TensorRef

_NORMS = ("input_norm", "post_norm", "final_norm", "q_norm", "k_norm")
"""Norms that may be zero-centred."""


def attention_part(
    spec: ModelSpec, qk_norms: tuple[str, str], *, zero_centred: bool = False
) -> Iterator[tuple[int | None, TensorRef]]:
    """Yields every tensor of the attention part with its layer, None for the whole model's.
    ``qk_norms``: the names of the norms of q and k. ``zero_centred``: whether the weights of norms
    are stored as what is to be added to one."""
    for layer, ref in _attention_part(spec, qk_norms):
        centred = zero_centred and ref.key in _NORMS
        yield layer, replace(ref, zero_centred=True, keep_fp32=True) if centred else ref


def _attention_part(
    spec: ModelSpec, qk_norms: tuple[str, str]
) -> Iterator[tuple[int | None, TensorRef]]:
    vocabulary = (spec.vocab, spec.hidden)
    yield None, TensorRef(key="embed", name="model.embed_tokens.weight", shape=vocabulary)
    for layer in range(spec.layers):
        prefix = f"model.layers.{layer}"
        for key, name in (
            ("input_norm", "input_layernorm"),
            ("post_norm", "post_attention_layernorm"),
        ):
            yield from ((layer, ref) for ref in _norm(spec, key, f"{prefix}.{name}"))
        if spec.delta_net is not None and layer in spec.delta_net.layers:
            yield from ((layer, ref) for ref in _delta_net(spec.delta_net, spec.hidden, prefix))
            continue
        for key, name, shape in _projections(spec, qk_norms):
            yield layer, TensorRef(key=key, name=f"{prefix}.self_attn.{name}", shape=shape)
    yield from ((None, ref) for ref in _norm(spec, "final_norm", "model.norm"))
    if not spec.tied_embeddings:
        yield None, TensorRef(key="lm_head", name="lm_head.weight", shape=vocabulary)
    if spec.head_bias:
        yield None, TensorRef(key="head_bias", name="lm_head.bias", shape=(spec.vocab,))


def _norm(spec: ModelSpec, key: str, name: str) -> Iterator[TensorRef]:
    """Yields the tensors of a norm of hidden states."""
    yield TensorRef(key=key, name=f"{name}.weight", shape=(spec.hidden,))
    if spec.layer_norms:
        yield TensorRef(key=f"{key}_bias", name=f"{name}.bias", shape=(spec.hidden,))


def _delta_net(d: DeltaNetSpec, hidden: int, prefix: str) -> Iterator[TensorRef]:
    """The projection has for each key head its query, its key, and the values and output gates of
    its value heads; that of the rates beta and decays likewise."""
    keys, values = d.k_heads * d.k_dim, d.v_heads * d.v_dim
    for key, name, shape, fp32 in (
        ("qkvz_proj", "in_proj_qkvz.weight", (2 * keys + 2 * values, hidden), False),
        ("ba_proj", "in_proj_ba.weight", (2 * d.v_heads, hidden), False),
        ("conv", "conv1d.weight", (2 * keys + values, 1, d.taps), False),
        ("decay", "A_log", (d.v_heads,), True),
        ("decay_bias", "dt_bias", (d.v_heads,), True),
        ("out_norm", "norm.weight", (d.v_dim,), False),
        ("o_proj", "out_proj.weight", (hidden, values), False),
    ):
        ref = TensorRef(key=key, name=f"{prefix}.linear_attn.{name}", shape=shape, keep_fp32=fp32)
        yield _by_kind(ref, d, f"{prefix}.linear_attn") if d.by_kind else ref


def _by_kind(ref: TensorRef, d: DeltaNetSpec, block: str) -> TensorRef:
    """Puts a projection in the order of key heads together from tensors by kind."""
    keys, values = d.k_heads * d.k_dim, d.v_heads * d.v_dim
    places = {
        "qkvz_proj": (
            ("qkv", 2 * keys + values, 0, keys),
            ("qkv", 2 * keys + values, keys, keys),
            ("qkv", 2 * keys + values, 2 * keys, values),
            ("z", values, 0, values),
        ),
        "ba_proj": (("b", d.v_heads, 0, d.v_heads), ("a", d.v_heads, 0, d.v_heads)),
    }.get(ref.key)
    if places is None:
        return ref
    parts = tuple(RowRange(f"{block}.in_proj_{name}.weight", *place) for name, *place in places)
    return replace(ref, name=parts[0].name, joined=Joined(groups=d.k_heads, parts=parts))


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
    for letter, width in (("q", 2 * q if a.gated else q), ("k", kv), ("v", kv)):
        yield f"{letter}_proj", f"{letter}_proj.weight", (width, hidden)
        if a.qkv_bias:
            yield f"{letter}_bias", f"{letter}_proj.bias", (width,)
    yield "o_proj", "o_proj.weight", (hidden, q)
    if a.o_bias:
        yield "o_bias", "o_proj.bias", (hidden,)
    if a.sinks:
        yield "sinks", "sinks", (a.q_heads,)
    if a.qk_norm not in ("none", "unweighted rotated head"):
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
        if names.stacks is not None and not spec.gguf:
            yield from _stacked(block, names, spec.hidden, ffn, expert)
            continue
        key, prefix = f"experts.{expert}", f"{block}.experts.{expert}"
        for ref in _gated(key, prefix, names, spec.hidden, ffn.intermediate, expert=expert):
            yield ref
            if ffn.biases:
                yield _bias_of(ref, f"{ref.name.removesuffix('.weight')}.bias")
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
        rows_last=names.rows_last,
    )
    places = (
        ("gate", both, (width, hidden), gate),
        ("up", both, (width, hidden), replace(gate, first=1 if turns else width)),
        ("down", down, (hidden, width), replace(gate, height=hidden, step=1)),
    )
    for part, name, shape, stack in places:
        ref = TensorRef(
            key=f"experts.{expert}.{part}",
            name=name,
            shape=shape,
            split=1 if part == "down" else 0,
            expert=expert,
            stack=stack,
        )
        yield ref
        if ffn.biases:
            yield _bias_of(ref, f"{name}_bias")


def _bias_of(ref: TensorRef, name: str) -> TensorRef:
    """The bias of a projection of an expert."""
    down = ref.split == 1
    return replace(
        ref,
        key=f"{ref.key}_bias",
        name=name,
        shape=ref.shape[:1],
        split=None if down else 0,
        once=down,
    )
