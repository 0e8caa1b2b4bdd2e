"""Shapes of public models: the ``config.json`` fields that tell their sizes, one file per model.

The files are read as any ``config.json`` is; under ``crosspool`` they say whose they are and how
many parameters the model is published to have. Example::

    load("qwen3-30b-a3b").ffn_bytes  # by name, whatever its case, or by the hub's repository name
    find("models/my-model/config.json")  # a name or a path, as the command line takes it
"""

from __future__ import annotations

import difflib
import functools
from pathlib import Path

import msgspec

from crosspool.config.errors import ConfigError
from crosspool.models.config_file import read_json
from crosspool.planner.shapes.reader import shape_of_config
from crosspool.planner.shapes.shape import ModelShape

_FOLDER = Path(__file__).parent


class Origin(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where a catalogue entry's facts come from."""

    repository: str
    """Of the ``config.json``, on the Hugging Face hub."""
    parameters: str
    """The published total, as published: ``30.5B``."""
    parameters_at: str
    """Address where it is published."""
    note: str | None = None


def names() -> tuple[str, ...]:
    """Ids of all models in the catalogue, in alphabetical order."""
    return tuple(sorted((file.stem for file in _FOLDER.glob("*.json")), key=str.lower))


def load(name: str) -> ModelShape:
    """The shape of a model, by its id or its repository on the hub, in any case. Raises ConfigError
    with the closest names when there is none."""
    return shape_of_config(_file(name))


def origin(name: str) -> Origin:
    """Where the model's facts come from; ``name`` as for :func:`load`."""
    return _origins()[_file(name)]


def find(name_or_path: str) -> ModelShape:
    """A catalogue entry, or the shape in a ``config.json`` or a folder that has one."""
    path = Path(name_or_path)
    if path.suffix == ".json" or path.is_dir():
        return shape_of_config(path)
    return load(name_or_path)


@functools.cache
def _origins() -> dict[Path, Origin]:
    files = [_FOLDER / f"{name}.json" for name in names()]
    return {file: msgspec.convert(read_json(file)["crosspool"], Origin) for file in files}


def _file(name: str) -> Path:
    known = {file.stem.lower(): file for file in _origins()}
    known |= {origin.repository.lower(): file for file, origin in _origins().items()}
    file = known.get(name.lower())
    if file is None:
        close = difflib.get_close_matches(name.lower(), known, n=3, cutoff=0.5)
        hint = [known[match].stem for match in close] or names()
        raise ConfigError(
            f"model {name!r} is neither in the catalogue nor the path of a config.json; "
            f"{'the closest names are' if close else 'the catalogue has'} "
            + ", ".join(dict.fromkeys(hint))
        )
    return file
