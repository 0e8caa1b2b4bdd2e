#!/usr/bin/env python3
"""Starts the GPU report from this bundle, on a machine that reaches no package index.

    ./run [--part a|b|c] [--out DIR] [--only CHECK ...]    the report; its own words follow
    ./run --module NAME [WORDS ...]                        another program: pytest, benchmark.gpu
    ./run --check                                          only checks bundle and machine
    ./run --changed [WORDS ...]                            after files of the bundle were changed

Every file is checked first: a bundle with a damaged or missing file starts nothing (exit status 2),
unless the first word is --changed: you changed them, such as by building the libraries here.
What the machine has otherwise than the bundle expects is told, with what that means, and written
to bundle.txt in the report's folder; then the program starts.

This script needs Python 3.11 or newer and nothing but Python's own library. The program needs what
the machine has: PyTorch, Triton, NumPy, transformers, cuda-bindings, pytest.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

MANIFEST = "bundle.json"
KERNELS = "kernels.tar.gz"
REPORT = "benchmark.gpu_report"
_PATIENCE_S = 300.0
"""Longest time to wait for a program that is asked something."""


def main(words: list[str]) -> int:
    folder = Path(__file__).resolve().parent
    if words[:1] in (["-h"], ["--help"]):
        print(__doc__)
        return 0
    if sys.version_info < (3, 11):  # noqa: UP036
        print(f"run: needs Python 3.11 or newer, and this is {platform.python_version()}")
        return 2
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        wrong = damaged(folder, manifest["files"])
    except (OSError, ValueError, KeyError) as error:
        wrong = [f"{MANIFEST} cannot be read: {error}"]
        manifest = {}
    if words[:1] == ["--changed"] and manifest:
        words = words[1:]
        print("\n".join(f"changed: {line}" for line in wrong))
    elif wrong:
        print("run: this bundle is not whole; copy and unpack it again:")
        print("\n".join(f"  {line}" for line in wrong))
        return 2
    whole = len(manifest["files"]) - len(wrong)
    told = f"CrossPool {manifest['version']}, commit {manifest['commit']}: {whole} files are whole"
    print(told)
    environment = environment_of(folder, manifest)
    module, rest = REPORT, words
    if words[:1] == ["--module"]:
        if len(words) < 2:
            print("run: --module needs a name, as in: ./run --module benchmark.gpu")
            return 2
        module, rest = words[1], words[2:]
    lines = [
        *compared(manifest),
        *unloadable(folder),
        *unpacked_kernels(folder, manifest, environment),
    ]
    print("\n".join(lines), flush=True)
    if words == ["--check"]:
        return 0
    if module == REPORT and "--out" in rest[:-1]:  # beside the report, so that it comes home
        out = Path(rest[rest.index("--out") + 1])
        out.mkdir(parents=True, exist_ok=True)
        (out / "bundle.txt").write_text("\n".join([told, *lines]) + "\n")
    # -P: a folder `benchmark` where the program is started must not hide the bundle's.
    command = [sys.executable, "-P", "-m", module, *rest]
    os.execve(sys.executable, command, environment)


def damaged(folder: Path, files: dict[str, str]) -> list[str]:
    """Returns what is wrong with files of the bundle, by their names."""
    wrong = []
    for name, digest in files.items():
        try:
            found = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        except OSError as error:
            wrong.append(f"{name} cannot be read: {error.strerror}")
            continue
        if found != digest:
            wrong.append(f"{name} is damaged: its SHA-256 is not that of the manifest")
    return wrong


def environment_of(folder: Path, manifest: dict[str, Any]) -> dict[str, str]:
    """The environment of the program: the bundle's modules before those of the machine."""
    source = folder / "source"
    paths = [source / "python", source]
    if manifest["python"] == _python():
        paths.insert(0, folder / "site")
    before = [os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else []
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([*map(str, paths), *before]),
        "TRITON_CACHE_DIR": str(folder / "triton-cache"),
        # CUDA reads them once. A resident loop must not meet a kernel that is loaded behind it, nor
        # share its connection with another stream.
        "CUDA_MODULE_LOADING": "EAGER",
        "CUDA_DEVICE_MAX_CONNECTIONS": "32",
    }


