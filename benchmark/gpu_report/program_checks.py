"""Checks that are programs of their own: experiments in C++, the tests, compute-sanitizer."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from xml.etree import ElementTree

from benchmark.gpu_report.notes import Gravity, Notes, skip
from benchmark.gpu_report.platform import Platform
from benchmark.records import ROOT

EXPERIMENTS = ROOT / "build" / "gpu" / "cuda" / "resident_gpu"
_LOOP_TESTS = "test/kernels/test_cuda_loop_gpu.py"
_SANITIZED_STEPS = "1000"
_TEST_SECONDS, _FILE_SECONDS = 60, 150
"""Time limits of one test, and of one file or folder of tests."""
_STEPS = "20000"
"""Steps of the long tests: the check "many steps" makes more."""


def resident_gpu(platform: Platform, notes: Notes, experiment: str) -> None:
    """An experiment of sgl-kernel-ext/benchmark."""
    del platform
    _experiment(notes, [experiment])


def nvshmem(platform: Platform, notes: Notes) -> None:
    """One PE that is its own peer, within a resident loop."""
    del platform
    from crosspool.kernels import nvshmem as bindings

    try:
        bindings.Nvshmem()  # finds NVSHMEM's own library
    except ImportError as error:
        skip(str(error))
    import crosspool.kernels

    library = next(Path(f) / bindings.LIBRARY for f in crosspool.kernels.__path__)
    os.environ.setdefault("NVSHMEM_BOOTSTRAP_UID_SOCK_IFNAME", "lo")
    os.environ.setdefault("NVSHMEM_CUMEM_GRANULARITY", str(2 << 20))
    _experiment(notes, ["exchange", str(library)], _with_nvshmem())


def _experiment(
    notes: Notes, words: Sequence[str], environment: Mapping[str, str] = os.environ
) -> None:
    if not EXPERIMENTS.is_file():
        skip(f"{EXPERIMENTS.relative_to(ROOT)} was not built: make gpu-report builds it")

    def line(text: str) -> None:
        try:
            row = json.loads(text)
        except ValueError:
            notes.fact("said", text.rstrip())
            return
        notes.measured(row)
        notes.at(f"ended {row['name']}")
        if row.get("blocked"):
            notes.finding(
                Gravity.WAITS, f"{row['name']} waits behind a resident loop ({row['loop']})"
            )
        if row.get("signals_right") is False:
            notes.finding(Gravity.WRONG, f"{row['name']}: the signals are wrong")
        if row["experiment"] == "lanes" and row["bytes"] == 0 and row["lanes"] == 1:
            notes.headline(f"an empty stage, {row['name']}", row["median"], "us")
        if row["experiment"] == "exchange":
            notes.headline("NVSHMEM with itself", row["median"], row["unit"])

    status = _lines([str(EXPERIMENTS), *words], line, environment)
    if status != 0:
        raise RuntimeError(f"resident_gpu {' '.join(words)} ended with {status}")


def _with_nvshmem() -> dict[str, str]:
    """Environment in which a program finds the libraries of NVSHMEM's wheel."""
    spec = importlib.util.find_spec("nvidia.nvshmem")
    folders = [f"{folder}/lib" for folder in (spec and spec.submodule_search_locations) or ()]
    paths = [*folders, os.environ.get("LD_LIBRARY_PATH", "")]
    return {**os.environ, "LD_LIBRARY_PATH": os.pathsep.join(filter(None, paths))}


def _lines(
    command: Sequence[str], take: Callable[[str], None], environment: Mapping[str, str]
) -> int:
    """Runs a program, in the process group of the check; its output goes line by line to ``take``,
    its errors to the check's log. Returns its exit status."""
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            take(line)
    return process.returncode


