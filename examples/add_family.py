"""A model family of your own with attention that the engines know: a config becomes a ModelSpec.

To serve it, save the family's part of this file as a module of ``crosspool/models/families`` (the
registry lists that folder), and give it a row in the tests that compare with transformers.

    .venv/bin/python examples/add_family.py
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from crosspool.models.config_file import ConfigFile
from crosspool.models.family import Family
from crosspool.models.gqa import gqa, grouped_heads, head_size
from crosspool.models.moe import softmax_moe
from crosspool.models.registry import read_spec
from crosspool.models.rope import check_full_rope
from crosspool.models.spec import FFNSpec, GQASpec


def _attention(config: ConfigFile, hidden: int) -> GQASpec:
    check_full_rope(config)
    q_heads, kv_heads = grouped_heads(config, 16, 4, null_means_all=False)
    return gqa(q_heads, kv_heads, head_size(config, hidden, q_heads))


def _ffn(config: ConfigFile, layers: int) -> tuple[FFNSpec, ...]:
    moe = softmax_moe(
        config,
        experts=32,
        top_k=4,
        intermediate=config.integer("moe_intermediate_size", 512),
        renormalize=True,
    )
    return (moe,) * layers


ACME_MOE = Family(
    model_type="acme_moe",
    architecture="AcmeMoeForCausalLM",
    attention=_attention,
    ffn=_ffn,
    vocab=32000,
    hidden=1024,
    layers=16,
    context=8192,
    norm_eps=1e-6,
    eos_token_id=2,
)

CONFIG = {
    "architectures": ["AcmeMoeForCausalLM"],
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "num_experts": 64,
    "moe_intermediate_size": 768,
}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.json"
        file.write_text(json.dumps(CONFIG))
        spec = read_spec(ConfigFile(file), ACME_MOE, "bfloat16")
    print(f"{spec.family}: {spec.layers} layers, {spec.kv_bytes_per_token:,} bytes of KV per token")
    print(f"attention: {spec.attention}")
    print(f"FFN: {spec.ffn[0]}")


if __name__ == "__main__":
    main()
