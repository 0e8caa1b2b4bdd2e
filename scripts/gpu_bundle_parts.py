"""What goes into the bundle for a GPU machine: sources, packages, libraries, compiled kernels."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "build" / "gpu-bundle"
"""Folder of what is fetched and built; it makes the next bundle quicker."""

SOURCES = (
    *("Makefile", "pyproject.toml", "LICENSE", "README.md"),
    *("benchmark", "python", "scripts", "sgl-kernel-ext", "test"),
)
LEFT_OUT_SOURCES = ("benchmark/results/",)
"""Measurements of other machines."""

PRESENT = {
    *("torch", "transformers", "tokenizers", "safetensors", "numpy", "psutil", "tqdm", "rich"),
    *("prometheus-client", "pyyaml", "jinja2"),
}
"""Dependencies of the project that a machine with PyTorch, Triton, transformers and pytest has."""
NOT_STARTED = {
    *("sentencepiece", "apache-tvm-ffi", "aiohttp", "einops", "fastapi", "ipython", "jsonschema"),
    *("loguru", "openai", "orjson", "partial-json-parser", "pillow", "pybase64", "pydantic"),
    *("python-multipart", "requests", "soundfile", "starlette", "uvicorn", "uvloop"),
}
"""Dependencies that only the HTTP front end needs: the report does not start it."""
FOR_THE_REPORT = ("pytest-timeout",)
"""Packages that are no dependency of the project, but with which the report runs its tests: a test
that hangs does not end the others."""

NVSHMEM = "3.4.5"
"""The version that PyTorch 2.11 for CUDA 13.0 demands, which the machine is supposed to have."""
GLIBC = (2, 34)
"""Newest glibc that the packages may need: Ubuntu 22.04 has 2.35."""

LIBRARIES = ("libcrosspool_cpu.so", "libcrosspool_cuda.so", "libcrosspool_nvshmem.so")
PROGRAM = "resident_gpu"
_PATIENCE_S = 1800.0
"""Longest time of a program that builds or fetches."""


class BundleError(Exception):
    """The bundle cannot be made; the message says what would be right."""


@dataclass
class Bundle:
    """The bundle while it is made: the folder, and what its manifest will say."""

    folder: Path
    python: str
    """Python's version there: ``3.12``."""
    architecture: str
    """Compute capability there: ``90``."""
    triton: str | None = None
    """Version of Triton whose kernels are packed."""
    packages: dict[str, str] = field(default_factory=dict)
    """Versions of the packed packages, by their names."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Why something was left out, by its name."""

    @property
    def source(self) -> Path:
        return self.folder / "source"

    @property
    def libraries(self) -> Path:
        return self.source / "python" / "crosspool" / "kernels"

    @property
    def program(self) -> Path:
        """Where the report looks for the experiments."""
        return self.source / "build" / "gpu" / "cuda" / PROGRAM


def sources(bundle: Bundle) -> None:
    """Copies the files that git knows, as they lie in the working folder."""
    listed = run(["git", "ls-files", "-z", "--", *SOURCES]).split("\0")
    for name in listed:
        if name and not name.startswith(LEFT_OUT_SOURCES):
            target = bundle.source / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target)


