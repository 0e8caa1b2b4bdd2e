"""A model's attention part on an attention rank: embeddings, norms, attention, LM head."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F

from crosspool.kernels.attention import append_kv, gqa_attention, mla_attention
from crosspool.kernels.delta_net import (
    DeltaState,
    DeltaWeights,
    by_key_head,
    delta_step,
    state_cells,
)
from crosspool.kernels.linear import bmm, linear
from crosspool.kernels.norm import layer_norm, rms_norm, scaled, sigmoid
from crosspool.kernels.rope import (
    divided_frequencies,
    query_factors,
    rope_frequencies,
    rope_tables,
    rotate,
    unscaled_frequencies,
)
from crosspool.models.gguf_config import config_of
from crosspool.models.registry import attention_tensors
from crosspool.models.rope import divided_rotations, unscaled_base
from crosspool.models.spec import DeltaNetSpec, GQASpec, MLASpec, ModelSpec, RopeSpec
from crosspool.observability.progress import Progress
from crosspool.ranks.host.step_batch import StepBatch
from crosspool.ranks.weights import TORCH_DTYPES, TensorListing, fill
from crosspool.weightpool.checkpoint import Read

Weights = dict[str, torch.Tensor]
"""One layer's tensors by key."""


class AttentionPart:
    """The attention part of one model.

    Example: one step, with ``ffn`` for dispatch and combine::

    part = AttentionPart(spec, path, progress=bar.update)
    residual = part.embed(token_ids)
    for layer in range(spec.layers):
        residual, normed = part.attend(layer, residual, batch, kv)
        residual = residual + ffn(layer, normed)
    logits = part.logits(residual[last_rows])
    """

    def __init__(self, spec: ModelSpec, path: Path, progress: Progress) -> None:
        """Loads the weights; ``progress`` is called with bytes read.

        Raises ConfigError when the checkpoint lacks a tensor or has another shape than its
        config.json says."""
        self._spec = spec
        self._globals: Weights = {}
        self._layers: list[Weights] = [{} for _ in range(spec.layers)]
        reads: list[tuple[int | None, Read]] = []
        for layer, ref in attention_tensors(spec):
            dtype = torch.float32 if ref.keep_fp32 else TORCH_DTYPES[spec.dtype]
            tensor = torch.empty(ref.shape, dtype=dtype)
            weights = self._globals if layer is None else self._layers[layer]
            weights[ref.key] = tensor
            whole = tuple(slice(0, size) for size in ref.shape)
            reads.append((layer, Read(ref, whole, tensor)))
        self._listing = fill(path, reads, progress)
        head = "embed" if spec.tied_embeddings else "lm_head"
        self._lm_head = self._globals[head]
        self._inv_freq, self._rope_scaling = frequencies(spec, path)
        attention = spec.attention
        self._attention = (
            _GQA(attention, spec) if isinstance(attention, GQASpec) else _MLA(attention, spec)
        )
        self._delta_net = (
            None if spec.delta_net is None else _DeltaNet(spec.delta_net, spec.norm_eps)
        )

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Embeds tokens: int64 [T] -> [T, hidden] in the model's dtype."""
        return scaled(F.embedding(token_ids, self._globals["embed"]), self._spec.embed_scale)

    def attend(
        self, layer: int, residual: torch.Tensor, batch: StepBatch, kv: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One layer's attention part: input norm, attention over ``kv`` [pages, kv_layers,
        page_size, kv_width] after the batch's own KV went into it, residual sum, post-attention
        norm. A gated delta net takes the place of attention where the layer has one.

        ``residual`` [T, hidden] -> the new residual and what is dispatched, [T, hidden] each."""
        weights = self._layers[layer]
        if batch.rope is None:
            batch.rope = self._rope(batch.positions)
        x = self._norm(residual, weights, "input_norm")
        if self._delta_net is not None and self._spec.has_delta_net(layer):
            mixed = self._delta_net.forward(layer, x, weights, batch, kv)
        else:
            mixed = self._attention.forward(layer, x, weights, batch, kv)
        residual = residual + mixed
        return residual, self._norm(residual, weights, "post_norm")

    def logits(self, residual_rows: torch.Tensor) -> torch.Tensor:
        """Final norm and LM head: [N, hidden] -> float32 [N, vocab]."""
        x = self._norm(residual_rows, self._globals, "final_norm")
        logits = linear(x, self._lm_head, self._globals.get("head_bias"))
        return scaled(logits, self._spec.logit_scale).float()

    def tensors(self) -> list[TensorListing]:
        """Lists every tensor that the part holds."""
        return self._listing

    def _norm(self, x: torch.Tensor, weights: Weights, key: str) -> torch.Tensor:
        """Norms hidden states [T, hidden] by the model's kind of norm."""
        if self._spec.layer_norms:
            return layer_norm(x, weights[key], weights[f"{key}_bias"], self._spec.norm_eps)
        return rms_norm(x, weights[key], self._spec.norm_eps)

    def _rope(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        cos, sin = rope_tables(positions, self._inv_freq, self._rope_scaling)
        if self._spec.attention.rope.fp32:
            return cos, sin
        dtype = TORCH_DTYPES[self._spec.dtype]
        return cos.to(dtype), sin.to(dtype)


def frequencies(spec: ModelSpec, path: Path) -> tuple[torch.Tensor, float]:
    """Returns rope frequencies, as transformers reads them from the config, and the factor on cos
    and sin. Importing transformers takes longer than torch: it is needed only where the
    frequencies are scaled or the config leaves their base to the family."""
    dim, config = spec.attention.rope.dim, config_of(path)
    base = unscaled_base(config, dim)
    if base is not None:
        return unscaled_frequencies(base, dim), 1.0
    if divided := divided_rotations(config, spec.context):
        return divided_frequencies(divided.base, divided.divisors), divided.factor
    from transformers import AutoConfig

    fields = dict(config.values)
    fields.pop("model_type", None)
    return rope_frequencies(AutoConfig.for_model(spec.family, **fields), dim)


def _rotate(x: torch.Tensor, batch: StepBatch, rope: RopeSpec) -> torch.Tensor:
    """Rotates the first ``rope.dim`` features of the heads of ``x`` [T, heads, dim]."""
    assert batch.rope is not None
    if x.shape[-1] == rope.dim:
        return rotate(x, *batch.rope, rope.interleaved)
    rotated = rotate(x[..., : rope.dim], *batch.rope, rope.interleaved)
    return torch.cat((rotated, x[..., rope.dim :]), dim=-1)


class _GQA:
    def __init__(self, spec: GQASpec, model: ModelSpec) -> None:
        self._spec = spec
        self._norm_eps = model.norm_eps
        self._kv_layer = model.kv_layer

    def forward(
        self, layer: int, x: torch.Tensor, w: Weights, batch: StepBatch, kv: torch.Tensor
    ) -> torch.Tensor:
        spec, kv_layer = self._spec, self._kv_layer(layer)
        q, k, v = (linear(x, w[f"{name}_proj"], w.get(f"{name}_bias")) for name in "qkv")
        gate: torch.Tensor | None = None
        if spec.gated:
            q, gate = (part.flatten(1) for part in q.unflatten(1, (-1, 2, spec.head_dim)).unbind(2))
        q, k = self._ruled(q, w, "q_norm"), self._ruled(k, w, "k_norm")
        v = self._ruled(v, w, None)
        q = q.unflatten(1, (spec.q_heads, spec.head_dim))
        k = k.unflatten(1, (spec.kv_heads, spec.head_dim))
        if layer in spec.unrotated_layers:
            q = self._tempered(q, batch)
        else:
            q, k = (_rotate(heads, batch, spec.rope) for heads in (q, k))
            if spec.qk_norm.endswith("rotated head"):
                q = rms_norm(q, w.get("q_norm"), self._norm_eps)
                k = rms_norm(k, w.get("k_norm"), self._norm_eps)
        append_kv(kv, kv_layer, batch.slots(kv.shape[2]), torch.cat((k.flatten(1), v), dim=1))
        out = gqa_attention(
            q,
            kv,
            kv_layer,
            batch.segments,
            kv_heads=spec.kv_heads,
            scale=spec.scale,
            window=spec.window(layer),
            chunked=spec.chunked,
            sinks=w.get("sinks"),
        ).flatten(1)
        if gate is not None:
            out = (out * sigmoid(gate)).to(x.dtype)
        return scaled(linear(out, w["o_proj"], w.get("o_bias")), spec.out_scale)

    def _tempered(self, q: torch.Tensor, batch: StepBatch) -> torch.Tensor:
        """Queries [T, q_heads, head_dim] of an unrotated layer with the factors of their
        positions."""
        tuning = self._spec.temperature
        if tuning is None:
            return q
        factors = query_factors(batch.positions, tuning.scale, tuning.floor)
        return (q * factors[:, None, None]).to(q.dtype)

    def _ruled(self, out: torch.Tensor, w: Weights, norm: str | None) -> torch.Tensor:
        """Returns q, k or v of all heads [T, heads * head_dim] normed by the weight ``norm``, where
        the model has such norms, and clamped."""
        spec = self._spec
        if norm is not None and spec.qk_norm in ("head", "full"):
            width = spec.head_dim if spec.qk_norm == "head" else out.shape[1]
            out = rms_norm(out.unflatten(1, (-1, width)), w[norm], self._norm_eps).flatten(1)
        return out if spec.qkv_clip is None else out.clamp(-spec.qkv_clip, spec.qkv_clip)


class _DeltaNet:
    """A gated delta net. Its rows are computed one after another, so that a row comes out the same
    in a chunk of any length."""

    def __init__(self, spec: DeltaNetSpec, norm_eps: float) -> None:
        self._spec = spec
        self._norm_eps = norm_eps

    def forward(
        self, layer: int, x: torch.Tensor, w: Weights, batch: StepBatch, kv: torch.Tensor
    ) -> torch.Tensor:
        spec, heads = self._spec, self._spec.k_heads
        qkvz = linear(x, w["qkvz_proj"]).unflatten(1, (heads, -1))
        qkv, gate = qkvz[..., : spec.group_width], qkvz[..., spec.group_width :]
        rate, decay = linear(x, w["ba_proj"]).unflatten(1, (heads, 2, -1)).unbind(2)
        weights = DeltaWeights(
            taps=by_key_head(w["conv"][:, 0], heads, spec.k_dim).transpose(1, 2),
            decay=w["decay"].exp().view(heads, -1),
            decay_bias=w["decay_bias"].view(heads, -1),
            out_norm=w["out_norm"],
            out_eps=self._norm_eps,
        )
        out = torch.empty(len(x), spec.v_heads * spec.v_dim, dtype=x.dtype)
        cells, rows = state_cells(kv, spec.v_dim), self._rows(layer)
        for segment in batch.segments:
            places = segment.state[rows // cells.shape[1]], rows % cells.shape[1]
            # What a page holds that is new to the request is another one's, or nothing.
            held = cells[places] if segment.start else torch.zeros(len(rows), spec.v_dim)
            state = DeltaState(held, weights=weights, k_dim=spec.k_dim)
            for row in range(segment.first_row, segment.first_row + segment.rows):
                step = delta_step(
                    weights, state, qkv[row], gate[row], rate=rate[row], decay=decay[row]
                )
                out[row] = step.flatten()
            cells[places] = state.rows
        return linear(out, w["o_proj"])

    def _rows(self, layer: int) -> torch.Tensor:
        """The rows of a layer's state among those of all layers, int64."""
        rows = self._spec.k_heads * self._spec.rows
        first = sum(other < layer for other in self._spec.layers) * rows
        return torch.arange(first, first + rows)


class _MLA:
    """Multi-head latent attention in its absorbed form: the up-projections of keys and values move
    to the query and the output, so that the cache holds one latent per token instead of every
    head's K and V (DeepSeek-V2, arXiv 2405.04434, section 2.1)."""

    def __init__(self, spec: MLASpec, model: ModelSpec) -> None:
        self._spec = spec
        self._kv_layer = model.kv_layer

    def forward(
        self, layer: int, x: torch.Tensor, w: Weights, batch: StepBatch, kv: torch.Tensor
    ) -> torch.Tensor:
        spec, kv_layer = self._spec, self._kv_layer(layer)
        nope, latent = spec.qk_nope_head_dim, spec.kv_lora_rank
        append_kv(kv, kv_layer, batch.slots(kv.shape[2]), self._cached(x, w, batch))

        q = self._queries(x, w).unflatten(1, (spec.q_heads, -1))
        up = w["kv_b_proj"].view(spec.q_heads, nope + spec.v_head_dim, latent)
        keys_up, values_up = up[:, :nope], up[:, nope:]
        # [heads, T, nope] x [heads, nope, latent]
        absorbed = bmm(q[..., :nope].transpose(0, 1), keys_up).transpose(0, 1)
        q = torch.cat((absorbed, _rotate(q[..., nope:], batch, spec.rope)), dim=-1)
        out = mla_attention(q, kv, kv_layer, batch.segments, latent=latent, scale=spec.scale)
        # [heads, T, latent] x [heads, latent, v]
        out = bmm(out.transpose(0, 1), values_up.transpose(1, 2)).transpose(0, 1)
        return linear(out.flatten(1), w["o_proj"], w.get("o_bias"))

    def _queries(self, x: torch.Tensor, w: Weights) -> torch.Tensor:
        if self._spec.q_lora_rank is None:
            return linear(x, w["q_proj"])
        compressed = linear(x, w["q_a_proj"], w.get("q_a_bias"))
        normed = rms_norm(compressed, w["q_a_norm"], self._spec.latent_norm_eps)
        return linear(normed, w["q_b_proj"])

    def _cached(self, x: torch.Tensor, w: Weights, batch: StepBatch) -> torch.Tensor:
        """Returns each row's cache entry: the normed latent, then the rotated rope key."""
        spec = self._spec
        compressed = linear(x, w["kv_a_proj"], w.get("kv_a_bias"))
        latent, rope_key = compressed.split((spec.kv_lora_rank, spec.qk_rope_head_dim), dim=1)
        latent = rms_norm(latent, w["kv_a_norm"], spec.latent_norm_eps)
        rope_key = _rotate(rope_key[:, None], batch, spec.rope)[:, 0]
        return torch.cat((latent, rope_key), dim=1)
