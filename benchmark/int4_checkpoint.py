"""Writes a Qwen3-MoE whose weights are random int4 codes in groups of 128, in the form that
compressed-tensors publishes (``pack-quantized``, symmetric): as many bytes, and as much to compute,
as a checkpoint of the same shape that was trained. No bfloat16 form of it ever exists. Matrices of
one shape in a layer have the same codes, each with scales of its own: drawing 16 GB of random
numbers takes longer than writing them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from benchmark.checkpoint import Shape, Tensors, config, write_shards

GROUP = 128
_CODES = 8
"""Codes in a word of 32 bits."""
_DEVIATION = 4.61
"""Standard deviation of codes that are drawn evenly from -8 to 7."""


def write(folder: Path, shape: Shape, seed: int = 0) -> None:
    """Write the checkpoint, one shard per layer. The same seed gives the same weights."""
    scheme = {
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {
                    "num_bits": 4,
                    "type": "int",
                    "symmetric": True,
                    "strategy": "group",
                    "group_size": GROUP,
                },
            }
        },
        "format": "pack-quantized",
        "ignore": ["lm_head", "re:.*mlp[.]gate$"],
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
    }
    write_shards(
        folder, shape, _shards(shape, seed), {**config(shape), "quantization_config": scheme}
    )


def _shards(shape: Shape, seed: int) -> Iterator[Tensors]:
    generator = torch.Generator().manual_seed(seed)
    for layer in range(shape.layers):
        drawn = _Layer(shape, generator).tensors
        yield {f"model.layers.{layer}.{name}": tensor for name, tensor in drawn.items()}
    yield {
        "model.embed_tokens.weight": _normal(shape.vocabulary, shape.hidden, 1.0, generator),
        "model.norm.weight": _ones(shape.hidden),
        "lm_head.weight": _normal(
            shape.vocabulary, shape.hidden, 2.0 * shape.hidden**-0.5, generator
        ),
    }


class _Layer:
    """The tensors of one layer."""

    def __init__(self, shape: Shape, generator: torch.Generator) -> None:
        self._generator = generator
        self._codes: dict[tuple[int, int], torch.Tensor] = {}
        self.tensors: Tensors = {}
        """Tensors by the ends of their names."""
        hidden, width = shape.hidden, shape.heads * shape.head_dim
        into_residual = (2 * shape.layers) ** -0.5
        self._quantize("self_attn.q_proj", width, hidden)
        self._quantize("self_attn.k_proj", shape.kv_heads * shape.head_dim, hidden)
        self._quantize("self_attn.v_proj", shape.kv_heads * shape.head_dim, hidden)
        self._quantize("self_attn.o_proj", hidden, width, into_residual)
        for expert in range(shape.experts):
            name = f"mlp.experts.{expert}"
            self._quantize(f"{name}.gate_proj", shape.intermediate, hidden)
            self._quantize(f"{name}.up_proj", shape.intermediate, hidden)
            self._quantize(f"{name}.down_proj", hidden, shape.intermediate, 3 * into_residual)
        for name, size in (
            ("input_layernorm", hidden),
            ("post_attention_layernorm", hidden),
            ("self_attn.q_norm", shape.head_dim),
            ("self_attn.k_norm", shape.head_dim),
        ):
            self.tensors[f"{name}.weight"] = _ones(size)
        self.tensors["mlp.gate.weight"] = _normal(shape.experts, hidden, hidden**-0.5, generator)

    def _quantize(self, name: str, rows: int, columns: int, scale: float = 1.0) -> None:
        if (rows, columns) not in self._codes:
            words = torch.randint(
                -(2**31), 2**31, (rows, columns // _CODES), generator=self._generator
            )
            self._codes[rows, columns] = words.to(torch.int32)
        scales = torch.empty(rows, columns // GROUP).uniform_(0.8, 1.2, generator=self._generator)
        step = scale * columns**-0.5 / _DEVIATION
        self.tensors[f"{name}.weight_packed"] = self._codes[rows, columns].clone()
        self.tensors[f"{name}.weight_scale"] = (step * scales).bfloat16()
        self.tensors[f"{name}.weight_shape"] = torch.tensor([rows, columns])


def _normal(rows: int, columns: int, deviation: float, generator: torch.Generator) -> torch.Tensor:
    weight = torch.empty(rows, columns, dtype=torch.bfloat16)
    return weight.normal_(0.0, deviation, generator=generator)


def _ones(size: int) -> torch.Tensor:
    return torch.ones(size, dtype=torch.bfloat16)