def gpu_tests(platform: Platform, notes: Notes) -> None:
    """Tests marked ``gpu``, file by file, each test with a time limit where pytest-timeout is."""
    total = {"passed": 0, "failed": 0, "skipped": 0}
    for path in gpu_test_files(platform.scale.tests):
        notes.at(f"runs {path}")
        for name, outcome, said in _pytest(path):
            total[outcome] += 1
            if outcome == "failed":
                notes.finding(Gravity.ERROR, f"test {name} failed: {said}")
            elif outcome == "skipped":
                notes.fact(f"skipped {name}", said)
        notes.fact(path, dict(total), so_far=True)
    for outcome, count in total.items():
        notes.headline(f"tests marked gpu that {outcome}", count, "tests")
    if not total["passed"] and not total["failed"]:
        skip("no test ran: " + "; ".join(f"{count} {what}" for what, count in total.items()))


def gpu_test_files(under: Sequence[str]) -> list[str]:
    """Files and folders that hold tests marked ``gpu``, as the Makefile finds them."""
    found: set[str] = set()
    for place in under:
        path = ROOT / place
        files = [path] if path.is_file() else sorted(path.rglob("*.py"))
        for file in files:
            if file.name != "conftest.py" and not file.name.startswith("test_"):
                continue
            if "pytest.mark.gpu" in file.read_text():
                found.add(
                    str((file.parent if file.name == "conftest.py" else file).relative_to(ROOT))
                )
    return sorted(path for path in found if not any(str(p) in found for p in Path(path).parents))


def _pytest(path: str) -> list[tuple[str, str, str]]:
    """Runs the tests marked ``gpu`` of a file; returns name, outcome and what was said of each."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "junit.xml"
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider"]
        command += [f"--junit-xml={report}", "-o", f"faulthandler_timeout={_TEST_SECONDS}"]
        if importlib.util.find_spec("pytest_timeout"):
            command += [f"--timeout={_TEST_SECONDS}", "--timeout-method=thread"]
        environment = {"CROSSPOOL_GPU_STEPS": _STEPS} | _environment()
        try:
            status = subprocess.run(
                [*command, path], check=False, cwd=ROOT, env=environment, timeout=_FILE_SECONDS
            ).returncode
        except subprocess.TimeoutExpired:
            return [(path, "failed", f"did not end within {_FILE_SECONDS} s")]
        if not report.is_file():
            return [(path, "failed", f"pytest ended with {status}, without a report")]
        return _cases(report)


def _cases(report: Path) -> list[tuple[str, str, str]]:
    found = []
    for case in ElementTree.parse(report).iter("testcase"):
        name = f"{case.get('classname')}.{case.get('name')}"
        outcome, said = "passed", ""
        for child in case:
            if child.tag in ("failure", "error"):
                outcome, said = "failed", (child.get("message") or "")[:300]
            elif child.tag == "skipped":
                outcome, said = "skipped", (child.get("message") or "")[:300]
        found.append((name, outcome, said))
    return found


def sanitizer(platform: Platform, notes: Notes) -> None:
    """The resident loop's tests, shortened, under compute-sanitizer."""
    del platform
    program = shutil.which("compute-sanitizer")
    if program is None:
        skip("compute-sanitizer is not on PATH")
    for tool in ("memcheck", "synccheck"):
        notes.at(f"runs {tool}")
        began = time.monotonic()
        command = [program, "--tool", tool, "--error-exitcode", "1", sys.executable, "-m", "pytest"]
        command += ["-m", "gpu", "-q", "-p", "no:cacheprovider", _LOOP_TESTS]
        environment = _environment() | {"CROSSPOOL_GPU_STEPS": _SANITIZED_STEPS}
        status = subprocess.run(command, check=False, cwd=ROOT, env=environment).returncode
        notes.fact(tool, f"ended with {status}", seconds=round(time.monotonic() - began, 1))
        if status != 0:
            notes.finding(Gravity.WRONG, f"{tool} of {_LOOP_TESTS} ended with {status}")


def _environment() -> dict[str, str]:
    """Environment of tests, which are found from the repository's root."""
    paths = [str(ROOT / "python"), str(ROOT), str(ROOT / "test"), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
