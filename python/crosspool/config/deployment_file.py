"""The deployment file (YAML) of ``crosspool serve --config``, read into a Draft."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import msgspec
import yaml

from crosspool.config.deployment import ConfigError
from crosspool.config.draft import Draft, to_draft
from crosspool.config.sglang_flags import BY_NAME, reason_refused

_KINDS: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "int": (int,),
    "float": (float, int),
    "bool": (bool,),
    "json": (dict,),
    "list": (list,),
}


def read(path: Path) -> Draft:
    """Reads the file; relative model paths are relative to its folder.

    Raises ConfigError that names the file, the key, and what would be right."""
    try:
        data = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is no YAML: {error}") from None
    draft = to_draft(data, str(path))
    _check_sglang(draft.sglang, f"{path}: sglang", ("shared", "model"))
    for index, model in enumerate(draft.models):
        _check_sglang(model.sglang, f"{path}: models[{index}].sglang", ("model",))
    models = [
        msgspec.structs.replace(model, path=str(path.parent / Path(model.path).expanduser()))
        for model in draft.models
    ]
    return msgspec.structs.replace(draft, models=models)


def _check_sglang(arguments: dict[str, Any], where: str, scopes: tuple[str, ...]) -> None:
    """Raises ConfigError for an argument that is unknown, misplaced or of the wrong type."""
    for name, value in arguments.items():
        flag = BY_NAME.get(name)
        if flag is None:
            taken = [flag.name for flag in BY_NAME.values() if flag.effect == "sglang"]
            close = difflib.get_close_matches(name, taken, n=1)
            hint = f"did you mean {close[0]}?" if close else reason_refused(name)
            raise ConfigError(f"{where}.{name}: {hint}")
        if name == "disable_radix_cache":
            raise ConfigError(f"{where}.{name}: write prefix_cache: false outside of sglang")
        if flag.effect == "crosspool":
            raise ConfigError(f"{where}.{name}: write this key outside of sglang")
        if flag.effect == "none":
            raise ConfigError(f"{where}.{name} has no effect: {flag.help}")
        if flag.scope not in scopes:
            raise ConfigError(f"{where}.{name} is the whole server's: write it under sglang")
        is_bool_for_number = isinstance(value, bool) and flag.kind != "bool"
        if is_bool_for_number or not isinstance(value, _KINDS[flag.kind]):
            raise ConfigError(f"{where}.{name}: expected {flag.kind}, got {value!r}")
        if flag.choices and value not in flag.choices:
            allowed = ", ".join(str(choice) for choice in flag.choices)
            raise ConfigError(f"{where}.{name}: {value!r} is not one of {allowed}")
