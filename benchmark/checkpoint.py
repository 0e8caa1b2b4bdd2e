"""Writes a Qwen3-MoE with random weights, on which this engine and others are compared.

    python -m benchmark.checkpoint DIR [--tiny] [--seed 0] [--skew 0]

Hidden 1024, 16 layers, 64 experts of 512 (top-4), 16 query and 4 KV heads of 64, vocabulary 32000:
1.72 billion parameters, 209 million of them active, 3.4 GB in bfloat16. The weights are scaled so
that activations keep their size from layer to layer and logits spread like a trained model's. The
tokenizer has a token per byte. Transformers, and all that read its checkpoints, load the folder.

Routers of random weights choose all experts about equally often; those of trained models do not. A
checkpoint with a skew has a constant in all of its hidden states: a direction that every embedding
has a component along, and that neither routers nor LM head take from the rest. Each router adds to
an expert's logit a preference of its own along that direction, drawn from a normal distribution
whose deviation is the skew times that of what the token makes of the logit. With 64 experts of
which 4 are chosen, the eighth of them that is chosen most gets 24 % of all choices with a skew of
0.25 (its Gini coefficient is 0.26), 37 % with 0.5, 49 % with 0.75. Published figures of trained
models: the Gini coefficient of a layer's choices on text is 0.11 for DeepSeek-MoE-16B, 0.15 for
Nemotron-30B, 0.24 and more for DeepSeek-V2-Lite and Qwen3.5-35B over a corpus (arXiv 2605.20982);
over one answer of 300 tokens of a model with 512 experts, an eighth of a layer's experts got 41 %
of the choices (github.com/kekzl/imp, pull request 2061). So 0.25 is what a pool sees that serves
everybody, and 0.5 what it sees of one request.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tqdm import tqdm

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Shape:
    """Sizes of a Qwen3-MoE; ``intermediate`` is that of one expert."""

    name: str
    hidden: int
    layers: int
    experts: int
    top_k: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    context: int = 8192
    skew: float = 0.0
    """How much routers prefer some experts; see this module's docstring."""


_CONSTANT = 0.5
"""An embedding's component along the constant direction, over the root mean square of the
others times the root of the hidden size."""
FULL = Shape("moe-1.7b", 1024, 16, 64, 4, 512, 16, 4, 64, 32000)
TINY = Shape("moe-tiny", 256, 2, 8, 2, 128, 4, 2, 64, 512)


def cache_dir() -> Path:
    """Return the folder of checkpoints and of other engines' environments: CROSSPOOL_BENCH_DIR, or
    ``~/.cache/crosspool-bench``."""
    given = os.environ.get("CROSSPOOL_BENCH_DIR")
    return Path(given) if given else Path.home() / ".cache" / "crosspool-bench"


def models(
    count: int = 1, *, tiny: bool = False, layers: int | None = None, skew: float = 0.0
) -> list[Path]:
    """Return folders of ``count`` checkpoints of the same shape and different weights, and write
    those that do not exist. ``layers`` replaces the shape's own number of layers."""
    shape = TINY if tiny else FULL
    if skew:
        shape = replace(shape, name=f"{shape.name}-skew-{skew:g}", skew=skew)
    if layers is not None and layers != shape.layers:
        shape = replace(shape, name=f"{shape.name}-{layers}-layers", layers=layers)
    folders = [cache_dir() / "models" / f"{shape.name}-{seed}" for seed in range(count)]
    for seed, folder in enumerate(folders):
        if not (folder / "config.json").is_file():
            part = folder.with_name(f"{folder.name}.{os.getpid()}")
            write(part, shape, seed)
            shutil.rmtree(folder, ignore_errors=True)
            part.rename(folder)
    return folders


def write(folder: Path, shape: Shape = FULL, seed: int = 0) -> None:
    """Write the checkpoint, one shard per layer. The same seed gives the same weights."""
    write_shards(folder, shape, _shards(shape, seed), config(shape))


