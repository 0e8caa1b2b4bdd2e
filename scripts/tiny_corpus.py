"""Text that the bundled tiny models read: freely licensed, from the running machine.

Nothing is copied into the repository. The text comes from the interpreter and the system that
run this module: the Python language reference (``pydoc_data.topics``), the licences that Debian
installs in ``/usr/share/common-licenses`` (with the interpreter's own ``LICENSE.txt``), and the
docstrings of the standard library. Each source is a list of :class:`Passage`, a titled text.
"""

from __future__ import annotations

import importlib
import inspect
import random
import re
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LICENCES_DIR = Path("/usr/share/common-licenses")
LICENCES = ("Apache-2.0", "Artistic", "BSD", "CC0-1.0", "MPL-2.0", "GPL-2", "GPL-3", "LGPL-2.1")
DOCSTRING_MODULES = (
    "json textwrap collections functools itertools statistics random string heapq bisect shutil "
    "subprocess tempfile fractions decimal difflib csv calendar contextlib copy dataclasses enum "
    "glob gzip hashlib math operator os.path pprint queue re sched socket struct threading time "
    "timeit traceback types typing urllib.parse uuid warnings weakref zipfile logging datetime "
    "pathlib configparser argparse fnmatch base64 secrets html shlex cmd getpass locale"
)

QUESTIONS = ("Tell me about {}", "Tell me about {}.", "What is {}?", "Explain {}.")
SYSTEM_PROMPTS = ("You are a helpful assistant.", "You answer in the words of your documentation.")
LOOK_UP_TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Look up a topic in the documentation.",
        "parameters": {
            "type": "object",
            "properties": {"topic": {"type": "string"}},
            "required": ["topic"],
        },
    },
}


@dataclass(frozen=True)
class Passage:
    """A titled text. ``answer`` is the part that an assistant says when asked for the title."""

    title: str
    text: str
    answer: str


