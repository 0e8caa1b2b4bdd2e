"""Reads the rope fields of a config.json in both spellings: ``rope_parameters`` (transformers 5),
and ``rope_theta`` with ``rope_scaling``. Ranks compute the frequencies; this module refuses what
they cannot compute, and returns what changes the softmax scale."""

from __future__ import annotations

import math
from typing import Any

from crosspool.config.errors import ConfigError
from crosspool.models.config_file import ConfigFile

# Parameters that each type needs beside the base. Other types, such as longrope, change with the
# length of the sequence, so that keys in the cache would have to be rotated again.
_NEEDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}

_BASE = 10000.0
"""Base of rotations that transformers takes where neither config nor family has one."""


def check_rope(config: ConfigFile, *, alpha: bool = False) -> dict[str, Any]:
    """Returns the rope parameters in one dict with ``rope_type``, as transformers merges them.
    ``alpha``: whether the family knows Hunyuan's type ``dynamic``, which raises the base by a fixed
    ``alpha``. Raises ConfigError for a type that is not supported, or a value that makes no
    sense."""
    field = "rope_scaling" if config.values.get("rope_scaling") else "rope_parameters"
    given = config.values.get(field) or {}
    if not isinstance(given, dict) or any(isinstance(value, dict) for value in given.values()):
        raise config.error(field, "must be one object for all layers")
    rope = {"rope_type": given.get("type", "default")} | given
    needs = _NEEDS | ({"dynamic": ("alpha",)} if alpha else {})
    if rope["rope_type"] not in needs:
        raise config.error(field, f"rope_type must be one of {', '.join(needs)}")
    for name in needs[rope["rope_type"]]:
        _check_positive(config, field, name, rope.get(name))
    if rope.get("rope_theta") is not None:
        _check_positive(config, field, "rope_theta", rope["rope_theta"])
    config.optional_number("rope_theta", None)
    return rope


def check_full_rope(config: ConfigFile, *, alpha: bool = False) -> dict[str, Any]:
    """The same for families whose heads rotate in full; another ``partial_rotary_factor`` is
    refused."""
    rope = check_rope(config, alpha=alpha)
    name = "partial_rotary_factor"
    if rope.get(name, config.values.get(name)) not in (None, 1, 1.0):
        field = "rope_scaling" if config.values.get("rope_scaling") else "rope_parameters"
        raise config.error(
            field if name in rope else name, f"{name} must be 1: heads rotate in full"
        )
    return rope


def rotated_features(config: ConfigFile, head_dim: int, default: float) -> int:
    """Reads how many features of a head rotate: the first ones, of which ``partial_rotary_factor``
    says the share. ``default`` is the family's. Raises ConfigError for a share that makes no
    sense."""
    name = "partial_rotary_factor"
    share = check_rope(config).get(name, config.values.get(name, default))
    features = 0
    if isinstance(share, int | float) and not isinstance(share, bool) and 0 < share <= 1:
        features = int(head_dim * share)
    if features < 2 or features % 2:
        raise ConfigError(
            f"{config.file}: {name}={share!r}: must be a share of the head's {head_dim} features "
            "above 0 and up to 1 that is an even number of them"
        )
    return features


def unscaled_base(config: ConfigFile, dim: int) -> float | None:
    """Returns the base of rotations of ``dim`` features that nothing scales but Hunyuan's
    ``alpha``; None where they are scaled otherwise, or where the base is left to the family."""
    rope = check_rope(config, alpha=True)
    base = rope.get("rope_theta", config.values.get("rope_theta"))
    if rope["rope_type"] == "dynamic":
        return float((base or _BASE) * rope["alpha"] ** (dim / (dim - 2)))
    return base if rope["rope_type"] == "default" else None


def _check_positive(config: ConfigFile, field: str, name: str, value: object) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value <= 0:  # type: ignore[operator, arg-type]
        raise ConfigError(f"{config.file}: {field}.{name}={value!r}: must be a number above 0")


def yarn_mscale(factor: float, mscale_all_dim: float) -> float:
    """Returns the factor by which YaRN scales both q and k to sharpen the attention's logits."""
    return 1.0 if factor <= 1 else 0.1 * mscale_all_dim * math.log(factor) + 1.0
