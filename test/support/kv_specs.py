"""Models whose KV caches tests lay out: only the KV shape matters."""

from __future__ import annotations

from crosspool.models.spec import DenseFFN, GQASpec, MLASpec, ModelSpec, RopeSpec

_GQA = GQASpec(
    q_heads=8,
    kv_heads=4,
    head_dim=128,
    scale=0.1,
    rope=RopeSpec(dim=128, interleaved=False),
)
_MLA = MLASpec(
    q_heads=16,
    q_lora_rank=None,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    scale=0.1,
    rope=RopeSpec(dim=64, interleaved=True),
)
SPECS = {
    name: ModelSpec(
        family=family,
        hidden=1024,
        vocab=1000,
        context=4096,
        dtype="bfloat16",
        norm_eps=1e-6,
        tied_embeddings=False,
        attention=attention,
        ffn=(DenseFFN(intermediate=8),) * 27,
        eos_token_ids=(1,),
    )
    for name, family, attention in (("gqa", "qwen3_moe", _GQA), ("mla", "deepseek_v2", _MLA))
}
