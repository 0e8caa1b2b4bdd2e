"""Builds and runs the native stress test of signals and doorbells, under ThreadSanitizer where the
compiler has it."""

import shutil
import subprocess
from pathlib import Path

import pytest

NATIVE = Path(__file__).parents[2] / "sgl-kernel-ext"


@pytest.fixture(scope="module")
def compiler() -> str:
    found = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if found is None:
        pytest.skip("no C++ compiler")
    return found


def build(compiler: str, folder: Path, *options: str) -> Path:
    program = folder / "signal_stress"
    sources = [NATIVE / "test/signal_stress.cpp", NATIVE / "cpu/signal.cpp"]
    flags = ["-std=c++20", "-O2", "-g", "-pthread", f"-I{NATIVE / 'include'}", *options]
    subprocess.run([compiler, *flags, *sources, "-o", program], check=True, timeout=120)
    return program


def thread_sanitizer_works(compiler: str, folder: Path) -> bool:
    """Whether the sanitizer runs here: some compilers lack its library, and some kernels' address
    layouts stop it."""
    source, program = folder / "empty.cpp", folder / "empty"
    source.write_text("int main() {}\n")
    command = [compiler, "-fsanitize=thread", source, "-o", program]
    if subprocess.run(command, check=False, capture_output=True).returncode:
        return False
    return subprocess.run([program], check=False, capture_output=True).returncode == 0


def test_stress(compiler, tmp_path):
    program = build(compiler, tmp_path)
    for spin_ns in ("0", "20000"):
        done = subprocess.run(
            [program, "20000", spin_ns], check=False, capture_output=True, text=True, timeout=240
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout == "40000 round trips\n"


def test_stress_under_thread_sanitizer(compiler, tmp_path):
    if not thread_sanitizer_works(compiler, tmp_path):
        pytest.skip("ThreadSanitizer does not work here")
    program = build(compiler, tmp_path, "-fsanitize=thread")
    for spin_ns in ("0", "20000"):
        done = subprocess.run(
            [program, "5000", spin_ns], check=False, capture_output=True, text=True, timeout=240
        )
        assert done.returncode == 0, done.stderr
        assert "WARNING: ThreadSanitizer" not in done.stderr
