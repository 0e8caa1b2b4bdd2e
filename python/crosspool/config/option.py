"""An option: one row that holds everything about a thing that a user may set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import msgspec

from crosspool.config.device import parse_devices
from crosspool.config.sizes import exact_size, parse_size

Unit = Literal["", "bytes", "devices", "tokens", "steps", "requests", "hosts", "ms", "s"]
"""``bytes`` are written as sizes (``2GiB``), ``devices`` as names (``cpu:0-7``)."""
_METAVARS_OF_UNITS = {"bytes": "SIZE", "s": "SECONDS"}
_METAVARS_OF_TYPES = {int: "N", float: "X", dict: "JSON"}


@dataclass(frozen=True)
class Option:
    """One option. A row of :mod:`crosspool.config.options` gets its name, type, default and scope
    from the field that it annotates; a row of :mod:`crosspool.config.sglang_flags` names them."""

    help: str
    """Sentences for ``--help`` and the example file."""
    group: str = ""
    """Heading in ``--help`` and the example file."""
    unit: Unit = ""
    least: float | None = None
    most: float | None = None
    multiple_of: int | None = None
    sglang: str = ""
    """SGLang's name for it, which the flag then has too. A flag of a ``bool`` turns the default
    around."""
    example: Any = None
    """Value in the example file where the default would show little."""
    name: str = ""
    """Key in the deployment file."""
    type: Any = str
    """Type of its value: ``bool``, ``int``, ``float``, ``str``, a Literal, ``list[str]``,
    ``dict[str, Any]``, or, with the unit ``devices``, a tuple of Device."""
    default: Any = None
    """Value when the user gives none; None when that leaves it open, and for required options."""
    is_required: bool = False
    per_model: bool = False
    effect: Literal["crosspool", "sglang", "none"] = "crosspool"
    """What it sets: a field of Deployment or ModelConfig; a ServerArgs field of SGLang, through
    their ``sglang`` mapping; or nothing, so that a command line written for SGLang works."""
    is_secret: bool = False
    """Whether nobody may see its value: no message, no answer and no log has it."""

    @property
    def flag(self) -> str:
        own = f"no_{self.name}" if self.default is True else self.name
        return "--" + (self.sglang or own).replace("_", "-")

    @property
    def choices(self) -> tuple[Any, ...]:
        return get_args(self.type) if get_origin(self.type) is Literal else ()

    @property
    def plain_type(self) -> type:
        """Class of its values; ``str`` for sizes and devices, which are parsed from text."""
        if self.choices:
            return type(self.choices[0])
        written_as_words = self.unit in ("bytes", "devices")
        return str if written_as_words else (get_origin(self.type) or self.type)

    @property
    def metavar(self) -> str:
        """Placeholder of a value in ``--help``: ``SIZE``, ``TOKENS``, ``PATH``, ..."""
        if self.unit:
            return _METAVARS_OF_UNITS.get(self.unit, self.unit.upper())
        last_word = self.flag.rpartition("-")[2].upper()
        return _METAVARS_OF_TYPES.get(self.plain_type, last_word)

    def read(self, given: Any) -> Any:
        """Turns a value as YAML or JSON has it into what the field holds.

        Raises ValueError that tells what was given and what would be right."""
        if given is None and self.default is None and not self.is_required:
            return None
        if self.choices and given not in self.choices:
            raise ValueError(f"{given!r} is not one of {', '.join(map(str, self.choices))}")
        written = {"bytes": int | str, "devices": str | list[str]}.get(self.unit, self.type)
        try:
            value = msgspec.convert(given, written)
        except msgspec.ValidationError as error:
            shown = "" if self.is_secret else f": {given!r}"
            raise ValueError(f"{error}{shown}") from None
        if self.unit == "bytes":
            value = 0 if self.least == 0 and value in (0, "0") else parse_size(value)
        elif self.unit == "devices":
            value = parse_devices(value if isinstance(value, str) else ",".join(value))
        self._check_range(given, value)
        return value

    def _check_range(self, given: Any, value: Any) -> None:
        too_small = self.least is not None and not value >= self.least
        if self.most is not None and (too_small or not value <= self.most):
            raise ValueError(f"{given} must be between {self.least} and {self.most}")
        if too_small:
            raise ValueError(f"{given} must be at least {self.least}")
        if self.multiple_of is not None and value % self.multiple_of:
            raise ValueError(f"{given} must be a multiple of {self.written(self.multiple_of)}")

    def written(self, value: Any) -> str:
        """Returns ``value`` as a user writes it: ``2MiB``, ``cpu:0,cpu:1``, ``true``, ``50``."""
        if self.unit == "bytes":
            return exact_size(value)
        if self.unit == "devices":
            return ",".join(device.name for device in value)
        if isinstance(value, bool):
            return str(value).lower()
        return f"{value:g}" if isinstance(value, float) else str(value)


def options_of(table: type[msgspec.Struct], *, per_model: bool) -> dict[str, Option]:
    """Returns the options of a struct by name: the fields that an Option annotates."""
    hints = get_type_hints(table, include_extras=True)
    found = {}
    for field in msgspec.structs.fields(table):
        arguments: Sequence[Any] = get_args(hints[field.name])
        if arguments and isinstance(arguments[-1], Option):
            found[field.name] = replace(
                arguments[-1],
                name=field.name,
                type=_without_none(arguments[0]),
                default=None if field.required else field.default,
                is_required=field.required,
                per_model=per_model,
            )
    return found


def _without_none(hint: Any) -> Any:
    """Returns ``X`` for ``X | None``."""
    others = [part for part in get_args(hint) if part is not NoneType]
    return others[0] if NoneType in get_args(hint) else hint
