"""Checks what SGLang's front end would find out about its arguments only after its import, or at
the first request that needs one: names of parsers and templates, files and folders."""

from __future__ import annotations

import difflib
import tempfile
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jinja2.ext
import msgspec
from jinja2 import nodes
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from crosspool.config import sglang_names
from crosspool.config.deployment import ConfigError, ModelConfig
from crosspool.models.config_file import read_json
from crosspool.observability.request_spans import MODULES

_LOG_LEVELS = ("debug", "info", "warning", "error", "critical")
_CHAT_FIELDS = ("name", "sep_style", "system", "user", "assistant", "stop_str")
_COMPLETION_FIELDS = (
    "name",
    "fim_begin_token",
    "fim_middle_token",
    "fim_end_token",
    "fim_position",
)


class _Generation(jinja2.ext.Extension):
    """The block ``{% generation %}``, which transformers adds to Jinja for chat templates."""

    tags = {"generation"}  # noqa: RUF012 - Jinja declares it so

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


def check_server_arguments(server: Mapping[str, Any]) -> None:
    """Checks the server's own arguments for SGLang.

    Raises ConfigError that names the argument and what would be right."""
    for key in ("log_level", "log_level_http"):
        level = server.get(key)
        if level is not None and level.lower() not in _LOG_LEVELS:
            raise ConfigError(f"{key}: {level!r} is not one of {', '.join(_LOG_LEVELS)}")
    if server.get("enable_trace"):
        _check_tracing()
    else:
        for key in ("otlp_traces_endpoint", "otlp_service_name"):
            if server.get(key) is not None:
                raise ConfigError(f"{key}: it says where traces go: give enable_trace, too")
    for target in server.get("log_requests_target") or ():
        if target != "stdout":
            _check_log_folder(Path(target))


def check_model_arguments(arguments: Mapping[str, Any], model: ModelConfig) -> None:
    """Checks the arguments for SGLang that hold for a model.

    Raises ConfigError that names the argument, the model, and what would be right."""
    parsers = {
        "tool_call_parser": sglang_names.TOOL_CALL_PARSERS,
        "reasoning_parser": sglang_names.REASONING_PARSERS,
    }
    for key, names in parsers.items():
        given = arguments.get(key)
        if given is not None and given not in ("auto", *names):
            raise ConfigError(
                f"{key} of {model.name}: {given!r} is no parser: {_hint(given, names)}"
            )
    _check_chat_template(arguments.get("chat_template"), f"chat_template of {model.name}")
    _check_completion_template(
        arguments.get("completion_template"), f"completion_template of {model.name}"
    )
    for name, value in (arguments.get("preferred_sampling_params") or {}).items():
        _check_sampling(name, value, f"preferred_sampling_params of {model.name}")
    name = arguments.get("hf_chat_template_name")
    if name is not None:
        folder = Path(arguments.get("tokenizer_path") or model.path)
        templates = _named_templates(folder)
        if name not in templates:
            known = ", ".join(sorted(templates)) or "none"
            raise ConfigError(
                f"hf_chat_template_name of {model.name}: {folder} has no chat template {name!r}; "
                f"it has {known}"
            )


def _check_sampling(name: str, value: Any, where: str) -> None:
    kinds = sglang_names.SAMPLING_PARAMETERS
    if name not in kinds:
        hint = _hint(name, list(kinds))
        raise ConfigError(f"{where}: {name!r} is no sampling parameter: {hint}")
    try:
        msgspec.convert(value, kinds[name])
    except msgspec.ValidationError as error:
        raise ConfigError(f"{where}: {name}: {error}") from None


def _check_chat_template(given: str | None, where: str) -> None:
    if not given or given in sglang_names.CHAT_TEMPLATES:
        return
    file = _template_file(given, where, sglang_names.CHAT_TEMPLATES)
    if file.suffix == ".jinja":
        _check_jinja(file, where)
    elif file.suffix == ".json":
        fields = _json_fields(file, where, _CHAT_FIELDS)
        _check_choice(fields, "sep_style", sglang_names.SEPARATOR_STYLES, file, where)
    else:
        raise ConfigError(f"{where}: {file} must end in .jinja or .json")


def _check_completion_template(given: str | None, where: str) -> None:
    if not given or given in sglang_names.COMPLETION_TEMPLATES:
        return
    file = _template_file(given, where, sglang_names.COMPLETION_TEMPLATES)
    if file.suffix != ".json":
        raise ConfigError(f"{where}: {file} must end in .json")
    fields = _json_fields(file, where, _COMPLETION_FIELDS)
    _check_choice(fields, "fim_position", sglang_names.FIM_POSITIONS, file, where)


def _template_file(given: str, where: str, names: Sequence[str]) -> Path:
    file = Path(given)
    if file.is_file():
        return file
    what = "is a folder, not a file" if file.is_dir() else "is neither a file nor a built-in one"
    raise ConfigError(f"{where}: {given!r} {what}: {_hint(given, names)}")


def _check_jinja(file: Path, where: str) -> None:
    environment = ImmutableSandboxedEnvironment(extensions=[jinja2.ext.loopcontrols, _Generation])
    try:
        environment.parse(file.read_text(encoding="utf-8").replace("\\n", "\n"))
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError(f"{where}: {file}, line {error.lineno}: {error.message}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{where}: {file} cannot be read: {error}") from None


def _json_fields(file: Path, where: str, needed: Sequence[str]) -> dict[str, Any]:
    try:
        fields = read_json(file)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    for field in needed:
        if field not in fields:
            raise ConfigError(f"{where}: {file} lacks {field}; it needs {', '.join(needed)}")
    return fields


def _check_choice(
    fields: Mapping[str, Any], key: str, choices: Sequence[str], file: Path, where: str
) -> None:
    if fields[key] not in choices:
        hint = _hint(str(fields[key]), choices)
        raise ConfigError(f"{where}: {file}: {key} cannot be {fields[key]!r}: {hint}")


def _named_templates(folder: Path) -> set[str]:
    """Names of the chat templates in a tokenizer's folder, as transformers has them."""
    names = {path.stem for path in (folder / "additional_chat_templates").glob("*.jinja")}
    if (folder / "chat_template.jinja").exists():
        names.add("default")
    file = folder / "tokenizer_config.json"
    template = read_json(file).get("chat_template") if file.exists() else None
    if isinstance(template, list):
        names |= {str(one.get("name")) for one in template if isinstance(one, dict)}
    elif template is not None:
        names.add("default")
    return names


def _check_tracing() -> None:
    """Raises ConfigError where OpenTelemetry is not installed."""
    for module in MODULES:
        try:
            found = find_spec(module)
        except ModuleNotFoundError:  # of a package above it
            found = None
        if found is None:
            raise ConfigError(
                f"enable_trace: {module} is not installed; pip install 'crosspool[otel]'"
            )


def _check_log_folder(folder: Path) -> None:
    """Makes the folder. Raises ConfigError where it cannot be made, or takes no file."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"\n")
    except OSError as error:
        raise ConfigError(
            f"log_requests_target: no log can be written into {folder}: {error.strerror}"
        ) from None


def _hint(given: str, names: Sequence[str]) -> str:
    close = difflib.get_close_matches(given, names, n=1)
    return f"did you mean {close[0]}?" if close else f"there are {', '.join(names)}"
