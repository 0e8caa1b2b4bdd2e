"""Reads the rope fields of a config.json in both spellings: ``rope_parameters`` (transformers 5),
and ``rope_theta`` with ``rope_scaling``. Ranks compute the frequencies; this module refuses what
they cannot compute, and returns what changes the softmax scale.

``longrope`` has frequencies for short sequences and others for sequences that are longer than those
of the model's first training. Keys lie in the cache as they were rotated, so a model takes one of
the two for all sequences, by the longest that it is served with; vLLM and llama.cpp do the same."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from crosspool.config.errors import ConfigError
from crosspool.models.config_file import ConfigFile

# Parameters that each type needs beside the base. Other types change with the length of the
# sequence, so that keys in the cache would have to be rotated again.
_NEEDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}
# Types that few families have.
_FURTHER: dict[str, tuple[str, ...]] = {
    "dynamic": ("alpha",),  # Hunyuan's, which raises the base by a fixed ``alpha``
    "longrope": ("original_max_position_embeddings", "short_mscale", "long_mscale"),
    "divided": (),  # of GGUF files alone
}

_BASE = 10000.0
"""Base of rotations that transformers takes where neither config nor family has one."""


@dataclass(frozen=True)
class DividedRotations:
    """Rotations each of which has a divisor of its own."""

    base: float
    divisors: tuple[float, ...]
    """Divisors of the frequencies, one for each pair of features."""
    factor: float
    """Factor on cos and sin."""


def check_rope(config: ConfigFile, *, also: Collection[str] = ()) -> dict[str, Any]:
    """Returns the rope parameters in one dict with ``rope_type``, as transformers merges them.
    ``also``: the types that the family knows beside the common ones. Raises ConfigError for a type
    that is not supported, or a value that makes no sense."""
    field = _field(config)
    given = config.values.get(field) or {}
    if not isinstance(given, dict) or any(isinstance(value, dict) for value in given.values()):
        raise config.error(field, "must be one object for all layers")
    rope = {"rope_type": given.get("type", "default")} | given
    needs = _NEEDS | {name: _FURTHER[name] for name in also}
    if rope["rope_type"] not in needs:
        raise config.error(field, f"rope_type must be one of {', '.join(needs)}")
    for name in needs[rope["rope_type"]]:
        _check_positive(config, field, name, rope.get(name))
    if rope.get("rope_theta") is not None:
        _check_positive(config, field, "rope_theta", rope["rope_theta"])
    config.optional_number("rope_theta", None)
    return rope


def check_full_rope(config: ConfigFile, *, also: Collection[str] = ()) -> dict[str, Any]:
    """The same for families whose heads rotate in full; another ``partial_rotary_factor`` is
    refused."""
    rope = check_rope(config, also=also)
    name = "partial_rotary_factor"
    if rope.get(name, config.values.get(name)) not in (None, 1, 1.0):
        raise config.error(
            _field(config) if name in rope else name, f"{name} must be 1: heads rotate in full"
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
    rope = check_rope(config, also=_FURTHER)
    base = _base(config, rope)
    if rope["rope_type"] == "dynamic":
        return float((base or _BASE) * rope["alpha"] ** (dim / (dim - 2)))
    return base if rope["rope_type"] == "default" else None


def check_divisors(config: ConfigFile, dim: int) -> None:
    """Raises ConfigError unless the lists of divisors have a number above 0 for each pair of
    ``dim`` features, and the base is named, where rotations have divisors."""
    rope, field = check_rope(config, also=_FURTHER), _field(config)
    lists = _DIVISORS.get(rope["rope_type"], ())
    if lists and _base(config, rope) is None:
        raise config.error("rope_theta", f"must be named with a rope_type of {rope['rope_type']}")
    for name in lists:
        found = rope.get(name)
        if not isinstance(found, list) or len(found) != dim // 2:
            raise ConfigError(
                f"{config.file}: {field}.{name} must list {dim // 2} numbers, one for each pair of "
                "features of a head"
            )
        for value in found:
            _check_positive(config, field, name, value)


_DIVISORS = {"longrope": ("short_factor", "long_factor"), "divided": ("divisors",)}


def is_long(config: ConfigFile, context: int) -> bool:
    """Whether a model that is served with ``context`` tokens takes longrope's frequencies for long
    sequences."""
    rope = check_rope(config, also=_FURTHER)
    longrope = rope["rope_type"] == "longrope"
    return bool(longrope and context > rope["original_max_position_embeddings"])


def divided_rotations(config: ConfigFile, context: int) -> DividedRotations | None:
    """Returns the rotations of a model that is served with ``context`` tokens, where each has a
    divisor of its own; None where they have not. The family calls :func:`check_divisors`."""
    rope = check_rope(config, also=_FURTHER)
    base = _base(config, rope)
    if rope["rope_type"] not in _DIVISORS or base is None:
        return None
    if rope["rope_type"] == "divided":
        return DividedRotations(base, tuple(rope["divisors"]), 1.0)
    length = "long" if is_long(config, context) else "short"
    return DividedRotations(base, tuple(rope[f"{length}_factor"]), rope[f"{length}_mscale"])


def _base(config: ConfigFile, rope: dict[str, Any]) -> float | None:
    """The base that the file names, if it names one."""
    base: float | None = rope.get("rope_theta", config.values.get("rope_theta"))
    return base


def _field(config: ConfigFile) -> str:
    return "rope_scaling" if config.values.get("rope_scaling") else "rope_parameters"


def _check_positive(config: ConfigFile, field: str, name: str, value: object) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value <= 0:  # type: ignore[operator, arg-type]
        raise ConfigError(f"{config.file}: {field}.{name}={value!r}: must be a number above 0")


def yarn_mscale(factor: float, mscale_all_dim: float) -> float:
    """Returns the factor by which YaRN scales both q and k to sharpen the attention's logits."""
    return 1.0 if factor <= 1 else 0.1 * mscale_all_dim * math.log(factor) + 1.0
