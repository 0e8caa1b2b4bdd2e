"""A model's attention part in the packed form that the resident loop reads."""

from __future__ import annotations

import ctypes
import math
import time
from pathlib import Path

import torch
from torch import Tensor

from crosspool.kernels import engine_structs as es
from crosspool.kernels import native_structs as ns
from crosspool.kernels.delta_net import by_key_head
from crosspool.kernels.engine import Team
from crosspool.kernels.rope import query_factors, rope_tables
from crosspool.models.gguf_config import config_of
from crosspool.models.registry import attention_tensors
from crosspool.models.rope import is_long
from crosspool.models.spec import (
    DeltaNetSpec,
    GQASpec,
    MLASpec,
    ModelSpec,
    TemperatureTuning,
    TensorRef,
)
from crosspool.observability.progress import Progress
from crosspool.ranks.host.attention import frequencies
from crosspool.ranks.resident.declarations import whole
from crosspool.ranks.resident.kept_weights import KeptWeights
from crosspool.ranks.resident.pack_sources import pointer, source
from crosspool.ranks.resident.packing import PackedWeights
from crosspool.ranks.weights import TORCH_DTYPES, TensorListing

_BLOCK_BYTES = 1 << 16
"""Bytes of a table that are computed at a time. Larger tensors in between would each be new memory
from the system."""


