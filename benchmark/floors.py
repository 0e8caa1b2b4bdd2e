"""What a decode step takes at least: the bytes that it must read, at the rate at which the cores
read memory, measured by a program of its own."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence

from crosspool.models.registry import attention_tensors, ffn_tensors
from crosspool.models.spec import DTYPE_BYTES, ModelSpec, MoEFFN, TensorRef

from benchmark.programs import build

_PASSES = 20


def step_bytes(spec: ModelSpec, batch: int, context: int) -> float:
    """Weights and cached tokens that one decode step reads. Of the experts of a layer, those that
    ``batch`` rows choose on the average if each row's choice is random."""
    total = sum(
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


def _bytes(ref: TensorRef, spec: ModelSpec) -> float:
    count = 1
    for size in ref.shape:
        count *= size
    return count * DTYPE_BYTES["float32" if ref.keep_fp32 else spec.dtype]


def _one_row_of(ref: TensorRef, spec: ModelSpec) -> bool:
    """Whether a token reads one row of it: the embedding, unless the LM head is the same."""
    return ref.name.endswith("embed_tokens.weight") and not spec.tied_embeddings


def step_seconds(cores: Sequence[int], spec: ModelSpec, batch: int, context: int) -> list[float]:
    """What some passes over a step's bytes took just now, a thread pinned to each core."""
    return read_seconds(cores, round(step_bytes(spec, batch, context)))


def read_seconds(cores: Sequence[int], count: int) -> list[float]:
    """What some passes over so many bytes took just now, a thread pinned to each core."""
    command = [str(build("bandwidth")), str(count), str(_PASSES), *map(str, cores)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return [float(line) for line in done.stdout.split()]
