"""What the resident loop reads of a model."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

from torch import Tensor

from crosspool.kernels import engine_structs as es
from crosspool.models.spec import ModelSpec
from crosspool.ranks.resident.pack_sources import NATIVE_DTYPES
from crosspool.ranks.resident.weights import ResidentWeights
from crosspool.ranks.weights import TORCH_DTYPES


def model_table(
    model: int,
    spec: ModelSpec,
    ffn_ranks: Sequence[int],
    weights: ResidentWeights,
    kv: Tensor | None,
) -> es.ModelTable:
    """Returns the table of a model. What it points to belongs to ``weights`` and to the table.
    ``kv``: the model's cache; None without an attention rank."""
    table = es.ModelTable(
        number=model,
        dtype=NATIVE_DTYPES[TORCH_DTYPES[spec.dtype]],
        hidden=spec.hidden,
        vocab=spec.vocab,
        layers=spec.layers,
        norm_eps=spec.norm_eps,
        ffn_ranks=(ctypes.c_int32 * len(ffn_ranks))(*ffn_ranks),
        ffn_rank_count=len(ffn_ranks),
    )
    if model in weights.attention:
        assert kv is not None
        weights.attention[model].fill(table, kv)
    if model in weights.ffn:
        weights.ffn[model].fill(table)
    taken = all(part.weights.arena.taken for part in weights.parts(model))
    table.weights = es.HERE if taken else es.LATER
    return table


def refusing_table(model: int) -> es.ModelTable:
    """Returns the table of a model that this device cannot take: dispatches of it are refused."""
    return es.ModelTable(number=model, weights=es.NEVER)