def compared(manifest: dict[str, Any]) -> list[str]:
    """A table of what the bundle was made for and what is here; below it, what differences mean."""
    here = {
        "python": _python(),
        "glibc": _glibc(),
        "triton": _version("triton"),
        "torch": _version("torch"),
        "nvshmem": _version("nvidia-nvshmem-cu13"),
        "gpu": _gpu(),
    }
    wanted = {name: manifest.get(name) or "any" for name in here}
    wanted["gpu"] = f"sm_{manifest['architecture']}"
    lines = [f"  {'':10}{'bundle':14}here"]
    lines += [f"  {name:10}{wanted[name]:14}{here[name]}" for name in here]
    packages = ", ".join(f"{name} {version}" for name, version in manifest["packages"].items())
    if here["python"] == wanted["python"]:
        lines.append(f"  packed: {packages}")
    else:
        lines.append(
            f"Python {here['python']} cannot load the packages for Python {wanted['python']}: "
            f"{packages} are taken from this machine, if it has them; python{wanted['python']} run "
            "would use the bundle's"
        )
    if here["triton"] == _NONE:
        lines.append("Triton is not installed: no kernel can be launched")
    elif here["triton"] != wanted["triton"]:
        lines.append(
            f"Triton {here['triton']} does not use kernels compiled by {wanted['triton']}: they "
            "are compiled here instead, which takes minutes"
        )
    if here["nvshmem"] not in (_NONE, wanted["nvshmem"]) and manifest["nvshmem"]:
        lines.append(
            f"libcrosspool_nvshmem.so was linked with NVSHMEM {wanted['nvshmem']}, and may refuse "
            f"to work with {here['nvshmem']}"
        )
    if here["gpu"] == _NONE:
        lines.append("there is no GPU here: nvidia-smi lists none")
    elif wanted["gpu"] not in here["gpu"].split():
        lines.append(
            f"the bundle's libraries and kernels are for {wanted['gpu']}: build the libraries here "
            "(make -C source native-gpu); the kernels are compiled here, which takes minutes"
        )
    lines += [f"not in the bundle: {what}: {why}" for what, why in manifest["left_out"].items()]
    return lines


def unloadable(folder: Path) -> list[str]:
    """Tells which of the libraries cannot be loaded here, as after an older glibc or libstdc++."""
    lines = []
    for library in sorted((folder / "source/python/crosspool/kernels").glob("*.so")):
        if library.name.endswith("nvshmem.so"):  # it needs NVSHMEM's own, which Python finds
            continue
        try:
            ctypes.CDLL(str(library))
        except OSError as error:
            lines.append(
                f"{library.name} cannot be loaded here ({error}): build the libraries here "
                "(make -C source native-gpu)"
            )
    return lines


def unpacked_kernels(
    folder: Path, manifest: dict[str, Any], environment: dict[str, str]
) -> list[str]:
    """Unpacks the compiled kernels where Triton will look for them, once. Returns what to say."""
    digest = manifest["files"].get(KERNELS)
    cache = Path(environment["TRITON_CACHE_DIR"])
    mark = cache / "unpacked"
    if digest is None or (mark.is_file() and mark.read_text() == digest):
        return []
    command = [sys.executable, "-P", "-m", "crosspool.cli.main", "compile"]
    command += ["--unpack", str(folder / KERNELS), "--into", str(cache)]
    try:
        done = subprocess.run(
            command,
            check=False,
            env=environment,
            capture_output=True,
            text=True,
            timeout=_PATIENCE_S,
        )
        status, said = done.returncode, (done.stdout + done.stderr).strip().splitlines()
    except subprocess.TimeoutExpired:
        status, said = 1, [f"unpacking took more than {_PATIENCE_S:.0f} s"]
    if status != 0:
        return [
            "the bundle's compiled kernels are not used; they are compiled here instead, which "
            "takes minutes:",
            *(f"  {line}" for line in said[-3:]),
        ]
    mark.write_text(digest)
    return said


_NONE = "none"


def _python() -> str:
    return f"{sys.version_info.major}.{sys.version_info.minor}"


def _glibc() -> str:
    try:
        version = ctypes.CDLL(None).gnu_get_libc_version
    except AttributeError:
        return "0"
    version.restype = ctypes.c_char_p
    return bytes(version()).decode()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return _NONE


def _gpu() -> str:
    """Names of the GPUs, each with its architecture: ``NVIDIA H200 sm_90``."""
    command = ["nvidia-smi", "--query-gpu=name,compute_cap", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return _NONE
    rows = [line.rpartition(",") for line in said.stdout.splitlines() if "," in line]
    gpus = [f"{name} sm_{number.strip().replace('.', '')}" for name, _, number in rows]
    return ", ".join(dict.fromkeys(gpus)) or _NONE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
