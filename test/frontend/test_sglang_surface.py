"""Every name of SGLang that the package and its benchmarks rely on is there and is what it was.

The names are read from our own sources; what stands behind each (the fields of a message, the
signature of a function, the value of a constant) is recorded in ``sglang_surface.json``. After an
upgrade of SGLang these tests say what has changed. Once our code follows, record it again:

    python test/frontend/test_sglang_surface.py
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib
import inspect
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin

import crosspool
import msgspec
import pytest
from crosspool.config.sglang_flags import FLAGS
from crosspool.frontend import compat

compat.install()

PACKAGE = Path(crosspool.__file__).parent
ROOT = PACKAGE.parents[1]
PRIVATE = [
    PACKAGE / "frontend" / name
    for name in ("private.py", "private_answers.py", "private_routes.py")
]
RECORD = Path(__file__).with_name("sglang_surface.json")
SERVER_ARGS = "sglang.srt.server_args:ServerArgs"
HTTP_SERVER = "sglang.srt.entrypoints.http_server"
TOKENIZER = "sglang.srt.managers.tokenizer_manager:TokenizerManager"
DETOKENIZER = "sglang.srt.managers.detokenizer_manager:DetokenizerManager"

THROUGH_VALUES = {
    TOKENIZER: (
        "_dispatch_to_scheduler",
        "_handle_abort_finish_reason",
        "_handle_abort_req",
        "_handle_batch_output",
        "_init_req_state",
        "_release_req_states_on_failure",
        "_send_one_request",
        "_result_dispatcher",
        "_tokenize_texts",
        "abort_request",
        "asyncio_tasks",
        "auto_create_handle_loop",
        "context_len",
        "create_abort_task",
        "detokenize_logprob_tokens",
        "event_loop",
        "generate_request",
        "get_internal_state",
        "get_loads",
        "handle_loop",
        "last_receive_tstamp",
        "max_req_input_len",
        "recv_from_detokenizer",
        "rid_to_state",
        "send_to_scheduler",
        "server_status",
        "soft_watchdog",
        "startup_time",
    ),
    DETOKENIZER: ("_request_dispatcher", "recv_from_scheduler", "send_to_tokenizer"),
    "sglang.srt.observability.metrics_collector:TokenizerMetricsCollector": (
        "_counter_cls",
        "_gauge_cls",
        "_histogram_cls",
    ),
    "sglang.srt.entrypoints.v1_loads": ("_get_tokenizer_manager",),
    "sglang.srt.entrypoints.anthropic.serving:AnthropicServing": (
        "_convert_response",
        "_error_response",
        "_generate_anthropic_stream",
        "_handle_non_streaming",
        "_handle_streaming",
        "handle_count_tokens",
        "openai_serving_chat",
    ),
    "sglang.srt.entrypoints.ollama.serving:OllamaServing": (
        "handle_chat",
        "handle_generate",
        "tokenizer_manager",
    ),
    "sglang.srt.entrypoints.openai.protocol:CompletionRequest": ("validate_max_tokens_positive",),
    "sglang.srt.entrypoints.openai.protocol": ("UsageInfo",),
    "sglang.srt.entrypoints.openai.usage_processor:UsageProcessor": ("calculate_token_usage",),
    "sglang.srt.entrypoints.openai.serving_chat": (
        "get_json_schema_constraint",
        "should_include_usage",
    ),
    "sglang.srt.entrypoints.openai.serving_chat:OpenAIServingChat": (
        "_convert_to_internal_request",
        "_generate_chat_stream",
        "_validate_request",
        "handle_request",
    ),
    "sglang.srt.entrypoints.openai.serving_completions": (
        "should_include_usage",
        "to_openai_style_logprobs",
    ),
    "sglang.srt.entrypoints.openai.serving_completions:OpenAIServingCompletion": (
        "_convert_to_internal_request",
        "_generate_completion_stream",
        "_validate_request",
        "handle_request",
    ),
    "sglang.srt.entrypoints.openai.serving_responses:OpenAIServingResponses": (
        "_make_request",
        "background_tasks",
        "create_error_response",
        "create_responses",
        "msg_store",
        "response_store",
    ),
    "sglang.srt.entrypoints.openai.serving_tokenize:OpenAIServingTokenize": (
        "_handle_non_streaming_request",
    ),
    "sglang.srt.entrypoints.openai.serving_tokenize:OpenAIServingDetokenize": (
        "_handle_non_streaming_request",
    ),
    "sglang.srt.function_call.function_call_parser": ("get_json_schema_constraint",),
    "sglang.srt.function_call.function_call_parser:FunctionCallParser": (
        "get_structure_constraint",
    ),
    "sglang.srt.function_call.utils": ("_get_tool_schema_defs", "get_json_schema_constraint"),
    "sglang.srt.entrypoints.engine:Engine": ("generate", "tokenizer_manager"),
    "sglang.srt.runtime_context:RuntimeContext": ("override",),
    f"{SERVER_ARGS}": ("check_server_args", "resolve_once"),
    HTTP_SERVER: (
        "_GlobalState",
        "_wait_and_warmup",
        "add_prometheus_middleware",
        "app",
        "enable_func_timer",
        "lifespan",
        "set_global_state",
    ),
    "sglang.srt.managers.tokenizer_manager": ("get_tokenizer", "start_cpu_monitor_thread"),
    "sglang.srt.managers.detokenizer_manager": ("get_tokenizer", "start_cpu_monitor_thread"),
}
"""What our sources reach through a value, where reading them does not tell whose it is."""


def sources() -> list[Path]:
    return sorted([*PACKAGE.rglob("*.py"), *(ROOT / "benchmark").rglob("*.py")])


def named_in(path: Path) -> Iterator[str]:
    """Names of SGLang in one file, as ``module`` or ``module:name`` or ``module:Class.name``."""
    tree = ast.parse(path.read_text())
    aliases: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "sglang":
                    yield alias.name
                    aliases[alias.asname or "sglang"] = alias.name if alias.asname else "sglang"
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "sglang":
            for alias in node.names:
                target = f"{node.module}.{alias.name}"
                if not is_module(target):
                    target = f"{node.module}:{alias.name}"
                yield target
                aliases[alias.asname or alias.name] = target
        elif isinstance(node, ast.Constant) and re.fullmatch(r"sglang(\.\w+)+", str(node.value)):
            yield from dotted(str(node.value))
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            target = aliases.get(node.value.id, "")
            if target and not node.attr.startswith("__"):
                yield f"{target}{'.' if ':' in target else ':'}{node.attr}"


def is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def dotted(name: str) -> Iterator[str]:
    """A name in a string, such as the target of a hook."""
    module, rest = name, ""
    while not is_module(module):
        module, _, last = module.rpartition(".")
        rest = f"{last}.{rest}" if rest else last
    yield f"{module}:{rest}" if rest else module


@functools.cache
def surface() -> list[str]:
    names = {name for path in sources() for name in named_in(path)} | set(THROUGH_VALUES)
    for owner, members in THROUGH_VALUES.items():
        names |= {f"{owner}{'.' if ':' in owner else ':'}{member}" for member in members}
    return sorted(names)


def look_up(name: str) -> Any:
    """Raises AttributeError or ImportError when it is gone. An attribute that only instances have
    is looked for in the source of its class."""
    module, _, path = name.partition(":")
    value: Any = importlib.import_module(module)
    for part in path.split(".") if path else ():
        try:
            value = getattr(value, part)
        except AttributeError:
            assert inspect.isclass(value), f"{name} is gone"
            texts = [inspect.getsource(cls) for cls in value.__mro__[:-1]]
            if not any(re.search(rf"self\.{part}\b[^=\n]*=[^=]", text) for text in texts):
                raise
            return "attribute of instances"
    return value


def description(name: str) -> Any:
    """What we rely on behind a name, as JSON."""
    value = look_up(name)
    if inspect.isclass(value) and issubclass(value, msgspec.Struct):
        fields = {f.name: _typed(f) for f in msgspec.structs.fields(value)}
        if name == SERVER_ARGS:  # has hundreds, of which we set these
            return {argument: fields.get(argument) for argument in server_arguments()}
        return fields
    if dataclasses.is_dataclass(value):
        return {f.name: _typed(f) for f in dataclasses.fields(value)}
    if inspect.isroutine(value):
        return _without_addresses(str(inspect.signature(value)))
    if isinstance(value, int | str | None) and not isinstance(value, bool):
        return repr(value)
    if inspect.isclass(value) or inspect.ismodule(value):
        return "class" if inspect.isclass(value) else "module"
    return type(value).__name__


def _without_addresses(text: str) -> str:
    return re.sub(" at 0x[0-9a-f]+", "", text)


def _typed(field: Any) -> str:
    """A field's type and default; what else is annotated, such as a help text, may change."""
    kind = field.type
    if get_origin(kind) is Annotated:
        kind = get_args(kind)[0]
    text = kind.__name__ if isinstance(kind, type) and not get_args(kind) else str(kind)
    if get_origin(kind) is Union:  # whose members stand in the order in which they were first named
        text = f"Union[{', '.join(sorted(map(str, get_args(kind))))}]"
    required = (msgspec.NODEFAULT, dataclasses.MISSING)
    if field.default not in required:
        return _without_addresses(f"{text} = {field.default!r}")
    return text if field.default_factory in required else f"{text} = ..."


