"""The least time of a decode step: the bytes that it must read, at the rate at which the cores read
memory, which a program measures."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence

from crosspool.models.registry import attention_tensors, ffn_tensors
from crosspool.models.spec import ModelSpec, MoEFFN, TensorRef
from crosspool.weightpool.placement import held_bytes

from benchmark.programs import build

_PASSES = 20


def step_bytes(spec: ModelSpec, batch: int, context: int) -> float:
    """Bytes of weights and cached tokens that one decode step reads. Of a layer's experts it counts
    those that ``batch`` rows choose on the average when each row chooses at random."""
    total: float = sum(
        _bytes(ref, spec) for _, ref in attention_tensors(spec) if not _one_row_of(ref, spec)
    )
    for layer in range(spec.layers):
        ffn = spec.ffn[layer]
        share = 1.0
        if isinstance(ffn, MoEFFN):
            share = 1.0 - (1.0 - ffn.router.top_k / ffn.experts) ** batch
        total += sum(
            _bytes(ref, spec) * (1.0 if ref.expert is None else share)
            for ref in ffn_tensors(spec, layer)
        )
    return total + batch * context * spec.kv_bytes_per_token


def _bytes(ref: TensorRef, spec: ModelSpec) -> int:
    """Bytes of a tensor as the resident loop holds it."""
    return held_bytes(ref, spec, tuple(slice(0, size) for size in ref.shape), codes=True)


def _one_row_of(ref: TensorRef, spec: ModelSpec) -> bool:
    """Whether a step reads only a row per token: the embedding, unless it is the LM head too."""
    return ref.name.endswith("embed_tokens.weight") and not spec.tied_embeddings


def step_seconds(cores: Sequence[int], spec: ModelSpec, batch: int, context: int) -> list[float]:
    """Measures passes over a step's bytes, with a thread pinned to each core; seconds of each."""
    return read_seconds(cores, round(step_bytes(spec, batch, context)))


def read_seconds(cores: Sequence[int], count: int) -> list[float]:
    """Measures passes over ``count`` bytes, with a thread pinned to each core; seconds of each."""
    command = [str(build("bandwidth")), str(count), str(_PASSES), *map(str, cores)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return [float(line) for line in done.stdout.split()]
