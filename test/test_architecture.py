"""Imports run one way; torch, transformers and sglang stay where docs/architecture.md has them."""

from __future__ import annotations

import ast
from pathlib import Path

import crosspool

PACKAGE = Path(crosspool.__file__).parent
LEAVES = {"config", "transport", "observability"}
ABOVE = {
    "cli": {
        "bench",
        "checks",
        "server",
        "frontend",
        "scheduler",
        "planner",
        "simulator",
        "kvpool",
        "weightpool",
        "ranks",
        "models",
        "kernels",
    },
    "bench": {"planner"},
    "checks": {"kvpool", "weightpool", "models"},
    "server": {"checks", "frontend", "scheduler", "weightpool", "models"},
    "frontend": {"scheduler", "models"},
    "scheduler": {"kvpool", "weightpool", "models"},
    "ranks": {"kvpool", "weightpool", "models", "kernels"},
    "planner": {"simulator", "scheduler", "kvpool", "weightpool", "models"},
    "simulator": {"scheduler", "kvpool", "weightpool", "models"},
    "kvpool": {"models", "kernels"},
    "weightpool": {"models", "kernels"},
    "models": set(),
    "kernels": set(),
    "config": {"models"},
    "transport": {"models", "kernels"},
    "observability": {"models"},
}
"""What each package may import beside the leaves and itself."""
HEAVY = {"torch", "transformers", "sglang"}
LIGHT = (
    "bench/",
    "checks/",
    "cli/",
    "config/",
    "scheduler/",
    "models/",
    "kvpool/allocator",
    "kvpool/bounds",
    "kvpool/growth",
    "kvpool/layout",
    "planner/",
    "simulator/",
)


def imports(path: Path) -> list[tuple[str, bool]]:
    """Imported modules, and whether the import runs when the module is imported."""
    tree = ast.parse(path.read_text())
    lazy: set[ast.AST] = set()
    for node in ast.walk(tree):
        is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        is_typing = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        if is_function or is_typing:
            lazy.update(ast.walk(node))
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, node not in lazy) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.append((node.module, node not in lazy))
    return found


def modules() -> list[Path]:
    found = sorted(PACKAGE.rglob("*.py"))
    assert len(found) > 50
    return found


def test_imports_run_one_way() -> None:
    for path in modules():
        place = path.relative_to(PACKAGE)
        if len(place.parts) == 1:
            continue
        own = place.parts[0]
        if own == "demo":
            continue
        for name, _ in imports(path):
            parts = name.split(".")
            if parts[0] == "crosspool" and len(parts) > 1:
                allowed = {own} | LEAVES | ABOVE[own]
                assert parts[1] in allowed, f"{place} imports {name}"


def test_heavy_libraries_stay_where_they_belong() -> None:
    for path in modules():
        place = path.relative_to(PACKAGE).as_posix()
        for name, at_import in imports(path):
            library = name.split(".")[0]
            if library == "sglang":
                assert place.startswith("frontend/"), f"{place} imports {name}"
            if library in HEAVY and at_import:
                assert not place.startswith(LIGHT), f"{place} imports {name}"


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def import_graph() -> dict[str, set[str]]:
    """Modules of the package that each module imports, inside functions too; imports for types
    alone do not count."""
    known = {module_of(path) for path in modules()}
    graph: dict[str, set[str]] = {}
    for path in modules():
        tree = ast.parse(path.read_text())
        typing = {
            child
            for node in ast.walk(tree)
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
            for child in ast.walk(node)
        }
        found: set[str] = set()
        for node in ast.walk(tree):
            if node in typing:
                continue
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                names = {f"{node.module}.{alias.name}" for alias in node.names}
                found |= names if names <= known else names | {node.module}
        graph[module_of(path)] = (found & known) - {module_of(path)}
    return graph


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Modules that import each other in a circle, in order; empty where there are none."""
    done: set[str] = set()

    def visit(name: str, way: list[str]) -> list[str]:
        if name in way:
            return [*way[way.index(name) :], name]
        if name in done:
            return []
        for other in sorted(graph.get(name, ())):
            if found := visit(other, [*way, name]):
                return found
        done.add(name)
        return []

    return next((found for name in sorted(graph) if (found := visit(name, []))), [])


def test_no_modules_import_each_other() -> None:
    graph = import_graph()
    assert graph["crosspool.cli.serve"], "imports were read"
    assert not circle(graph), " imports ".join(circle(graph))


def test_a_circle_is_found() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
