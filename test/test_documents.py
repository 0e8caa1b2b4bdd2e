"""What documents and comments name exists: files, modules, names, commands, flags, defaults."""

from __future__ import annotations

import argparse
import ast
import functools
import importlib.util
import itertools
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "python" / "crosspool"
NATIVE = ROOT / "sgl-kernel-ext"
SUFFIXES = "py|md|h|cpp|cu|cuh|c|pml|yaml|toml|txt|json|jsonl"
FOREIGN_FILES = {
    # of checkpoints and users
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer.model"),
    *("deployment.yaml", "deployment.json", "trace.json", "plan.yaml", "keys.yaml", "costs.json"),
    *("sharegpt.json", "a.json", "b.json", "A.json", "B.json", "hosts.txt"),
    # of other projects
    *("llama.cpp", "dlpack.h", "cuda.h"),
    # a route
    "openapi.json",
    # what benchmarks write on a GPU
    *("gpu.jsonl", "gpu_costs.json", "report.md", "report.json"),
}
FOREIGN_FLAGS = {
    *("--no-deps", "--editable", "--index-url", "--build", "--install", "--prefix"),
    *("--unix-socket", "--prometheus-port", "--rm", "--stop-timeout", "--build-arg", "--gpus"),
    *("--cpuset-cpus", "--cpus", "--memory"),
    *("--nodes", "--ntasks-per-node", "--exclusive", "--mem", "--signal", "--time", "--batch"),
}
"""Flags of pip, CMake, curl, smg, Docker and Slurm."""


def documents() -> list[Path]:
    docs = ROOT / "docs"
    folders = (ROOT, docs, docs / "decisions", docs / "deploy", ROOT / "examples")
    found = [path for folder in folders for path in sorted(folder.glob("*.md"))]
    assert len(found) >= 10
    return [path for path in found if path.name != "CHANGELOG.md"]


def sources() -> list[Path]:
    found = [
        path
        for folder in (PACKAGE, NATIVE, ROOT / "benchmark", ROOT / "test", ROOT / "examples")
        for path in sorted(folder.rglob("*"))
        if path.suffix in {".py", ".h", ".cpp", ".cu", ".pml"} and "results" not in path.parts
    ]
    assert len(found) > 300
    return found


@functools.cache
def tracked() -> frozenset[str]:
    """Paths of the project's files and folders from its root, each with a slash before it."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.split()
    if len(listed) < 100:  # an unpacked archive
        listed = [str(path.relative_to(ROOT)) for path in ROOT.rglob("*") if path.is_file()]
    files = [Path(name) for name in listed if (ROOT / name).exists()]
    folders = {parent for file in files for parent in file.parents}
    return frozenset(f"/{path}" for path in (*files, *folders))


@functools.cache
def exists(name: str) -> bool:
    """Whether a file or folder of the project has this path or ends with it."""
    end = "/" + name.removeprefix("./").rstrip("/")
    return any(path.endswith(end) for path in tracked())


def code_spans(path: Path) -> Iterator[tuple[int, str]]:
    """Line and text of everything that a document sets as code, blocks included."""
    inside = False
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if line.lstrip().startswith("```"):
            inside = not inside
        elif inside:
            yield number, line
        else:
            for span in re.findall(r"`([^`]+)`", line):
                yield number, span


def where(path: Path, number: int, what: str) -> str:
    return f"{path.relative_to(ROOT)}:{number}: {what}"


def test_links_between_documents_lead_somewhere() -> None:
    broken = []
    for path in documents():
        for number, line in enumerate(path.read_text().splitlines(), 1):
            for target in re.findall(r"\]\(([^)\s]+)\)", line):
                if re.match(r"[a-z]+:", target):
                    continue
                name, _, anchor = target.partition("#")
                file = (path.parent / name) if name else path
                if not file.exists() or (anchor and anchor not in anchors(file)):
                    broken.append(where(path, number, target))
    assert not broken, "\n".join(broken)


def anchors(path: Path) -> set[str]:
    """Anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(), re.M)
    return {
        re.sub(r"[^\w\- ]", "", heading.replace("`", "").lower()).replace(" ", "-")
        for heading in headings
    }


def test_files_that_documents_name_exist() -> None:
    file = re.compile(rf"(?<![\w/*.{{-])[\w./-]*\w\.(?:{SUFFIXES})\b(?![\w(])")
    folder = re.compile(r"(?<![\w/.*-])(?:[a-z_-]+/)+(?=$|\s)")
    missing = [
        where(path, number, name)
        for path in documents()
        for number, text in code_spans(path)
        for name in file.findall(text) + folder.findall(text)
        if not (Path(name).name in FOREIGN_FILES or "..." in name or exists(name))
    ]
    assert not missing, "\n".join(missing)


def test_files_that_comments_name_exist() -> None:
    file = re.compile(r"(?<![\w*<{%./-])[\w/-]*\w\.(?:py|md|h|cpp|cu|pml)\b")
    missing = [
        where(path, number, name)
        for path in sources()
        if path != Path(__file__)
        for number, line in enumerate(path.read_text().splitlines(), 1)
        for name in file.findall(comment_of(path, line))
        if not (Path(name).name in FOREIGN_FILES or exists(name))
    ]
    assert not missing, "\n".join(missing)


