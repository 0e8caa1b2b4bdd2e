"""Reads ``quantization_config`` of a config.json: which matrices are stored how.

The rules by which modules are left out are those of the tools that write such checkpoints:
transformers for ``fp8``, GPTQModel for ``gptq``, AutoAWQ for ``awq``, compressed-tensors. How
activations shall be quantised is not read: products take them as they are.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from crosspool.models.config_file import ConfigFile
from crosspool.models.schemes import (
    AWQ,
    GPTQ,
    MXFP4,
    MXFP4_GROUP,
    Elements,
    Names,
    PackedWords,
    Quantization,
    Scheme,
)

_FIELDS = ("quantization_config", "compression_config")


def read_quantization(config: ConfigFile) -> Quantization | None:
    """Returns how the checkpoint's matrices are quantised; None when none is.

    Raises ConfigError that names field and value, and what is supported."""
    field = next((name for name in _FIELDS if config.values.get(name)), None)
    if field is None:
        return None
    section = config.section(field)
    default = "compressed-tensors" if "config_groups" in section.values else ""
    method = section.text("quant_method", default)
    if method not in _METHODS:
        raise section.error("quant_method", f"supported are {', '.join(sorted(_METHODS))}")
    return _METHODS[method](section)


def _fp8(section: ConfigFile) -> Quantization:
    block = section.values.get("weight_block_size")
    scheme = Elements(values="fp8", block=(None, None), scales=("weight_scale", "weight_scale_inv"))
    if block is not None:
        size = _block(section, "weight_block_size", block)
        scheme = Elements(values="fp8", block=size, scales=("weight_scale_inv", "weight_scale"))
    return _of_one_scheme("fp8", scheme, _unconverted(section))


def _unconverted(section: ConfigFile) -> Names:
    """Modules that transformers leaves out: regular expressions for whole parts of a name from its
    beginning, or endings."""
    field = section.spelling("modules_to_not_convert", "ignored_layers")
    names = [name.rstrip(".") for name in _texts(section, field)]
    return Names(
        pattern=_pattern(section, field, (f"(?:{name})(?:\\.|$)" for name in names)),
        ends=tuple(f".{name}" for name in names),
    )


def _gptq(section: ConfigFile) -> Quantization:
    spelling = section.spelling("checkpoint_format", "format")
    stored = section.text(spelling, "gptq")
    if stored not in ("gptq", "gptq_v2"):
        raise section.error(spelling, "supported are gptq and gptq_v2")
    if section.text("pack_dtype", "int32") != "int32":
        raise section.error("pack_dtype", "supported is int32")
    base = GPTQ(
        bits=_bits(section, (4, 8)),
        block=(1, _group_size(section)),
        act_order=section.boolean("desc_act", False),
        zeros_less_one=stored == "gptq",
    )
    schemes: list[tuple[Names | None, Scheme]] = []
    left_out = []
    if section.values.get("dynamic"):
        dynamic = section.section("dynamic")
        for rule in dynamic.values:
            if rule.startswith("-:"):
                left_out.append(rule.removeprefix("-:"))
                continue
            names = Names(pattern=_pattern(section, "dynamic", [rule.removeprefix("+:")]))
            schemes.append((names, _overridden(dynamic.section(rule), base)))
    inside = section.values.get("modules_in_block_to_quantize")
    schemes.append((None if inside is None else _inside(section, inside), base))
    return Quantization(
        method="gptq",
        schemes=tuple(schemes),
        plain=Names(pattern=_pattern(section, "dynamic", left_out)),
        head=section.boolean("lm_head", False),
    )


def _overridden(rule: ConfigFile, base: GPTQ) -> GPTQ:
    """The scheme of modules for which ``dynamic`` has other values."""
    unknown = rule.values.keys() - {"bits", "group_size", "desc_act", "sym"}
    if unknown:
        raise rule.error(min(unknown), "supported are bits, group_size, desc_act and sym")
    return replace(
        base,
        bits=_bits(rule, (4, 8)) if "bits" in rule.values else base.bits,
        block=(1, _group_size(rule)) if "group_size" in rule.values else base.block,
        act_order=rule.boolean("desc_act", base.act_order),
    )


def _inside(section: ConfigFile, inside: Any) -> Names:
    """The modules that optimum's ``modules_in_block_to_quantize`` lists, beneath each layer."""
    lists = inside if isinstance(inside, list) else [inside]
    names = [name for one in lists for name in (one if isinstance(one, list) else [one])]
    if not names or not all(isinstance(name, str) for name in names):
        raise section.error("modules_in_block_to_quantize", "must be lists of names")
    return Names(ends=tuple(f".{name}" for name in names))


