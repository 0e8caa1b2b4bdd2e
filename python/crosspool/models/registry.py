"""From a checkpoint folder to a :class:`ModelSpec`, and from a spec to its tensors.

Example::

    spec = read_model(Path("models/Qwen3-30B-A3B"))
    spec.layers, spec.kv_bytes_per_token  # (48, 98304)
    [ref.key for ref in ffn_tensors(spec, layer=0)]  # ["router", "experts.0.gate", ...]
"""

from __future__ import annotations

from pathlib import Path

from crosspool.config.errors import ConfigError
from crosspool.models.config_file import ConfigFile
from crosspool.models.deepseek import DEEPSEEK_V2, DEEPSEEK_V3
from crosspool.models.family import Family
from crosspool.models.glm4_moe_lite import GLM4_MOE_LITE
from crosspool.models.mixtral import MIXTRAL
from crosspool.models.olmoe import OLMOE
from crosspool.models.qwen3_moe import QWEN3_MOE
from crosspool.models.spec import DType, ModelSpec, TensorRef
from crosspool.models.tensors import attention_part, ffn_part

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (QWEN3_MOE, DEEPSEEK_V2, DEEPSEEK_V3, GLM4_MOE_LITE, MIXTRAL, OLMOE)
}
_BY_ARCHITECTURE = {family.architecture: family for family in FAMILIES.values()}


def read_model(path: Path, context_length: int | None = None, dtype: str = "auto") -> ModelSpec:
    """Reads ``config.json`` and ``generation_config.json`` of a checkpoint folder.

    ``context_length``: a shorter limit in tokens than the model's own. ``dtype``: ``bfloat16``,
    ``float32``, or ``auto`` for the config's. Raises ConfigError, naming file and field, when the
    architecture is not supported, a value makes no sense, or the checkpoint is quantised."""
    config = ConfigFile(path / "config.json")
    family = _family(config)
    for field in ("quantization_config", "compression_config"):
        if config.values.get(field):
            raise ConfigError(
                f"{config.file}: {field} is set: quantised checkpoints are not supported, "
                "use one in bfloat16 or float32"
            )
    if config.text("hidden_act", "silu") not in ("silu", "swish"):
        raise config.error("hidden_act", "must be silu")
    hidden = config.integer("hidden_size", family.hidden)
    layers = config.integer("num_hidden_layers", family.layers)
    return ModelSpec(
        family=family.model_type,
        hidden=hidden,
        vocab=config.integer("vocab_size", family.vocab),
        context=_context(config, family.context, context_length),
        dtype=_dtype(config, dtype),
        norm_eps=config.number("rms_norm_eps", family.norm_eps),
        tied_embeddings=config.boolean("tie_word_embeddings", False),
        attention=family.attention(config, hidden),
        ffn=family.ffn(config, layers),
        eos_token_ids=_eos(config, path / "generation_config.json", family.eos_token_id),
    )


def attention_tensors(spec: ModelSpec) -> list[tuple[int | None, TensorRef]]:
    """Every tensor of the attention part with its layer; None for embeddings, final norm and LM
    head."""
    return list(attention_part(spec))


def ffn_tensors(spec: ModelSpec, layer: int) -> list[TensorRef]:
    """Every tensor of one layer's FFN part, whole: a shard says which share of it a rank holds."""
    return list(ffn_part(spec, layer, FAMILIES[spec.family].names))


def _family(config: ConfigFile) -> Family:
    names = config.values.get("architectures")
    if names is None:
        family = FAMILIES.get(str(config.values.get("model_type")))
    else:
        known = (
            [_BY_ARCHITECTURE[n] for n in names if n in _BY_ARCHITECTURE]
            if isinstance(names, list)
            else []
        )
        family = known[0] if known else None
    if family is None:
        raise ConfigError(
            f"{config.file}: architectures={names!r}, "
            f"model_type={config.values.get('model_type')!r} is not supported; supported are "
            + ", ".join(sorted(_BY_ARCHITECTURE))
        )
    return family


def _context(config: ConfigFile, default: int, wanted: int | None) -> int:
    longest = config.integer("max_position_embeddings", default)
    if wanted is None:
        return longest
    if not 1 <= wanted <= longest:
        raise ConfigError(
            f"context length {wanted} must be between 1 and max_position_embeddings={longest} "
            f"of {config.file}"
        )
    return wanted


def _dtype(config: ConfigFile, wanted: str) -> DType:
    field = config.spelling("dtype", "torch_dtype")
    name = config.values.get(field) if wanted == "auto" else wanted
    if name == "bfloat16":
        return "bfloat16"
    if name == "float32":
        return "float32"
    if wanted == "auto":
        raise config.error(field, "run it with dtype bfloat16 or float32")
    raise ConfigError(f"dtype {wanted!r} must be auto, bfloat16 or float32")


def _eos(config: ConfigFile, generation_file: Path, default: int | None) -> tuple[int, ...]:
    """End-of-sequence ids of both files; the family's default when neither names any."""
    ids = _token_ids(config)
    if generation_file.exists():
        ids += _token_ids(ConfigFile(generation_file))
    if not ids and "eos_token_id" not in config.values and default is not None:
        ids = [default]
    return tuple(dict.fromkeys(ids))


def _token_ids(config: ConfigFile) -> list[int]:
    value = config.values.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(item) is int and item >= 0 for item in ids):
        raise config.error("eos_token_id", "must be a token id or a list of token ids")
    return list(ids)