def write_shards(
    folder: Path, shape: Shape, shards: Iterable[Tensors], config: dict[str, object]
) -> None:
    """Write the files of a checkpoint of ``shape``, whose ``shards`` are one of each layer and one
    of what is in no layer."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = shape.layers + 1
    index: dict[str, str] = {}
    size = 0
    bar = tqdm(shards, f"writing {shape.name}", parts, unit="shard", disable=None)
    for number, tensors in enumerate(bar, 1):
        file = f"model-{number:05d}-of-{parts:05d}.safetensors"
        save_file(tensors, folder / file, {"format": "pt"})
        index |= dict.fromkeys(tensors, file)
        size += sum(tensor.nbytes for tensor in tensors.values())
    _write_json(
        folder / "model.safetensors.index.json",
        {"metadata": {"total_size": size}, "weight_map": index},
    )
    _write_tokenizer(folder, shape.vocabulary)
    _write_json(
        folder / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    )
    _write_json(folder / "config.json", config)


def _shards(shape: Shape, seed: int) -> Iterator[Tensors]:
    generator = torch.Generator().manual_seed(seed)

    def normal(rows: int, columns: int, scale: float = 1.0) -> torch.Tensor:
        weight = torch.empty(rows, columns, dtype=torch.bfloat16)
        return weight.normal_(0.0, scale * columns**-0.5, generator=generator)

    def norm(size: int) -> torch.Tensor:
        return torch.empty(size).uniform_(0.8, 1.2, generator=generator).bfloat16()

    hidden, width = shape.hidden, shape.heads * shape.head_dim
    preferences = _Preferences(shape, seed) if shape.skew else None
    into_residual = (2 * shape.layers) ** -0.5
    for layer in range(shape.layers):
        tensors = {
            "input_layernorm": norm(hidden),
            "self_attn.q_proj": normal(width, hidden),
            "self_attn.k_proj": normal(shape.kv_heads * shape.head_dim, hidden),
            "self_attn.v_proj": normal(shape.kv_heads * shape.head_dim, hidden),
            "self_attn.o_proj": normal(hidden, width, into_residual),
            "self_attn.q_norm": norm(shape.head_dim),
            "self_attn.k_norm": norm(shape.head_dim),
            "post_attention_layernorm": norm(hidden),
            "mlp.gate": normal(shape.experts, hidden),
        }
        if preferences is not None:
            tensors["mlp.gate"] = preferences.router(tensors["mlp.gate"], layer)
        for expert in range(shape.experts):
            name = f"mlp.experts.{expert}"
            tensors[f"{name}.gate_proj"] = normal(shape.intermediate, hidden)
            tensors[f"{name}.up_proj"] = normal(shape.intermediate, hidden)
            # SiLU(gate) times up has about a third of their size, and so has the weighted mean of
            # the chosen experts
            tensors[f"{name}.down_proj"] = normal(hidden, shape.intermediate, 3 * into_residual)
        yield {f"model.layers.{layer}.{name}.weight": tensor for name, tensor in tensors.items()}
    last = {
        "model.embed_tokens.weight": normal(shape.vocabulary, hidden, hidden**0.5),
        "model.norm.weight": norm(hidden),
        "lm_head.weight": normal(shape.vocabulary, hidden, 2.0),
    }
    if preferences is not None:
        last["model.embed_tokens.weight"] = preferences.embedding(last["model.embed_tokens.weight"])
        last["lm_head.weight"] = preferences.blind(last["lm_head.weight"]).bfloat16()
    yield last


class _Preferences:
    """What makes routers prefer some experts."""

    def __init__(self, shape: Shape, seed: int) -> None:
        self._shape = shape
        self._generator = torch.Generator().manual_seed((1 << 20) + seed)
        direction = torch.randn(shape.hidden, generator=self._generator)
        self._direction = direction / direction.norm()

    def embedding(self, weight: torch.Tensor) -> torch.Tensor:
        """Give every token's embedding the constant component."""
        rows = self.blind(weight)
        rows += self._direction * (_CONSTANT * math.sqrt(self._shape.hidden))
        return rows.bfloat16()

    def router(self, weight: torch.Tensor, layer: int) -> torch.Tensor:
        """Add the preferences of a layer's router."""
        shape = self._shape
        # Each of the layers before adds to the mean square, all of them together one.
        mean_square = 1.0 + _CONSTANT**2 + layer / shape.layers
        component = _CONSTANT * math.sqrt(shape.hidden / mean_square)
        of_token = math.sqrt(1.0 - _CONSTANT**2 / mean_square)
        drawn = torch.randn(shape.experts, generator=self._generator)
        along = shape.skew * of_token / component * drawn
        return (self.blind(weight) + torch.outer(along, self._direction)).bfloat16()

    def blind(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the rows without their component along the direction, in float32."""
        rows = weight.float()
        return rows.sub(torch.outer(rows @ self._direction, self._direction))


def config(shape: Shape) -> dict[str, object]:
    """Return what config.json says of a bfloat16 checkpoint of ``shape``."""
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "decoder_sparse_step": 1,
        "eos_token_id": 2,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "initializer_range": 0.02,
        "intermediate_size": 4 * shape.intermediate,
        "max_position_embeddings": shape.context,
        "mlp_only_layers": [],
        "moe_intermediate_size": shape.intermediate,
        "norm_topk_prob": True,
        "num_attention_heads": shape.heads,
        "num_experts": shape.experts,
        "num_experts_per_tok": shape.top_k,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
        "pad_token_id": 0,
        "rms_norm_eps": 1e-6,
        "rope_scaling": None,
        "rope_theta": 1_000_000.0,
        "router_aux_loss_coef": 0.001,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": shape.vocabulary,
    }


def _write_tokenizer(folder: Path, vocabulary: int) -> None:
    """Write a tokenizer with a token per byte. Its other words come from no text."""
    special = ["<pad>", "<s>", "</s>"]
    words = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    words += [f"<{number}>" for number in range(len(words), vocabulary)]
    tokenizer = Tokenizer(BPE({word: number for number, word in enumerate(words)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "pad_token": "<pad>",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "chat_template": "{% for message in messages %}{{ message['content'] }}\n{% endfor %}",
        },
    )


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmark.checkpoint", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tiny", action="store_true", help="2 layers of 8 experts, for tests")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--skew", type=float, default=0.0, help="how uneven routers choose")
    given = parser.parse_args(words)
    write(given.folder, replace(TINY if given.tiny else FULL, skew=given.skew), given.seed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