def needed_packages() -> list[str]:
    """Requirements of what the machine lacks, in the versions that are installed here."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        dependencies = tomllib.load(file)["project"]["dependencies"]
    names = {normalised(text): text for text in (*dependencies, *FOR_THE_REPORT)}
    if stale := (PRESENT | NOT_STARTED) - set(names):
        raise BundleError(f"{', '.join(sorted(stale))}: named here, but no dependency any more")
    return [_pinned(text) for name, text in names.items() if name not in PRESENT | NOT_STARTED]


def normalised(requirement: str) -> str:
    """Name of the package that a requirement is about."""
    name = re.match(r"[\w.-]+", requirement)
    assert name is not None, requirement
    return re.sub(r"[-_.]+", "-", name[0]).lower()


def packages(bundle: Bundle, wheels: Path | None) -> None:
    """Installs what the machine lacks into ``site``, from wheels for its Python.

    ``wheels``: a folder of wheels to take instead of asking a package index."""
    site = bundle.folder / "site"
    wanted = needed_packages()
    pip(_install_into(site), wanted, bundle.python, wheels)
    for info in sorted(site.glob("*.dist-info")):
        name, _, version = info.name.removesuffix(".dist-info").rpartition("-")
        bundle.packages[name] = version
    shutil.rmtree(site / "bin", ignore_errors=True)  # programs that start by a path of this machine


def pip(
    command: Sequence[str], wanted: Sequence[str], python: str, wheels: Path | None = None
) -> None:
    """Calls pip's ``install`` or ``download`` for wheels for Python ``python`` on x86-64, without
    their dependencies."""
    places = [f"manylinux_{GLIBC[0]}_{minor}_x86_64" for minor in range(GLIBC[1], 4, -1)]
    words = [sys.executable, "-m", "pip", *command, "--quiet", "--disable-pip-version-check"]
    words += ["--no-deps", "--only-binary", ":all:", "--implementation", "cp"]
    words += ["--python-version", python]
    words += [word for place in (*places, "manylinux2014_x86_64") for word in ("--platform", place)]
    if wheels is not None:
        words += ["--no-index", "--find-links", str(wheels)]
    try:
        run([*words, *wanted])
    except BundleError as error:
        raise BundleError(
            f"no wheels for Python {python} of {', '.join(wanted)}: {error}"
        ) from None


def build_libraries(bundle: Bundle) -> None:
    """Builds the libraries and the experiments for the architecture, with NVSHMEM's wheel if there
    is one."""
    need("nvcc", "it compiles the GPU libraries: install the CUDA toolkit, and put nvcc on PATH")
    need("cmake", "it builds the libraries: pip install cmake")
    targets = [
        LIBRARIES[0].removeprefix("lib")[:-3],
        LIBRARIES[1].removeprefix("lib")[:-3],
        PROGRAM,
    ]
    if folder := _nvshmem(bundle):
        targets.append(LIBRARIES[2].removeprefix("lib")[:-3])
    build = WORK / "native"
    options = {
        "CMAKE_BUILD_TYPE": "Release",
        "CROSSPOOL_CUDA": "ON",
        "CROSSPOOL_CUDA_ARCHITECTURES": bundle.architecture,
        "CROSSPOOL_BUILD_BENCHMARKS": "ON",
        "CROSSPOOL_NVSHMEM": str(folder or ""),
        "CMAKE_BUILD_RPATH": "$ORIGIN/../../../python/crosspool/kernels",
        "CMAKE_BUILD_RPATH_USE_ORIGIN": "ON",
    }
    words = [f"-D{name}={value}" for name, value in options.items()]
    run(["cmake", "-S", str(ROOT / "sgl-kernel-ext"), "-B", str(build), *words])
    cores = str(len(os.sched_getaffinity(0)))
    run(["cmake", "--build", str(build), "--parallel", cores, "--target", *targets])
    run(["cmake", "--install", str(build), "--prefix", str(bundle.source / "python")])
    bundle.program.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(build / "cuda" / PROGRAM, bundle.program)


def copy_libraries(bundle: Bundle, folder: Path) -> None:
    """Takes libraries that are built already; what is not in the folder is left out."""
    if not (folder / LIBRARIES[0]).is_file():
        raise BundleError(f"{folder} has no {LIBRARIES[0]}")
    for name, target in (
        *((library, bundle.libraries / library) for library in LIBRARIES),
        (PROGRAM, bundle.program),
    ):
        if (folder / name).is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(folder / name, target)
        else:
            bundle.left_out[name] = f"it is not in {folder}"


def _nvshmem(bundle: Bundle) -> Path | None:
    """Folder of NVSHMEM's headers and libraries; None, with the reason told, if it cannot be
    had."""
    site = WORK / f"nvshmem-{NVSHMEM}"
    folder = site / "nvidia" / "nvshmem"
    if not (folder / "include" / "nvshmem.h").is_file():
        try:
            pip(_install_into(site), [f"nvidia-nvshmem-cu13=={NVSHMEM}"], bundle.python)
        except BundleError as error:
            bundle.left_out[LIBRARIES[2]] = str(error)
            return None
    return folder


def newest_glibc(folder: Path) -> str:
    """The glibc that the libraries and programs of a folder need."""
    need("objdump", "it reads which glibc the libraries need: install binutils")
    newest: tuple[int, ...] = (0,)
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.read_bytes()[:4] == b"\x7fELF":
            symbols = run(["objdump", "-T", str(path)])
            found = re.findall(r"\(GLIBC_([\d.]+)\)", symbols)
            versions = [tuple(map(int, version.split("."))) for version in found]
            newest = max(newest, *versions) if versions else newest
    return ".".join(map(str, newest))


def need(program: str, why: str) -> None:
    if shutil.which(program) is None:
        raise BundleError(f"{program} is not on PATH: {why}")


def run(command: Sequence[str]) -> str:
    """Returns what a program printed. Raises BundleError with its last lines if it fails."""
    try:
        done = subprocess.run(
            command, check=False, cwd=ROOT, capture_output=True, text=True, timeout=_PATIENCE_S
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BundleError(f"{command[0]}: {error}") from None
    if done.returncode != 0:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()[-8:]
        raise BundleError(f"{Path(command[0]).name} failed:\n" + "\n".join(said))
    return done.stdout


def _install_into(site: Path) -> list[str]:
    return ["install", "--no-compile", "--upgrade", "--target", str(site)]


def _pinned(requirement: str) -> str:
    """The requirement at the version that is installed here, with which the tests ran."""
    try:
        return f"{normalised(requirement)}=={importlib.metadata.version(normalised(requirement))}"
    except importlib.metadata.PackageNotFoundError:
        return requirement
