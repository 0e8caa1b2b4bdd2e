"""Reads a :class:`ModelSpec` from a checkpoint folder, and lists the tensors of a spec.

Example::

    spec = read_model(Path("models/Qwen3-30B-A3B"))
    spec.layers, spec.kv_bytes_per_token  # (48, 98304)
    [ref.key for ref in ffn_tensors(spec, layer=0)]  # ["router", "experts.0.gate", ...]
"""

from __future__ import annotations

import pkgutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from crosspool.config.errors import ConfigError
from crosspool.models import families
from crosspool.models.config_file import ConfigFile
from crosspool.models.family import Family
from crosspool.models.gguf_config import GGUF, config_of
from crosspool.models.gguf_quantization import gguf_quantization
from crosspool.models.quantization import read_quantization
from crosspool.models.schemes import ROUNDED, Names, Quantization
from crosspool.models.spec import DType, KVCacheDType, ModelSpec, TensorRef
from crosspool.models.tensors import attention_part, ffn_part

if TYPE_CHECKING:
    from crosspool.config.deployment import ModelConfig


def _found() -> dict[str, Family]:
    """Returns the families that the modules of :mod:`crosspool.models.families` define."""
    modules = [
        import_module(f"{families.__name__}.{module.name}")
        for module in pkgutil.iter_modules(families.__path__)
    ]
    values = [value for module in modules for value in vars(module).values()]
    return {value.model_type: value for value in values if isinstance(value, Family)}


FAMILIES = _found()
_NEVER_QUANTIZED = ("embed", "router", "router_bias", "shared_gate")
_BY_ARCHITECTURE = {
    name: family
    for family in FAMILIES.values()
    for name in (family.architecture, *family.further_architectures)
}


def read_model(
    path: Path,
    context_length: int | None = None,
    dtype: str = "auto",
    rounded: str | None = None,
    kv_cache_dtype: KVCacheDType = "auto",
) -> ModelSpec:
    """Reads ``config.json`` and ``generation_config.json`` of a checkpoint folder.

    ``context_length`` is a limit in tokens below the model's own. ``dtype`` is ``bfloat16``,
    ``float32``, or ``auto`` for the one in the file, where bfloat16 stands for float16.
    ``rounded``: the format to which matrices of floats are rounded when they are read.
    ``kv_cache_dtype``: how the KV cache is held.

    Raises ConfigError that names file and field when the architecture is not supported, a value
    makes no sense, the checkpoint is quantised in a way that is not supported, or is to be
    rounded and is quantised already."""
    config = config_of(path)
    family = family_of(config)
    if family is None:
        raise ConfigError(
            f"{config.file}: architectures={config.values.get('architectures')!r}, "
            f"model_type={config.values.get('model_type')!r} is not supported; supported are "
            + ", ".join(sorted(_BY_ARCHITECTURE))
        )
    spec = read_spec(config, family, _dtype(config, dtype))
    spec = replace(spec, context=_limited(config, spec.context, context_length))
    if config.file.suffix == ".gguf":
        spec = replace(spec, gguf=True)
        refs = (ref for ref in _tensors(spec) if _can_be_quantized(ref))
        quantization: Quantization | None = gguf_quantization(config, refs)
        cut_unit = config.values[GGUF]["ffn_group"]
    else:
        quantization = read_quantization(config)
        if rounded is not None and quantization is None:
            schemes = ((None, ROUNDED[rounded]),)
            quantization = Quantization(method=rounded, schemes=schemes, plain=Names())
            rounded = None
        cut_unit = 1 if quantization is None else quantization.cut_unit
    if rounded is not None:
        raise ConfigError(
            f"{config.file}: quantization={rounded!r}: the checkpoint is quantised already, and is "
            "served as it is without this option"
        )
    spec = replace(
        spec, quantization=quantization, cut_unit=cut_unit, kv_cache_dtype=kv_cache_dtype
    )
    _check_quantized(config, spec)
    return spec


def spec_of(model: ModelConfig) -> ModelSpec:
    """Reads a model of the deployment. Raises ConfigError as :func:`read_model` does."""
    return read_model(
        Path(model.path),
        model.context_length,
        model.dtype,
        model.quantization,
        model.kv_cache_dtype,
    )


def specs_of(models: Mapping[int, ModelConfig]) -> dict[int, ModelSpec]:
    """Reads the models of the deployment, by number. Raises ConfigError."""
    return {number: spec_of(model) for number, model in models.items()}


def family_of(config: ConfigFile) -> Family | None:
    """Returns the family of the first known architecture in the file, or of its model type where
    it names no architectures; None for a model that the server does not run."""
    names = config.values.get("architectures")
    if names is None:
        return FAMILIES.get(str(config.values.get("model_type")))
    known = names if isinstance(names, list) else []
    return next((_BY_ARCHITECTURE[name] for name in known if name in _BY_ARCHITECTURE), None)