class PackedAttention:
    """Fills the attention part's fields of a :class:`ModelTable`, and owns what they point to."""

    role = "attention"
    native = es.ATTENTION_WEIGHTS

    def __init__(
        self,
        spec: ModelSpec,
        path: Path,
        positions: int,
    ) -> None:
        """``positions``: tokens of the longest sequence that may come."""
        self._spec = spec
        self._path = path
        self.positions = positions
        """Tokens of the longest sequence that may come."""
        self.weights = PackedWeights(spec.dtype)
        self._layers = (es.AttentionLayer * spec.layers)()
        self._vectors: list[Tensor] = []
        self._declare()
        # Kept with the weights: computing them may take the import of transformers.
        long = is_long(config_of(path), spec.context)
        self._frequency = self.weights.computed(
            (spec.attention.rope.dim // 2,),
            torch.float32,
            lambda: frequencies(spec, path)[0],
            of=long,
        )
        self._scaling = self.weights.computed(
            (1,),
            torch.float64,
            lambda: torch.tensor([frequencies(spec, path)[1]], dtype=torch.float64),
            of=long,
        )
        table = (positions, spec.attention.rope.dim // 2)
        self._cos = self.weights.arena.tensor(table, torch.float32)
        self._sin = self.weights.arena.tensor(table, torch.float32)
        self._query_factors: Tensor | None = None
        if self._tuning is not None:
            self._query_factors = self.weights.arena.tensor((positions,), torch.float32)
        self.weights.settle()

    @property
    def _tuning(self) -> TemperatureTuning | None:
        attention = self._spec.attention
        return attention.temperature if isinstance(attention, GQASpec) else None

    def load(self, team: Team, progress: Progress, kept: KeptWeights | None = None) -> None:
        """Loads the weights from ``kept``, or packs them; ``progress`` is called with bytes read.

        Raises ConfigError for a checkpoint that does not fit its config.json."""
        self.weights.load(self._path, team, progress, kept)
        self.derive()

    def derive(self) -> None:
        """Computes what follows from the stage before all others: the tables of the rotations, and
        factors on queries. It rests as long as it computes, since steps may share the core."""
        scaling, rows = float(self._scaling), _BLOCK_BYTES // self._cos[:1].nbytes
        for block in torch.arange(self.positions).split(max(rows, 1)):
            began = time.thread_time()
            at = slice(int(block[0]), int(block[-1]) + 1)
            self._cos[at], self._sin[at] = _rope(self._spec, block, self._frequency, scaling)
            if self._query_factors is not None and self._tuning is not None:
                tuning = self._tuning
                self._query_factors[at] = query_factors(block, tuning.scale, tuning.floor)
            time.sleep(time.thread_time() - began)

    def fill(self, table: es.ModelTable, kv: Tensor) -> None:
        """Fills in the attention part. ``kv``: the model's cache, [pages, layers, page_size,
        kv_width]."""
        attention = self._spec.attention
        table.attention = self._layers
        table.embed = pointer(self._embed)
        table.final_norm, table.final_norm_bias = map(pointer, self._final_norm)
        table.head_bias = pointer(self._head_bias)
        table.head = ctypes.pointer(self._head)
        rope = attention.rope
        table.rope = ns.Rope(
            pointer(self._cos), pointer(self._sin), rope.dim, rope.interleaved, rope.fp32
        )
        kv_dtype = ns.KV_DTYPES[self._spec.kv_cache_dtype]
        table.kv = ns.KVCache(kv.data_ptr(), *kv.shape[1:], kv_dtype)
        table.qkv_clip = math.inf
        table.embed_scale, table.logit_scale = self._spec.embed_scale, self._spec.logit_scale
        table.attention_scale = 1.0
        if isinstance(attention, GQASpec):
            table.attention_kind = es.GQA
            dim, heads = attention.head_dim, attention.kv_heads
            table.shape = ns.AttentionShape(
                q_heads=attention.q_heads,
                kv_heads=heads,
                qk_dim=dim,
                v_dim=dim,
                v_begin=heads * dim,
                window=attention.sliding_window or 0,
                scale=attention.scale,
                chunked=attention.chunked,
            )
            table.query_factors = pointer(self._query_factors)
            table.qk_norm = ns.QK_NORMS[attention.qk_norm]
            table.attention_scale, table.gated = attention.out_scale, attention.gated
            if attention.qkv_clip is not None:
                table.qkv_clip = attention.qkv_clip
        else:
            table.attention_kind = es.MLA
            table.shape = ns.AttentionShape(
                q_heads=attention.q_heads,
                kv_heads=1,
                qk_dim=self._spec.kv_width,
                v_dim=attention.kv_lora_rank,
                v_begin=0,
                window=0,
                scale=attention.scale,
            )
            table.nope_dim = attention.qk_nope_head_dim
            table.value_dim = attention.v_head_dim
            table.latent_norm_eps = attention.latent_norm_eps
        if (delta := self._spec.delta_net) is not None:
            table.delta = ns.DeltaShape(
                delta.k_heads, delta.v_heads, delta.k_dim, delta.v_dim, delta.taps
            )

    def tensors(self) -> list[TensorListing]:
        """Lists every tensor that the part holds; none while the model sleeps."""
        return self.weights.held()

    def close(self) -> None:
        """Gives the memory back, after the loop was closed."""
        self.weights.close()

    def _declare(self) -> None:
        by_layer: dict[int | None, dict[str, TensorRef]] = {}
        for layer, ref in attention_tensors(self._spec):
            by_layer.setdefault(layer, {})[ref.key] = ref
        of_model = by_layer.pop(None)
        weights = self.weights
        self._embed: Tensor | None = None
        last = self._spec.layers
        if self._spec.tied_embeddings:
            head, stage = of_model["embed"], 0
        else:
            head, stage = of_model["lm_head"], last
            self._embed = weights.plain(None, of_model["embed"])
        self._head = weights.stacked(None, [(head, whole(head))], stage=stage)
        vectors = [
            weights.floats(None, of_model[key], stage=last) if key in of_model else None
            for key in ("final_norm", "final_norm_bias", "head_bias")
        ]
        *self._final_norm, self._head_bias = vectors
        for layer, refs in by_layer.items():
            assert layer is not None
            self._declare_layer(layer, refs)

    def _declare_layer(self, layer: int, refs: dict[str, TensorRef]) -> None:
        table, attention = self._layers[layer], self._spec.attention

        def matrix(*keys: str) -> ctypes._Pointer[ns.Matrix]:
            parts = [(refs[key], whole(refs[key])) for key in keys]
            return ctypes.pointer(self.weights.stacked(layer, parts))

        def vector(key: str) -> int | None:
            if key not in refs:
                return None
            self._vectors.append(self.weights.floats(layer, refs[key]))
            return pointer(self._vectors[-1])

        table.input_norm, table.post_norm = vector("input_norm"), vector("post_norm")
        table.input_norm_bias = vector("input_norm_bias")
        table.post_norm_bias = vector("post_norm_bias")
        table.o, table.o_bias = matrix("o_proj"), vector("o_bias")
        table.delta_layers_before = layer - self._spec.kv_layer(layer)
        if self._spec.delta_net is not None and self._spec.has_delta_net(layer):
            table.qkvz, table.rates = matrix("qkvz_proj"), matrix("ba_proj")
            table.taps = self._taps(layer, refs["conv"], self._spec.delta_net)
            table.decay = self._exponential(layer, refs["decay"])
            table.decay_bias, table.out_norm = vector("decay_bias"), vector("out_norm")
            return
        if isinstance(attention, GQASpec):
            table.sinks, table.sees_all = vector("sinks"), layer in attention.full_layers
            table.unrotated = layer in attention.unrotated_layers
            table.qkv, table.qkv_matrices = self._qkv(layer, refs)
            table.q_norm, table.k_norm = vector("q_norm"), vector("k_norm")
            if attention.qkv_bias:
                table.qkv_bias = self._stacked_bias(layer, refs)
            return
        if attention.q_lora_rank is None:
            table.q = matrix("q_proj")
        else:
            table.q_a, table.q = matrix("q_a_proj"), matrix("q_b_proj")
            table.q_a_bias, table.q_a_norm = vector("q_a_bias"), vector("q_a_norm")
        table.kv_a = matrix("kv_a_proj")
        table.kv_a_bias, table.kv_a_norm = vector("kv_a_bias"), vector("kv_a_norm")
        table.keys_up, table.values_up = self._absorbed(layer, refs["kv_b_proj"], attention)

    def _qkv(self, layer: int, refs: dict[str, TensorRef]) -> tuple[ctypes.Array[ns.Matrix], int]:
        """One matrix of q, k and v, or one of each where they are held in different forms."""
        weights = self.weights
        parts = [(refs[key], whole(refs[key])) for key in ("q_proj", "k_proj", "v_proj")]
        apart = [[part] for part in parts] if len(weights.forms(parts)) > 1 else [parts]
        k = parts[0][0].shape[1]
        shapes = [(sum(ref.shape[0] for ref, _ in of), k) for of in apart]
        matrices = weights.matrices_of(layer, shapes)
        for matrix, of in zip(matrices, apart, strict=True):
            weights.stacked(layer, of, matrix)
        return matrices, len(apart)

    def _taps(self, layer: int, ref: TensorRef, spec: DeltaNetSpec) -> int:
        """The convolution's weights by key head and token."""
        taps = self.weights.array(layer, (spec.k_heads, spec.taps, spec.group_width), torch.float32)
        self._vectors.append(taps)

        def finish(tensors: list[Tensor]) -> None:
            sorted_ = by_key_head(tensors[0][:, 0], spec.k_heads, spec.k_dim)
            taps.copy_(sorted_.transpose(1, 2))

        self.weights.custom(layer, ref, finish)
        return taps.data_ptr()

    def _exponential(self, layer: int, ref: TensorRef) -> int:
        out = self.weights.array(layer, ref.shape, torch.float32)
        self._vectors.append(out)
        self.weights.custom(layer, ref, lambda tensors: out.copy_(tensors[0].exp()))
        return out.data_ptr()

    def _stacked_bias(self, layer: int, refs: dict[str, TensorRef]) -> int:
        biases = [refs[f"{letter}_bias"] for letter in "qkv"]
        joined = self.weights.array(layer, (sum(ref.shape[0] for ref in biases),), torch.float32)
        self._vectors.append(joined)
        places = joined.split([ref.shape[0] for ref in biases])
        for ref, place in zip(biases, places, strict=True):
            self.weights.copied(layer, ref, place)
        return joined.data_ptr()

    def _absorbed(
        self, layer: int, ref: TensorRef, spec: MLASpec
    ) -> tuple[ctypes.Array[ns.Matrix], ctypes.Array[ns.Matrix]]:
        """Cuts ``kv_b_proj`` [heads x (nope + v), latent] by head into the projection of queries to
        the latents, [latent, nope], and that of latents to values, [v, latent]."""
        nope, value, latent = spec.qk_nope_head_dim, spec.v_head_dim, spec.kv_lora_rank
        keys_up = self.weights.matrices(layer, spec.q_heads, latent, nope)
        values_up = self.weights.matrices(layer, spec.q_heads, value, latent)

        def finish(tensors: list[Tensor]) -> None:
            for head, both in enumerate(tensors[0].view(spec.q_heads, nope + value, latent)):
                self.weights.pack(keys_up[head], [source(both[:nope].t())])
                self.weights.pack(values_up[head], [source(both[nope:])])

        self.weights.custom(layer, ref, finish)
        return keys_up, values_up


def _rope(
    spec: ModelSpec, positions: Tensor, frequency: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """Returns cos and sin of the rotations at ``positions`` [T], float32 [T, dim / 2] each."""
    cos, sin = rope_tables(positions, frequency, scaling)
    if spec.attention.rope.fp32:
        return cos, sin
    dtype = TORCH_DTYPES[spec.dtype]
    return cos.to(dtype).float(), sin.to(dtype).float()
