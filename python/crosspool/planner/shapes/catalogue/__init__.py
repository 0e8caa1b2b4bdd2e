"""Shapes of public models: the ``config.json`` fields that determine their sizes, a file each.

The files are read like any ``config.json``. Their field ``crosspool`` names the repository, and
the number of parameters as it is published. Example::

    load("qwen3-30b-a3b").ffn_bytes  # a name in any case, or the repository's name on the hub
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
    """Sources of a catalogue entry's facts."""

    repository: str
    """Repository on the Hugging Face hub that the ``config.json`` comes from."""
    parameters: str
    """Total number of parameters as it is published: ``30.5B``."""
    parameters_at: str
    """Address at which that number is published."""
    note: str | None = None


def names() -> tuple[str, ...]:
    """Returns the ids of all models in the catalogue, in alphabetical order."""
    return tuple(sorted((file.stem for file in _FOLDER.glob("*.json")), key=str.lower))


def load(name: str) -> ModelShape:
    """Returns the shape of the model with this id or repository name, in any case. Raises
    ConfigError that suggests the closest names when there is none."""
    return shape_of_config(_file(name))


def origin(name: str) -> Origin:
    """Returns the sources of a model's facts; ``name`` is as for :func:`load`."""
    return _origins()[_file(name)]


def find(name_or_path: str) -> ModelShape:
    """Returns the shape of a catalogue entry, or of a ``config.json`` or a folder that has one."""
    return shape_of_config(file_of(name_or_path))


def file_of(name_or_path: str) -> Path:
    """Returns the ``config.json`` of a catalogue entry, or that of a path or a folder. Raises
    ConfigError for a name that the catalogue does not have."""
    path = Path(name_or_path)
    if path.suffix == ".json" and not path.is_dir():
        return path
    return path / "config.json" if path.is_dir() else _file(name_or_path)


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
