"""Arguments for SGLang's front end are refused before anything starts, by option and model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from crosspool.checks import front_end_arguments
from crosspool.checks.front_end_arguments import check_model_arguments, check_server_arguments
from crosspool.config.deployment import ConfigError, ModelConfig
from crosspool.observability import request_spans
from support.server import DEMO

MODEL = DEMO / "tiny-qwen3-moe"
CHAT = {
    "name": "own",
    "sep_style": "CHATML",
    "system": "S",
    "user": "U",
    "assistant": "A",
    "stop_str": "x",
}
COMPLETION = {
    "name": "own",
    "fim_begin_token": "a",
    "fim_middle_token": "b",
    "fim_end_token": "c",
    "fim_position": "END",
}


def check(path: Path = MODEL, **arguments: Any) -> None:
    check_model_arguments(arguments, ModelConfig(name="m", path=str(path)))


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"chat_template": "chatmll"}, "chat_template of m: 'chatmll' .* did you mean chatml?"),
        ({"chat_template": "/no/where.jinja"}, "chat_template of m: '/no/where.jinja' is neither"),
        ({"chat_template": "/tmp"}, "chat_template of m: '/tmp' is a folder"),
        ({"completion_template": "x"}, "completion_template of m: 'x' .* there are deepseek_coder"),
        ({"tool_call_parser": "qwen26"}, "tool_call_parser of m: 'qwen26' is no .* mean qwen25?"),
        ({"reasoning_parser": "r1"}, "reasoning_parser of m: 'r1' is no parser: there are apertus"),
        ({"hf_chat_template_name": "tools"}, "hf_chat_template_name of m: .* 'tools'; .* default"),
    ],
)
def test_names_that_do_not_exist(arguments: dict[str, str], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        check(**arguments)


@pytest.mark.parametrize(
    ("parameters", "problem"),
    [
        ({"temperatur": 1}, "'temperatur' is no sampling parameter: did you mean temperature?"),
        ({"stop_strs": "x"}, "'stop_strs' is no sampling parameter"),
        ({"top_p": 0.9, "temperature": "hot"}, "temperature: Expected `float`, got `str`"),
        ({"stop": [1]}, "stop: Expected `str`, got `int`"),
    ],
)
def test_sampling_parameters_that_sglang_lacks(parameters: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=f"^preferred_sampling_params of m: {problem}"):
        check(preferred_sampling_params=parameters)


@pytest.mark.parametrize(
    ("key", "file", "text", "problem"),
    [
        ("chat_template", "a.jinja", "\n{% for x in %}", r"a\.jinja, line 2: "),
        ("chat_template", "a.txt", "", r"a\.txt must end in \.jinja or \.json"),
        ("chat_template", "a.json", "{", r"a\.json is not valid JSON"),
        ("chat_template", "a.json", "{}", r"a\.json lacks name"),
        (
            "chat_template",
            "a.json",
            json.dumps({**CHAT, "sep_style": "ML"}),
            r"a\.json: sep_style cannot be 'ML'",
        ),
        ("completion_template", "a.jinja", "", r"a\.jinja must end in \.json"),
        ("completion_template", "a.json", "{}", r"a\.json lacks name"),
        (
            "completion_template",
            "a.json",
            json.dumps({**COMPLETION, "fim_position": "FIRST"}),
            r"a\.json: fim_position cannot be 'FIRST'",
        ),
    ],
)
def test_template_files_that_cannot_work(
    tmp_path: Path, key: str, file: str, text: str, problem: str
) -> None:
    (tmp_path / file).write_text(text)
    with pytest.raises(ConfigError, match=f"{key} of m: .*{problem}"):
        check(**{key: str(tmp_path / file)})


def test_what_works_is_taken(tmp_path: Path) -> None:
    (tmp_path / "chat.json").write_text(json.dumps(CHAT))
    (tmp_path / "completion.json").write_text(json.dumps(COMPLETION))
    jinja = tmp_path / "chat.jinja"
    jinja.write_text(
        "{% for m in x %}{% generation %}{{ m }}{% endgeneration %}{% break %}{% endfor %}"
    )
    check()
    check(chat_template="chatml", completion_template="qwen_coder")
    check(chat_template=str(tmp_path / "chat.json"))
    check(chat_template=str(jinja), completion_template=str(tmp_path / "completion.json"))
    check(chat_template=str(MODEL / "chat_template.jinja"), hf_chat_template_name="default")
    check(preferred_sampling_params={"temperature": 1, "stop": ["a"], "max_new_tokens": None})
    check(tool_call_parser="auto", reasoning_parser="qwen3")


def test_a_name_among_several_chat_templates(tmp_path: Path) -> None:
    shutil.copy(MODEL / "tokenizer.json", tmp_path)
    templates = [{"name": name, "template": "x"} for name in ("default", "rag")]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": templates}))
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tools.jinja").write_text("x")
    for name in ("default", "rag", "tools"):
        check(tmp_path, hf_chat_template_name=name)
        check(tokenizer_path=str(tmp_path), hf_chat_template_name=name)
    with pytest.raises(ConfigError, match=r"it has default, rag, tools"):
        check(tmp_path, hf_chat_template_name="chat")


@pytest.mark.parametrize("key", ["log_level", "log_level_http"])
def test_levels_of_logs(key: str) -> None:
    check_server_arguments({key: "INFO"})
    with pytest.raises(ConfigError, match=f"^{key}: 'loud' is not one of debug, info"):
        check_server_arguments({key: "loud"})


def test_folders_of_request_logs(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    check_server_arguments({"log_requests_target": ["stdout", str(folder)]})
    assert folder.is_dir() and not list(folder.iterdir())
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(ConfigError, match=r"^log_requests_target: no log .*/file/c: Not a dir"):
        check_server_arguments({"log_requests_target": [str(file / "c")]})


@pytest.mark.parametrize("missing", [*request_spans.MODULES, "opentelemetry"])
def test_traces_need_an_extra(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """``find_spec`` finds nothing, or not even the package that a module would be in."""

    def find(name: str) -> object:
        if name.startswith(f"{missing}."):
            raise ModuleNotFoundError(missing)
        return None if name == missing else object()

    monkeypatch.setattr(front_end_arguments, "find_spec", find)
    with pytest.raises(ConfigError, match=rf"^enable_trace: {missing}.* 'crosspool\[otel\]'$"):
        check_server_arguments({"enable_trace": True})
    check_server_arguments({"enable_trace": False})


@pytest.mark.parametrize("key", ["otlp_traces_endpoint", "otlp_service_name"])
def test_where_traces_go_is_no_use_without_traces(key: str) -> None:
    with pytest.raises(ConfigError, match=f"^{key}: .* enable_trace"):
        check_server_arguments({key: "127.0.0.1:4317"})