def _awq(section: ConfigFile) -> Quantization:
    spelling = section.spelling("version", "format")
    if section.text(spelling, "gemm").lower() != "gemm":
        raise section.error(spelling, "supported is gemm")
    if not section.boolean("zero_point", True):
        raise section.error("zero_point", "must be true: gemm has zero points")
    scheme = AWQ(bits=_bits(section, (4,), default=4), block=(1, _group_size(section)))
    # AutoAWQ leaves out names that have one of these as a part, but keeps gate_proj in spite of
    # "gate".
    field = "modules_to_not_convert"
    parts = [re.escape(name.strip(".")) for name in _texts(section, field)]
    rules = (f"(?:.*\\.)?{part}(?:\\.|$)" for part in parts)
    return _of_one_scheme("awq", scheme, Names(pattern=_pattern(section, field, rules)))


def _mxfp4(section: ConfigFile) -> Quantization:
    return _of_one_scheme("mxfp4", MXFP4(), _unconverted(section))


def _compressed(section: ConfigFile) -> Quantization:
    if section.text("quantization_status", "compressed") != "compressed":
        raise section.error("quantization_status", "must be compressed")
    for field in ("sparsity_config", "transform_config"):
        if section.values.get(field):
            raise section.error(field, "sparse and transformed weights are not supported")
    whole = section.text("format", "")
    groups = section.section("config_groups")
    schemes = []
    for name in groups.values:
        group = groups.section(name)
        format_ = group.values.get("format") or whole
        targets = _texts(group, "targets")
        if not targets:
            raise group.error("targets", "must be a list of names")
        # Every matrix that can be quantised is a Linear.
        names = None if "Linear" in targets else _listed(group, "targets", targets)
        schemes.append((names, _compressed_scheme(group, format_, section)))
    if not schemes:
        raise section.error("config_groups", "must have a group")
    return Quantization(
        method="compressed-tensors",
        schemes=tuple(schemes),
        plain=_listed(section, "ignore", _texts(section, "ignore")),
        head=True,
    )


def _listed(section: ConfigFile, field: str, names: Iterable[str]) -> Names:
    """Modules by compressed-tensors' rule: regular expressions behind ``re:``, or whole names."""
    rules = [
        name.removeprefix("re:") if name.startswith("re:") else f"{re.escape(name)}$"
        for name in names
    ]
    return Names(pattern=_pattern(section, field, rules))


