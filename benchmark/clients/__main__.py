"""Runs the clients' smoke tests: ``python -m benchmark.clients --python FOLDER/bin/python``."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

from benchmark.records import ROOT
from benchmark.server import Server, one_device

TESTS = ROOT / "benchmark" / "clients" / "smoke.py"
PACKAGES = {
    "openai": "openai",
    "litellm": "litellm",
    "langchain": "langchain-openai",
    "llama_index": "llama-index-llms-openai-like",
    "instructor": "instructor",
    "pydantic_ai": "pydantic-ai-slim",
    "anthropic": "anthropic",
    "ollama": "ollama",
}
"""The package of each client, by the beginning of its tests' names."""
_ASK = """\
import ast, json, sys
from importlib.metadata import version
tree = ast.parse(open(sys.argv[1]).read())
tests = {n.name: ast.get_docstring(n) for n in tree.body if isinstance(n, ast.FunctionDef)}
print(json.dumps([{name: version(name) for name in sys.argv[2:]}, tests]))
"""


def main() -> int:
    """Return 0 where every test passed."""
    parser = argparse.ArgumentParser(prog="python -m benchmark.clients", description=__doc__)
    parser.add_argument(
        "--python", type=os.path.abspath, required=True, help="Python of the clients' environment"
    )
    parser.add_argument("--table", type=Path, help="file that gets the table in Markdown")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        flags = [*one_device(), "--kv-pool-bytes", "128MiB", "--tool-call-parser", "qwen25"]
        with Server(flags) as server:
            command = [arguments.python, "-m", "pytest", "-q", f"--junitxml={report}"]
            command += ["-c", "/dev/null", "--rootdir", str(ROOT), "-p", "no:cacheprovider"]
            environment = {**os.environ, "CROSSPOOL_URL": server.url}
            ended = subprocess.run([*command, str(TESTS)], check=False, cwd=folder, env=environment)
        lines = list(rows(arguments.python, report))
    print("\n".join(lines))
    if arguments.table is not None:
        arguments.table.write_text("\n".join(lines) + "\n")
    return ended.returncode


def rows(python: str, report: Path) -> Iterator[str]:
    """Yield the lines of a table: client, version, what was tried, result."""
    command = [python, "-c", _ASK, str(TESTS), *PACKAGES.values()]
    told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    versions, tried = json.loads(told)
    yield "| client | version | tried | result |"
    yield "|---|---|---|---|"
    for case in ElementTree.parse(report).iter("testcase"):
        name = case.attrib["name"]
        package = next(
            package for start, package in PACKAGES.items() if name.startswith(f"test_{start}_")
        )
        bad = case.find("failure") if case.find("error") is None else case.find("error")
        result = "works" if bad is None else f"fails: {_short(bad.attrib.get('message', ''))}"
        yield f"| {package} | {versions[package]} | {tried[name]} | {result} |"


def _short(message: str) -> str:
    return " ".join(message.replace("|", "/").split())[:120]


if __name__ == "__main__":
    sys.exit(main())
