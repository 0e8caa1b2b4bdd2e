"""Packs what the GPU report needs on a machine that reaches no package index into one file:
CrossPool's sources, its libraries for the GPU, the packages that such a machine lacks, and compiled
kernels. There, ``./run`` in the unpacked folder starts the report.

    make gpu-bundle [BUNDLE_PYTHON=3.12] [ARGS="--out DIR ..."]
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import importlib.metadata
import json
import shutil
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import gpu_bundle_parts as parts
from gpu_bundle_kernels import compiled_kernels
from gpu_bundle_parts import ROOT, Bundle, BundleError, run
from gpu_bundle_run import KERNELS, MANIFEST

LIMIT_MIB = 60.0
"""Largest file that may be carried to such a machine."""
_HERE = Path(__file__).resolve().parent


def main(words: Sequence[str] | None = None) -> int:
    given = _parser().parse_args(words)
    began = time.monotonic()
    try:
        parts.WORK.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=parts.WORK) as scratch:
            version = importlib.metadata.version("crosspool")
            bundle = Bundle(
                Path(scratch) / f"crosspool-gpu-bundle-{version}",
                python=given.python,
                architecture=given.architecture,
            )
            fill(bundle, given)
            archive = given.out / f"{bundle.folder.name}.tar.gz"
            sizes = pack(bundle.folder, archive)
            _tell(bundle, archive, sizes)
            check_size(archive, bundle.folder, given.limit)
    except BundleError as error:
        print(f"gpu-bundle: {error}", file=sys.stderr)
        return 2
    print(f"{archive} is ready after {time.monotonic() - began:.0f} s: README.md in it says how")
    return 0


def fill(bundle: Bundle, given: argparse.Namespace) -> None:
    """Makes the bundle's folder, one part after the other."""
    if given.libraries is not None:
        libraries = lambda: parts.copy_libraries(bundle, given.libraries)  # noqa: E731
    else:
        libraries = lambda: parts.build_libraries(bundle)  # noqa: E731
    steps: dict[str, Callable[[], None]] = {
        "sources": lambda: parts.sources(bundle),
        "libraries": libraries,
        "packages": lambda: parts.packages(bundle, given.wheels),
        "kernels": lambda: compiled_kernels(bundle, given.interpreter, given.models, given.triton),
        "manifest": lambda: write_manifest(bundle),
    }
    for name, step in steps.items():
        began = time.monotonic()
        print(f"==> {name} ...", end=" ", flush=True)
        step()
        print(f"{time.monotonic() - began:.0f} s", flush=True)


def write_manifest(bundle: Bundle) -> None:
    """Adds what starts the bundle, and the list of its files with what they are for."""
    start = bundle.folder / "run"
    shutil.copy(_HERE / "gpu_bundle_run.py", start)
    start.chmod(0o755)
    shutil.copy(_HERE / "gpu_bundle_readme.md", bundle.folder / "README.md")
    commit = run(["git", "rev-parse", "--short", "HEAD"]).strip()
    if run(["git", "status", "--porcelain", "--untracked-files=no"]).strip():
        commit += " with changes"
    has_nvshmem = (bundle.libraries / parts.LIBRARIES[2]).is_file()
    manifest = {
        "version": importlib.metadata.version("crosspool"),
        "commit": commit,
        "python": bundle.python,
        "architecture": bundle.architecture,
        "glibc": parts.newest_glibc(bundle.folder),
        "triton": bundle.triton,
        "nvshmem": parts.NVSHMEM if has_nvshmem else None,
        "packages": bundle.packages,
        "left_out": bundle.left_out,
        "files": {
            str(path.relative_to(bundle.folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in files(bundle.folder)
        },
    }
    (bundle.folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def pack(folder: Path, archive: Path) -> dict[str, tuple[int, int, int]]:
    """Writes the archive. Returns files, bytes and compressed bytes by part."""
    grouped: dict[str, list[Path]] = {}
    for path in files(folder):
        grouped.setdefault(part_of(path.relative_to(folder)), []).append(path)
    archive.parent.mkdir(parents=True, exist_ok=True)
    sizes = {}
    with (
        archive.open("wb") as raw,
        gzip.GzipFile("", "wb", 9, raw) as zipped,
        tarfile.open(fileobj=zipped, mode="w", format=tarfile.PAX_FORMAT) as tar,
    ):
        before = 0
        for part, paths in grouped.items():
            for path in paths:
                about = tar.gettarinfo(path, str(path.relative_to(folder.parent)))
                about.uid, about.gid, about.uname, about.gname = 0, 0, "", ""
                with path.open("rb") as file:
                    tar.addfile(about, file)
            zipped.flush()
            bytes_ = sum(path.stat().st_size for path in paths)
            sizes[part] = (len(paths), bytes_, raw.tell() - before)
            before = raw.tell()
    return sizes


def part_of(name: Path) -> str:
    """The part of the bundle to which a file belongs."""
    if name.parts[0] == "site":
        return "packages"
    if name.suffix == ".so" or name.name == parts.PROGRAM:
        return "libraries"
    if name.name == KERNELS:
        return "kernels"
    if "demo" in name.parts and name.suffix == ".safetensors":
        return "weights of the bundled models"
    return "sources" if name.parts[0] == "source" else "start and manifest"


def check_size(archive: Path, folder: Path, limit_mib: float) -> None:
    """Raises BundleError that names what is large, and removes the archive, if it is over the
    limit."""
    size = archive.stat().st_size
    if size <= limit_mib * 2**20:
        return
    archive.unlink()
    largest = sorted(files(folder), key=lambda path: -path.stat().st_size)[:5]
    named = ", ".join(
        f"{path.relative_to(folder)} ({_mib(path.stat().st_size)})" for path in largest
    )
    raise BundleError(
        f"{archive.name} has {_mib(size)}, more than {limit_mib:g} MiB, and was removed; "
        f"the largest files are {named}"
    )


def _tell(bundle: Bundle, archive: Path, sizes: dict[str, tuple[int, int, int]]) -> None:
    print(f"{'part':32}{'files':>6}{'unpacked':>12}{'packed':>12}")
    rows = [(part, *row) for part, row in sizes.items()]
    total = [sum(column) for column in zip(*sizes.values(), strict=True)]
    for part, count, unpacked, packed in (*rows, ("all", *total)):
        print(f"{part:32}{count:6}{_mib(unpacked):>12}{_mib(packed):>12}")
    for what, why in bundle.left_out.items():
        print(f"left out: {what}: {why}", file=sys.stderr)


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gpu-bundle",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--python", default="3.12", help="version of Python there (%(default)s)")
    parser.add_argument(
        "--interpreter",
        metavar="PROGRAM",
        help="that Python here, whose headers compile Triton's launchers (python and the version, "
        "on PATH, unless given)",
    )
    parser.add_argument(
        "--architecture", default="90", help="compute capability of the GPU (%(default)s)"
    )
    parser.add_argument(
        "--models",
        nargs="+",
        metavar="NAME",
        help="compile only kernels of these of the report's models",
    )
    parser.add_argument(
        "--triton",
        type=Path,
        metavar="PLACE",
        help="wheel of Triton for that Python, or the folder where it is installed (fetched unless "
        "given)",
    )
    parser.add_argument(
        "--libraries", type=Path, metavar="DIR", help="take built libraries, and build none"
    )
    parser.add_argument(
        "--wheels", type=Path, metavar="DIR", help="take wheels from here, and ask no package index"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="(%(default)s)")
    parser.add_argument(
        "--limit", type=float, default=LIMIT_MIB, metavar="MIB", help="largest size (%(default)s)"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