def read_spec(config: ConfigFile, family: Family, dtype: DType) -> ModelSpec:
    """Reads a model of ``family``, whatever the file's dtype and quantisation. Raises ConfigError
    that names file and field for a value that makes no sense, or that ranks cannot run."""
    if config.text("hidden_act", "silu") not in ("silu", "swish"):
        raise config.error("hidden_act", "must be silu")
    hidden = config.integer("hidden_size", family.hidden)
    layers = config.integer("num_hidden_layers", family.layers)
    return ModelSpec(
        family=family.model_type,
        hidden=hidden,
        vocab=config.integer("vocab_size", family.vocab),
        context=config.integer("max_position_embeddings", family.context),
        dtype=dtype,
        norm_eps=config.number("rms_norm_eps", family.norm_eps),
        tied_embeddings=config.boolean("tie_word_embeddings", family.tied_embeddings),
        attention=family.attention(config, hidden),
        ffn=family.ffn(config, layers),
        delta_net=family.delta_net(config, layers),
        eos_token_ids=_eos(config, family.eos_token_id),
        embed_scale=_factor(config, family.embed_factor),
        logit_scale=1.0 / _factor(config, family.logit_divisor),
        renamed=_renamed(config, family),
        layer_norms=family.layer_norms,
        head_bias=family.head_bias is not None and config.boolean(family.head_bias, False),
    )


def _renamed(config: ConfigFile, family: Family) -> tuple[str, str]:
    names = config.values.get("architectures") or []
    known = (name for name in names if name in _BY_ARCHITECTURE)
    return family.further_architectures.get(next(known, family.architecture), ("", ""))


def has_recurrent_state(path: Path) -> bool:
    """Whether requests of a model have recurrent state, whatever its dtype and quantisation. Raises
    ConfigError as :func:`read_spec` does."""
    config = config_of(path)
    family = family_of(config)
    return family is not None and read_spec(config, family, "bfloat16").delta_net is not None


def _factor(config: ConfigFile, field: str | None) -> float:
    return 1.0 if field is None else config.number(field, 1.0)


def attention_tensors(spec: ModelSpec) -> list[tuple[int | None, TensorRef]]:
    """Lists every tensor of the attention part with its layer, which is None for embeddings, final
    norm and LM head."""
    family = FAMILIES[spec.family]
    part = attention_part(spec, family.qk_norms, zero_centred=family.zero_centred)
    return [(layer, _as_stored(spec, ref)) for layer, ref in part]


def ffn_tensors(spec: ModelSpec, layer: int) -> list[TensorRef]:
    """Lists every whole tensor of one layer's FFN part; an FFNShard selects a rank's share."""
    return [_as_stored(spec, ref) for ref in ffn_part(spec, layer, FAMILIES[spec.family].names)]


def _tensors(spec: ModelSpec) -> Iterator[TensorRef]:
    yield from (ref for _, ref in attention_tensors(spec))
    for layer in range(spec.layers):
        yield from ffn_tensors(spec, layer)


def _can_be_quantized(ref: TensorRef) -> bool:
    return len(ref.shape) == 2 and ref.key not in _NEVER_QUANTIZED


def _as_stored(spec: ModelSpec, ref: TensorRef) -> TensorRef:
    """Adds how the checkpoint stores a tensor."""
    ref = _renamed_ref(ref, *spec.renamed)
    if spec.quantization is None or not _can_be_quantized(ref):
        return ref
    scheme = spec.quantization.scheme(ref.module, head=ref.key == "lm_head")
    return ref if scheme is None else replace(ref, scheme=scheme)


def _renamed_ref(ref: TensorRef, begin: str, instead: str) -> TensorRef:
    def renamed(name: str) -> str:
        return instead + name.removeprefix(begin) if name.startswith(begin) else name

    ref = replace(ref, name=renamed(ref.name))
    if ref.joined is None:
        return ref
    parts = tuple(replace(part, name=renamed(part.name)) for part in ref.joined.parts)
    return replace(ref, joined=replace(ref.joined, parts=parts))


def _check_quantized(config: ConfigFile, spec: ModelSpec) -> None:
    """Raises ConfigError for a matrix whose shape its scheme cannot have."""
    if spec.quantization is None:
        return
    for ref in _tensors(spec):
        if ref.scheme is None:
            continue
        if ref.stack is not None and not ref.scheme.stacks:
            why: str | None = "it holds all experts of a layer, which are read as floats or mxfp4"
        elif ref.joined is not None:
            why = "its rows lie in several tensors, which are read as floats"
        else:
            why = ref.scheme.wrong_shape(*ref.shape)
        if why:
            raise ConfigError(
                f"{config.file}: {spec.quantization.method} cannot hold {ref.name}: {why}"
            )


def _limited(config: ConfigFile, longest: int, wanted: int | None) -> int:
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
    # Kernels multiply no float16; its weights lose three of their eleven bits.
    if name == "bfloat16" or (name == "float16" and wanted == "auto"):
        return "bfloat16"
    if name == "float32":
        return "float32"
    if wanted == "auto":
        raise config.error(field, "run it with dtype bfloat16 or float32")
    raise ConfigError(f"dtype {wanted!r} must be auto, bfloat16 or float32")


def _eos(config: ConfigFile, default: int | None) -> tuple[int, ...]:
    """Returns the end-of-sequence ids of both files, or the family's default without any."""
    ids = _token_ids(config)
    generation_file = config.file.with_name("generation_config.json")
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