def _compressed_scheme(group: ConfigFile, format_: str, whole: ConfigFile) -> Scheme:
    weights = group.section("weights")
    bits, kind = weights.integer("num_bits", 8), weights.text("type", "int").lower()
    symmetric = weights.boolean("symmetric", True)
    if weights.values.get("dynamic"):
        raise weights.error("dynamic", "must be false: scales of weights are stored")
    strategy = weights.text("strategy", _implied_strategy(weights)).lower()
    act_order = weights.values.get("actorder") in ("group", "dynamic", True)
    size = _group_size(weights) if strategy == "group" else None
    if format_ == "mxfp4-pack-quantized":
        if (bits, kind, strategy, size) != (4, "float", "group", MXFP4_GROUP) or not symmetric:
            raise weights.error("num_bits", f"must be floats of 4 bits in groups of {MXFP4_GROUP}")
        return MXFP4()
    if format_ == "pack-quantized":
        if kind != "int":
            raise weights.error("type", "must be int")
        if strategy not in ("group", "channel"):
            raise weights.error("strategy", "must be group or channel")
        return PackedWords(
            bits=_bits(weights, (4, 8), "num_bits"),
            block=(1, size),
            symmetric=symmetric,
            act_order=act_order,
        )
    if format_ not in ("float-quantized", "int-quantized", "naive-quantized"):
        raise (group if "format" in group.values else whole).error(
            "format",
            "supported are float-quantized, int-quantized, naive-quantized, pack-quantized and "
            "mxfp4-pack-quantized",
        )
    if kind not in ("int", "float"):
        raise weights.error("type", "must be int or float")
    if bits != 8:
        raise weights.error("num_bits", f"must be 8 in the format {format_}")
    if act_order:
        raise weights.error("actorder", f"the format {format_} has none")
    if kind == "float" and not symmetric:
        raise weights.error("symmetric", "must be true for floats")
    block: tuple[int | None, int | None]
    if strategy == "block":
        structure = weights.values.get("block_structure")
        if isinstance(structure, str):
            structure = [int(part) if part.isdigit() else 0 for part in structure.split("x")]
        block = _block(weights, "block_structure", structure)
    elif strategy in ("tensor", "channel", "group"):
        block = {"tensor": (None, None), "channel": (1, None), "group": (1, size)}[strategy]
    else:
        raise weights.error("strategy", "must be tensor, channel, group or block")
    return Elements(values="fp8" if kind == "float" else "int8", block=block, symmetric=symmetric)


def _implied_strategy(weights: ConfigFile) -> str:
    size = weights.values.get("group_size")
    return "tensor" if size is None else "channel" if size == -1 else "group"


def _of_one_scheme(method: str, scheme: Scheme, plain: Names) -> Quantization:
    return Quantization(method=method, schemes=((None, scheme),), plain=plain)


def _bits(
    section: ConfigFile,
    supported: tuple[Any, ...],
    field: str = "bits",
    default: int | None = None,
) -> Any:
    bits = section.integer(field, default)
    if bits not in supported:
        raise section.error(field, f"supported are {' and '.join(map(str, supported))}")
    return bits


def _group_size(section: ConfigFile) -> int | None:
    """Reads ``group_size``; None for -1, which means whole rows."""
    size = section.integer("group_size", 128, minimum=-1)
    if size == 0:
        raise section.error("group_size", "must be at least 1, or -1 for whole rows")
    return None if size == -1 else size


def _block(section: ConfigFile, field: str, value: Any) -> tuple[int, int]:
    valid = isinstance(value, list) and len(value) == 2
    if not valid or not all(type(size) is int and size > 0 for size in value):
        raise section.error(field, "must be two integers of at least 1, rows and columns")
    return value[0], value[1]


def _texts(section: ConfigFile, field: str) -> list[str]:
    """Reads a list of strings, which is empty when missing or null."""
    value = section.values.get(field) or []
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise section.error(field, "must be a list of names")
    return value


def _pattern(section: ConfigFile, field: str, rules: Iterable[str]) -> re.Pattern[str] | None:
    """Returns what matches any of the regular expressions; None without any."""
    alternatives = [f"(?:{rule})" for rule in rules]
    try:
        return re.compile("|".join(alternatives)) if alternatives else None
    except re.error as error:
        raise section.error(field, f"holds a broken regular expression: {error}") from None


_METHODS: dict[str, Callable[[ConfigFile], Quantization]] = {
    "fp8": _fp8,
    "gptq": _gptq,
    "awq": _awq,
    "compressed-tensors": _compressed,
    "mxfp4": _mxfp4,
}
