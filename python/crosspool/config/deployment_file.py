"""The deployment file (YAML) of ``crosspool serve --config``, read into Options."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import yaml

from crosspool.config.errors import ConfigError
from crosspool.config.models_dir import models_in
from crosspool.config.option import Option
from crosspool.config.options import MODEL_OPTIONS, SERVER_OPTIONS, ModelOptions, Options
from crosspool.config.sglang_flags import BY_NAME, reason_refused

_BY_SGLANGS_NAME = {
    option.sglang: option
    for option in (*MODEL_OPTIONS.values(), *SERVER_OPTIONS.values())
    if option.sglang
}


def read(path: Path) -> Options:
    """Reads the file; relative paths are relative to its folder.

    Raises ConfigError that names the file, the key, and what would be right."""
    try:
        with path.open() as stream:  # from text, an error would quote a line, keys and all
            data = yaml.safe_load(stream)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is no YAML: {error}") from None
    options = to_options(data, str(path))

    def absolute(given: str) -> str:
        return str(path.parent / Path(given).expanduser())

    models = tuple(
        msgspec.structs.replace(model, path=absolute(model.path)) for model in options.models
    )
    folders = {
        name: None if folder is None else absolute(folder)
        for name, folder in (
            ("packed_cache_dir", options.packed_cache_dir),
            ("models_dir", options.models_dir),
            ("keys", options.keys),
        )
    }
    if folders["models_dir"] is not None:
        models += tuple(models_in(folders["models_dir"], [model.path for model in models]))
    return msgspec.structs.replace(options, models=models, **folders)


def to_options(data: Any, source: str) -> Options:
    """Turns parsed YAML into Options.

    Raises ConfigError that names ``source``, the key, what was given and what would be right."""
    given = _converted(data, dict[str, Any], f"{source}: top level")
    if "models" not in given and "models_dir" not in given:
        raise ConfigError(f"{source}: models is missing, or models_dir")
    models = _converted(given.pop("models", []), list[Any], f"{source}: models")
    return Options(
        models=tuple(
            ModelOptions(**_values(model, MODEL_OPTIONS, source, f"models[{index}]"))
            for index, model in enumerate(models)
        ),
        **_values(given, SERVER_OPTIONS, source, ""),
    )


def to_model_options(data: Any, source: str) -> ModelOptions:
    """Turns one model, as JSON or YAML has it, into ModelOptions.

    Raises ConfigError that names ``source``, the key, what was given and what would be right."""
    return ModelOptions(**_values(data, MODEL_OPTIONS, source, "model"))


def _converted(value: Any, kind: Any, where: str) -> Any:
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{where}: {error}") from None


def _values(data: Any, options: Mapping[str, Option], source: str, where: str) -> dict[str, Any]:
    """The checked values of the object at ``where``; ``sglang`` is one of them."""
    dot = "." if where else ""
    given = _converted(data, dict[str, Any], f"{source}: {where}")
    for option in options.values():
        if option.is_required and option.name not in given:
            raise ConfigError(f"{source}: {where}{dot}{option.name} is missing")
    values: dict[str, Any] = {}
    for name, value in given.items():
        key = f"{source}: {where}{dot}{name}"
        if name == "sglang":
            values[name] = {
                part: _read(_sglang_option(part, key, is_model=bool(where)), one, f"{key}.{part}")
                for part, one in _converted(value, dict[str, Any], key).items()
            }
        elif name in options:
            values[name] = _read(options[name], value, key)
        else:
            known = [*([] if where else ["models"]), *options, "sglang"]
            hint = _close(name, known) or f"known keys: {', '.join(known)}"
            raise ConfigError(f"{source}: unknown key {where}{dot}{name} ({hint})")
    return values


def _read(option: Option, value: Any, key: str) -> Any:
    try:
        return option.read(value)
    except ValueError as error:
        raise ConfigError(f"{key}: {error}") from None


def _sglang_option(name: str, key: str, is_model: bool) -> Option:
    """The argument ``name`` of the mapping under ``key``, a model's or the server's.

    Raises ConfigError for one that is unknown or misplaced."""
    if own := _BY_SGLANGS_NAME.get(name):
        instead = "this key" if own.name == name else own.name
        if own.plain_type is bool:
            instead += f": {own.written(not own.default)}"
        raise ConfigError(f"{key}.{name}: write {instead} outside of sglang")
    option = BY_NAME.get(name)
    if option is None:
        taken = [option.name for option in BY_NAME.values() if option.effect == "sglang"]
        raise ConfigError(f"{key}.{name}: {_close(name, taken) or reason_refused(name)}")
    if option.effect == "none":
        raise ConfigError(f"{key}.{name} has no effect: {option.help}")
    if is_model and not option.per_model:
        raise ConfigError(f"{key}.{name} is the whole server's: write it under sglang at the top")
    return option


def _close(name: str, known: Iterable[str]) -> str:
    """Returns a hint at the known name that is most like ``name``; empty where none is."""
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]}?" if close else ""