def server_arguments() -> list[str]:
    """Arguments of ServerArgs that come from our options, or from server_args.py itself."""
    tree = ast.parse((PACKAGE / "frontend" / "server_args.py").read_text())
    set_here = {
        keyword.arg
        for call in ast.walk(tree)
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "arguments.update"
        for keyword in call.keywords
        if keyword.arg
    }
    assert set_here
    return sorted(set_here | {flag.name for flag in FLAGS if flag.effect == "sglang"})


def record() -> dict[str, Any]:
    import sglang

    return {"version": sglang.__version__, **{name: description(name) for name in surface()}}


RECORDED: dict[str, Any] = json.loads(RECORD.read_text()) if RECORD.exists() else {}


def test_our_sources_name_what_is_recorded() -> None:
    assert set(RECORDED) - {"version"} == set(surface())
    assert sum("io_struct:" in name for name in surface()) > 60


@pytest.mark.parametrize("name", [name for name in RECORDED if name != "version"])
def test_it_is_what_it_was(name: str) -> None:
    assert description(name) == RECORDED[name]


def test_private_names_are_in_one_module() -> None:
    private = {last for name in surface() if (last := re.split("[.:]", name)[-1])[0] == "_"}
    assert private
    for path in sources():
        words = set(re.findall(r"\b_\w+", path.read_text()))
        found = words & private if path not in PRIVATE else set()
        assert not found, f"{path.relative_to(ROOT)}: {found}"


def test_no_other_private_name_is_used() -> None:
    """Every attribute with a leading underscore in these modules is SGLang's, and is recorded, but
    for the one of FastAPI that test_request_types.py sees at work, and those of our own there."""
    nodes = [node for path in PRIVATE for node in ast.walk(ast.parse(path.read_text()))]
    used = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    used |= {
        node.value
        for node in nodes
        if isinstance(node, ast.Constant) and re.fullmatch(r"_[a-z_]+", str(node.value))
    }
    private = {name for name in used if re.match(r"_[A-Za-z]", name)}
    assert private - {"_type_adapter"} <= {re.split("[.:]", name)[-1] for name in surface()}


if __name__ == "__main__":
    lines = [f" {json.dumps(k)}: {json.dumps(v)}" for k, v in record().items()]
    RECORD.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print(f"{len(lines) - 1} names recorded in {RECORD}", file=sys.stderr)
