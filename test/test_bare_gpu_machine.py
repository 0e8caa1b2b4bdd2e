"""What ``make gpu-report``, ``make test-gpu`` and ``make bench-gpu`` run needs no more than a GPU
machine has."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from support.packages import installed

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join(
        [str(ROOT / "python"), str(ROOT), str(ROOT / "test"), os.environ.get("PYTHONPATH", "")]
    ),
    "CUDA_VISIBLE_DEVICES": "",
}

pytestmark = pytest.mark.skipif(not installed("triton"), reason="triton is not installed")


def gpu_tests() -> list[str]:
    """Test files as the Makefile finds them."""
    shown = subprocess.run(
        ["make", "--no-print-directory", "-n", "-o", "native-gpu", "test-gpu"],
        check=True,
        cwd=ROOT,
        capture_output=True,
        text=True,
    ).stdout
    return [word for word in shown.split() if word.startswith("test/")]


def test_gpu_tests_are_collected_without_what_is_missing_there() -> None:
    paths = gpu_tests()
    assert "test/ranks/gpu" in paths and "test/kernels/gpu" in paths, paths
    # Run, not only collected: without a GPU each says by itself what it needs.
    command = [sys.executable, "-m", "pytest", "-p", "support.bare_machine", "-rs", "-m", "gpu"]
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider", *paths],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode in (0, 5), done.stdout[-3000:] + done.stderr[-2000:]
    assert int(re.findall(r"(\d+) skipped", done.stdout)[-1]) > 10, done.stdout[-2000:]
    assert "msgspec is not installed" in done.stdout, done.stdout[-3000:]


def test_the_benchmark_starts_there() -> None:
    hidden = "import support.bare_machine, runpy, sys; sys.argv = ['gpu', '--help'];"
    run = "runpy.run_module('benchmark.gpu', run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", f"{hidden} {run}"],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0 and "--models" in done.stdout, done.stderr


REPORT = "import support.bare_machine, sys; from benchmark.gpu_report.__main__ import main; "


def run_bare(code: str, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *words],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=100,
    )


def test_the_report_starts_there(tmp_path: Path) -> None:
    done = run_bare(REPORT + "main(sys.argv[1:])", "--help")
    assert done.returncode == 0 and "stage parity" in done.stdout, done.stderr
    # Its checks are processes of their own, which come here again.
    again = f"[sys.executable, '-c', {REPORT + 'main(sys.argv[1:])'!r}]"
    code = REPORT + f"main(sys.argv[1:], launcher={again})"
    out = tmp_path / "out"
    done = run_bare(code, "--only", "machine", "device", "--out", str(out))
    assert done.returncode == 0, done.stderr
    told = json.loads((out / "report.json").read_text())
    assert [check["status"] for check in told["checks"]] == ["passed", "failed"], told
    assert told["machine"]["torch"] == importlib.metadata.version("torch")
    page = (out / "report.md").read_text()
    assert re.search(r"\*\*error\*\* in `device`: RuntimeError: PyTorch \S+ sees no GPU", page), (
        page
    )
    with tarfile.open(tmp_path / "out.tar.gz") as packed:
        assert {"out/report.md", "out/device.stacks.txt"} <= set(packed.getnames())


def test_every_check_can_be_imported_there() -> None:
    code = (
        "import support.bare_machine, importlib; from benchmark.gpu_report.checks import CHECKS; "
        "import benchmark.gpu_report.launches; "
        "modules = {c.name: importlib.import_module(f'benchmark.gpu_report.{c.module}') "
        "for c in CHECKS}; "
        "assert all(hasattr(modules[c.name], c.function) for c in CHECKS)"
    )
    done = run_bare(code)
    assert done.returncode == 0, done.stderr
