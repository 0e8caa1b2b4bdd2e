"""One word per thing, and docstrings that a reader takes in at once."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "python" / "crosspool"
NATIVE = ROOT / "sgl-kernel-ext"

BARE = re.compile(
    r"(As|And|But|Or|Than)\b"
    r"|(Of|By|With|Without|At|In|On|For|From|To|Into|Between|Beside|Besides|Behind|Beneath|Below"
    r"|Above|Over|Under|Through|Until|Since|Within|Before|After|Among|Against|About|Like)\b"
    r"(?![^.:]*, )"
)
"""Beginnings of a docstring that has no subject: a bare preposition or conjunction. A sentence may
begin with a preposition where a comma tells that its subject follows."""
CPP_TYPE = re.compile(
    r"^(?:struct|class|enum class|enum)(?: alignas\([^)]*\))? ([A-Z]\w*)\s*[:{]", re.M
)


def python_files() -> list[Path]:
    folders = (PACKAGE, ROOT / "benchmark", ROOT / "scripts", ROOT / "examples", ROOT / "test")
    found = [path for folder in folders for path in sorted(folder.rglob("*.py"))]
    assert len(found) > 300
    return found


def docstrings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and text of every string that stands alone: docstrings of modules, classes, functions
    and attributes."""
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        for statement in body if isinstance(body, list) else []:
            value = statement.value if isinstance(statement, ast.Expr) else None
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                yield value.lineno, value.value


@pytest.mark.parametrize("text", ["Of the FFN rank.", "By lane.", "As :func:`f`, on a GPU."])
def test_a_bare_preposition_is_found(text: str) -> None:
    tree = ast.parse(f'class A:\n    x: int\n    """{text}"""\n')
    assert [BARE.match(found) is not None for _, found in docstrings(tree)] == [True]


def test_no_docstring_begins_with_a_bare_preposition() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}: {text.strip().splitlines()[0]}"
        for path in python_files()
        for line, text in docstrings(ast.parse(path.read_text()))
        if BARE.match(text.strip())
    ]
    assert not found, "\n".join(found)


def test_no_two_public_classes_share_a_name() -> None:
    places: dict[str, list[str]] = defaultdict(list)
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places[node.name].append(str(path.relative_to(PACKAGE)))
    assert len(places) > 200
    twice = {name: where for name, where in places.items() if len(where) > 1}
    assert not twice, twice


def test_no_two_native_types_share_a_name() -> None:
    """Types of the library's headers and sources; its tests and benchmarks may have their own."""
    places: dict[str, list[str]] = defaultdict(list)
    for folder in ("include", "cpu", "cuda"):
        for path in sorted((NATIVE / folder).rglob("*")):
            if path.suffix in {".h", ".cpp", ".cu"}:
                for name in CPP_TYPE.findall(path.read_text()):
                    places[name].append(str(path.relative_to(NATIVE)))
    assert len(places) > 60
    twice = {name: where for name, where in places.items() if len(where) > 1}
    assert not twice, twice