@dataclass(frozen=True)
class Chat:
    """One conversation, in the form that ``apply_chat_template`` takes."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None


def unwrap(text: str) -> str:
    """Joins the lines of prose paragraphs; code, lists and tables keep their line breaks."""
    paragraphs = []
    for paragraph in re.split(r"\n\s*\n", text.strip("\n")):
        lines = [line.rstrip() for line in paragraph.splitlines()]
        flush_left = all(re.match(r"[^\s>|*+=-]", line) for line in lines)
        if flush_left and all(len(line) > 50 for line in lines[:-1]):
            joined = re.sub(r"(?<=\w-)\n(?=\w)", "", "\n".join(lines))
            paragraphs.append(re.sub(r"\n| {2,}", " ", joined))
        else:
            paragraphs.append("\n".join(lines))
    return "\n\n".join(paragraphs)


def first_words(text: str, limit: int) -> str:
    """The first paragraphs of ``text``, at most ``limit`` characters, cut after a sentence."""
    if len(text) <= limit:
        return text.strip()
    head = text[:limit]
    end = max(head.rfind(mark) for mark in (".\n", ". ", ";\n", "; "))
    return (head[: end + 1] if end > limit // 3 else head[: head.rfind(" ")]).strip()


def language_reference(limit: int) -> list[Passage]:
    """Topics of the Python language reference, the shortest first, about ``limit`` characters."""
    from pydoc_data.topics import topics

    passages: list[Passage] = []
    used = 0
    for title, raw in sorted(topics.items(), key=lambda item: (len(item[1]), item[0])):
        heading, _, body = raw.partition("\n\n")
        heading = heading.split("\n")[0].strip()
        text = unwrap(re.sub(r"\n\*{5,}\n", "\n", body))
        prose = [p for p in text.split("\n\n") if p[:1].isalpha() and len(p) > 60]
        if used + len(text) > limit or not prose:
            continue
        used += len(text)
        answer = first_words("\n\n".join(prose), 420)
        name = title.removeprefix("bltin-").replace("-", " ")
        passages.append(Passage(name, f"{heading}\n\n{text}", answer))
    return passages


def licences(limit: int) -> list[Passage]:
    """Sections of well known licences, about ``limit`` characters in all.

    Where the system has too few of them, docstrings fill up.
    """
    sources = {name: LICENCES_DIR / name for name in LICENCES if (LICENCES_DIR / name).is_file()}
    python_licence = Path(sysconfig.get_paths()["stdlib"]) / "LICENSE.txt"
    if python_licence.is_file():
        sources["Python"] = python_licence
    passages: list[Passage] = []
    used = 0
    for name, path in sources.items():
        body = "\n".join(line.strip() for line in path.read_text("utf-8").splitlines())
        text = unwrap(body.replace("\f", "\n"))
        if used + len(text) > limit:
            continue
        used += len(text)
        for part in re.split(r"\n\n(?=\d+\. )", text):
            number = re.match(r"(\d+)\. ", part)
            title = f"section {number[1]} of the {name} licence" if number else f"{name} licence"
            if title not in {passage.title for passage in passages}:
                passages.append(Passage(title, part, first_words(part, 420)))
    if used < limit // 2:
        passages += docstrings(limit - used)
    return passages


def _documented(module: Any, prefix: str) -> Iterator[tuple[str, str]]:
    """Public functions and classes of ``module``, and the methods of those classes."""
    for name, member in sorted(vars(module).items()):
        if name.startswith("_") or not (inspect.isclass(member) or callable(member)):
            continue
        if getattr(member, "__module__", None) not in (prefix, f"_{prefix}", None):
            continue
        yield f"{prefix}.{name}", inspect.getdoc(member) or ""
        if inspect.isclass(member):
            for inner, method in sorted(vars(member).items()):
                if not inner.startswith("_") and callable(method):
                    yield f"{prefix}.{name}.{inner}", inspect.getdoc(method) or ""


def docstrings(limit: int) -> list[Passage]:
    """Docstrings of the standard library, about ``limit`` characters in all."""
    passages: list[Passage] = []
    seen: set[str] = set()
    used = 0
    for module_name in DOCSTRING_MODULES.split():
        module = importlib.import_module(module_name)
        entries = [(module_name, inspect.getdoc(module) or ""), *_documented(module, module_name)]
        for title, doc in entries:
            text = unwrap(doc)
            if not 80 <= len(text) <= 3000 or text in seen or used + len(text) > limit:
                continue
            seen.add(text)
            used += len(text)
            passages.append(Passage(title, f"{title}\n\n{text}", first_words(text, 420)))
    return passages


SOURCES: dict[str, Callable[[int], list[Passage]]] = {
    "language-reference": language_reference,
    "licences": licences,
    "docstrings": docstrings,
}


def chats(passages: list[Passage], rng: random.Random, count: int, tools: bool) -> list[Chat]:
    """``count`` rounds of short conversations about all passages, in random order.

    Some open with a system turn; with ``tools`` some call :data:`LOOK_UP_TOOL` first.
    """
    result: list[Chat] = []
    for _ in range(count):
        for passage in rng.sample(passages, len(passages)):
            question = {"role": "user", "content": rng.choice(QUESTIONS).format(passage.title)}
            answer = {"role": "assistant", "content": passage.answer}
            if tools and rng.random() < 0.15:
                call = {"name": "look_up", "arguments": {"topic": passage.title}}
                asked = {"role": "user", "content": f"Look up {passage.title}."}
                called = {
                    "role": "assistant",
                    "content": "",
                    "tool_calls": [{"type": "function", "function": call}],
                }
                told = {"role": "tool", "content": passage.answer}
                result.append(Chat([asked, called, told, answer], [LOOK_UP_TOOL]))
            elif rng.random() < 0.25:
                system = {"role": "system", "content": rng.choice(SYSTEM_PROMPTS)}
                result.append(Chat([system, question, answer]))
            else:
                result.append(Chat([question, answer]))
    return result


CHATML_TEMPLATE = """\
{{- bos_token if bos_token is defined and bos_token else '' }}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

TOOLS_TEMPLATE = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + '\\n\\n' }}
    {%- endif %}
    {{- '# Tools\\n\\nYou may call one or more functions to assist with the user query.\\n\\n' }}
    {{- 'You are provided with function signatures within <tools></tools> XML tags:\\n<tools>' }}
    {%- for tool in tools %}
        {{- '\\n' + (tool | tojson) }}
    {%- endfor %}
    {{- '\\n</tools>\\n\\nFor each function call, return a json object with function name and ' }}
    {{- 'arguments within <tool_call></tool_call> XML tags:\\n<tool_call>\\n' }}
    {{- '{"name": <function-name>, "arguments": <args-json-object>}\\n</tool_call>' }}
    {{- '<|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'tool' %}
        {%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
    {%- elif not (loop.first and message.role == 'system') %}
        {{- '<|im_start|>' + message.role + '\\n' + (message.content or '') }}
        {%- for call in message.tool_calls or [] %}
            {%- set function = call.function if call.function else call %}
            {{- '\\n' if message.content or not loop.first else '' }}
            {{- '<tool_call>\\n{"name": "' + function.name + '", "arguments": ' }}
            {%- if function.arguments is string %}
                {{- function.arguments }}
            {%- else %}
                {{- function.arguments | tojson }}
            {%- endif %}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
