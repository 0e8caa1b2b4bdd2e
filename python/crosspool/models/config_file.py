"""Reads a checkpoint folder's ``config.json`` field by field, and checks each field."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

from crosspool.config.errors import ConfigError


def read_json(file: Path) -> dict[str, Any]:
    """Reads a JSON object. Raises ConfigError when the file is missing or holds anything else."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{file} is missing: the path must be a checkpoint folder") from None
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"{file} is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{file} must hold a JSON object, not a {type(values).__name__}")
    return values


_PARTS = ("text_config", "vision_config")
"""Fields of a multimodal model for its parts."""


class ConfigFile:
    """The fields of one JSON file. Every reader takes the default for a missing field, and raises
    ConfigError that names file and field when the field cannot have its value."""

    def __init__(self, file: Path, values: dict[str, Any] | None = None) -> None:
        """``values``: the fields of a file that holds them in another form; None: it is read."""
        self.file = file
        self.values = read_json(file) if values is None else values
        self._within = ""

    def section(self, field: str) -> ConfigFile:
        """Returns the fields of an object within the file, which errors name with the object."""
        values = self.values.get(field)
        if not isinstance(values, dict):
            raise self.error(field, "must be an object")
        inner = copy.copy(self)
        inner.values, inner._within = values, f"{self._within}{field}."
        return inner

    def language_part(self) -> ConfigFile:
        """Returns the fields of the language model of a multimodal one: those of ``text_config``,
        and of the file itself where that has none. Of other models returns the file."""
        text = self.values.get("text_config")
        if not isinstance(text, dict):
            return self
        outer = {name: value for name, value in self.values.items() if name not in _PARTS}
        inner = {
            name: value
            for name, value in text.items()
            if name != "architectures" and (value is not None or name not in outer)
        }
        return ConfigFile(self.file, outer | inner)

    def error(self, field: str, what: str) -> ConfigError:
        """Returns the error that a caller raises when a field's value is wrong."""
        value = self.values.get(field)
        return ConfigError(f"{self.file}: {self._within}{field}={value!r}: {what}")

    def spelling(self, *names: str) -> str:
        """Returns the first of a field's names that the file uses, or the first of all."""
        return next((name for name in names if name in self.values), names[0])

    def integer(self, field: str, default: int | None, minimum: int = 1) -> int:
        value = self.optional_integer(field, default, minimum)
        if value is None:
            raise self.error(field, f"must be an integer of at least {minimum}")
        return value

    def optional_integer(self, field: str, default: int | None, minimum: int = 1) -> int | None:
        value = self.values.get(field, default)
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
            raise self.error(field, f"must be an integer of at least {minimum}")
        return value

    def number(self, field: str, default: float, above: float = 0.0) -> float:
        value = self.optional_number(field, default, above)
        if value is None:
            raise self.error(field, f"must be a number above {above:g}")
        return value

    def optional_number(
        self, field: str, default: float | None, above: float = 0.0
    ) -> float | None:
        value = self.values.get(field, default)
        if value is None:
            return None
        valid = isinstance(value, int | float) and not isinstance(value, bool)
        if not valid or not math.isfinite(value) or value <= above:
            raise self.error(field, f"must be a number above {above:g}")
        return float(value)

    def boolean(self, field: str, default: bool) -> bool:
        value = self.values.get(field, default)
        if not isinstance(value, bool):
            raise self.error(field, "must be true or false")
        return value

    def text(self, field: str, default: str) -> str:
        value = self.values.get(field, default)
        if not isinstance(value, str):
            raise self.error(field, "must be a string")
        return value

    def integers(self, field: str) -> list[int]:
        """Reads a list of integers, which is empty when missing or null."""
        value = self.values.get(field) or []
        if not isinstance(value, list) or not all(type(item) is int for item in value):
            raise self.error(field, "must be a list of integers")
        return value
