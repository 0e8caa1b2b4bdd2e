"""The checkpoints of a folder, for ``models_dir``."""

from __future__ import annotations

import sys
from collections.abc import Collection
from pathlib import Path

from crosspool.config.errors import ConfigError
from crosspool.config.options import ModelOptions
from crosspool.models.gguf_config import config_of
from crosspool.models.gguf_header import gguf_files
from crosspool.models.registry import family_of


def models_in(folder: str, named: Collection[str] = ()) -> list[ModelOptions]:
    """Returns a model for every folder below ``folder``, one or two deep, that has a config.json,
    and for every GGUF file in ``folder`` or one deep, in the order of their names: ``NAME`` or
    ``ORG/NAME``. Those at the paths ``named`` are left out; so are those that the server does not
    run, of which a line on stderr tells.

    Raises ConfigError where there is none at all, and for a config.json or a GGUF file that cannot
    be read."""
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise ConfigError(f"models_dir: {folder}: no such folder")
    paths = [file.parent for depth in ("*", "*/*") for file in root.glob(f"{depth}/config.json")]
    files = [file for depth in ("", "*/") for file in root.glob(f"{depth}*.gguf")]
    paths += [
        file
        for file in files
        # Of a split only the first; what lies beside a config.json belongs to that model.
        if file == gguf_files(file)[0] and not file.with_name("config.json").exists()
    ]
    others = {Path(path).expanduser().resolve() for path in named}
    found = []
    for path in sorted(paths):
        if path.resolve() in others:
            continue
        config = config_of(path)
        if family_of(config) is None:
            kind = config.values.get("architectures") or config.values.get("model_type")
            print(f"crosspool: {path} is left out: {kind!r} is not supported", file=sys.stderr)
            continue
        name = path.relative_to(root).as_posix().removesuffix(".gguf")
        found.append(ModelOptions(path=str(path), name=name))
    if not found and not others:
        raise ConfigError(f"models_dir: {folder}: no folder in it has a model that can be served")
    return found