def comment_of(path: Path, line: str) -> str:
    """The part of a line that may be prose: a comment, or any line without an include or a
    string in quotes."""
    if path.suffix == ".py":
        return "" if re.search(r"""["'][^"']*\.\w+["']|f"|import """, line) else line
    return line.partition("//")[2]


def test_cross_references_of_docstrings_resolve() -> None:
    broken = []
    for path in sorted(PACKAGE.rglob("*.py")):
        text = path.read_text()
        for match in re.finditer(r":(mod|class|func|meth|data|attr):`~?([\w.]+)`", text):
            kind, name = match.groups()
            if not resolves(path, kind, name):
                broken.append(where(path, text[: match.start()].count("\n") + 1, name))
    assert not broken, "\n".join(broken)


def resolves(path: Path, kind: str, name: str) -> bool:
    if name.startswith("."):
        name = ".".join(path.relative_to(PACKAGE.parent).parent.parts) + name
    parts = name.split(".")
    if parts[0] != "crosspool":
        if parts[0] in {"torch", "numpy", "socket", "multiprocessing", "msgspec", "sglang"}:
            return True
        return parts[0] in names_in(path) or parts[-1] in names_in(path)
    for end in range(len(parts), 0, -1):
        base = PACKAGE.parent.joinpath(*parts[:end])
        file = base / "__init__.py" if base.is_dir() else base.with_suffix(".py")
        if file.exists():
            rest = parts[end:]
            return kind == "mod" if not rest else all(part in names_in(file) for part in rest)
    return False


def names_in(path: Path) -> set[str]:
    """Everything that a module defines, imports or sets, at any depth."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.Name):
            found.add(node.id)
        elif isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.arg):
            found.add(node.arg)
        elif isinstance(node, ast.alias):
            found.add((node.asname or node.name).split(".")[-1])
    return found


def test_commands_that_documents_name_exist() -> None:
    from crosspool.cli.main import COMMANDS

    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    wrong = []
    for path in documents():
        for number, text in code_spans(path):
            for module in re.findall(r"python -m ((?:crosspool|benchmark)[\w.]*)", text):
                if importlib.util.find_spec(module) is None:
                    wrong.append(where(path, number, f"python -m {module}"))
            for command in re.findall(r"(?:^|\s|/)crosspool ([a-z]+)\b", text):
                if command not in COMMANDS:
                    wrong.append(where(path, number, f"crosspool {command}"))
            for words in re.findall(r"(?:^|\s)make ([a-z][\w -]*)(?![=\w])", text):
                for target in itertools.takewhile(str.islower, words.split()):
                    if target not in targets:
                        wrong.append(where(path, number, f"make {target}"))
    assert not wrong, "\n".join(wrong)


def known_flags() -> set[str]:
    """Flags of the server, and every flag that a program of the project takes."""
    from crosspool.config.flags import make_parser

    found = {flag for action in make_parser("x")._actions for flag in action.option_strings}
    folders = [ROOT / name for name in ("benchmark", "scripts", "examples", "test/scheduler")]
    folders += [PACKAGE, NATIVE / "model"]
    for path in (path for folder in folders for path in folder.rglob("*.py")):
        found |= set(re.findall(r"""["'](--[a-z][\w-]+)["']""", path.read_text()))
    return found


def test_flags_that_documents_name_exist() -> None:
    known = known_flags() | FOREIGN_FLAGS
    assert "--kv-pool-bytes" in known and "--rate" in known
    unknown = [
        where(path, number, flag)
        for path in documents()
        for number, text in code_spans(path)
        for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", text)
        if flag not in known
    ]
    assert not unknown, "\n".join(unknown)


DEFAULT = re.compile(r"`--([a-z-]+)`[^.`]{0,30}\(default:? `?([^)`]+)`?\)")
"""How documents tell a default: `--lanes` (default: 2)."""


def test_defaults_that_documents_name_are_true() -> None:
    from crosspool.config.flags import make_parser

    assert isinstance(make_parser("x"), argparse.ArgumentParser)
    told = [
        (path, flag, value.strip())
        for path in documents()
        for flag, value in DEFAULT.findall(path.read_text().replace("\n", " "))
    ]
    assert len(told) >= 5
    wrong = [
        f"{path.name}: --{flag} (default: {value})"
        for path, flag, value in told
        if value != default_of(flag.replace("-", "_"))
    ]
    assert not wrong, "\n".join(wrong)


def default_of(field: str) -> str:
    """The default as a document writes it: without trailing zeros, sizes as 2MiB."""
    import msgspec
    from crosspool.config.deployment import Deployment
    from crosspool.config.sizes import format_size

    value = {f.name: f.default for f in msgspec.structs.fields(Deployment)}[field]
    if field.endswith("_bytes"):
        return format_size(value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def test_classes_of_the_glossary_exist() -> None:
    table = (ROOT / "docs" / "architecture.md").read_text().partition("## Processes")[0]
    named = set(re.findall(r"`([A-Z]\w+)[.`]", table))
    assert len(named) > 25
    defined = {
        node.name
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef)
    }
    assert not named - defined, sorted(named - defined)


@pytest.mark.parametrize("name", ["python/crosspool/nowhere.py", "ranks/native_engine.py"])
def test_a_missing_file_is_found(name: str) -> None:
    assert exists("python/crosspool/ranks/device.py") and exists("ranks/device.py")
    assert not exists(name)
