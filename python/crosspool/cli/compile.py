"""``crosspool compile``: compiles the kernels of a deployment ahead, and packs, checks and unpacks
them."""

from __future__ import annotations

import argparse
import collections
import importlib.util
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec.structs import asdict, replace

from crosspool.cli.prepare import model_configs
from crosspool.cli.serve import read_options
from crosspool.config.deployment import ConfigError, Deployment
from crosspool.config.device import Device
from crosspool.config.flags import Parser
from crosspool.config.gpu import check_kv_cache_dtype
from crosspool.config.options import Options
from crosspool.config.sizes import format_size
from crosspool.models.registry import specs_of
from crosspool.weightpool.placement import place

if TYPE_CHECKING:
    from crosspool.kernels.triton_cache.launches import Launch
    from crosspool.kernels.triton_cache.manifest import Manifest
    from crosspool.kernels.triton_cache.toolchain import Toolchain

_USAGE = """\
%(prog)s --model-path DIR [--model-path DIR ...] [flags] [flags of crosspool serve]
       %(prog)s --config FILE [flags]
       %(prog)s --check FILE_OR_FOLDER
       %(prog)s --unpack FILE [--into FOLDER]"""
_DESCRIPTION = """\
Compiles every kernel that a server with the same models and flags launches on a GPU, so that its
start compiles none. No GPU is needed, but Triton is. Servers look for compiled kernels in the
folder that TRITON_CACHE_DIR names, or else in a folder of their own below
~/.cache/crosspool/triton."""
_EPILOG = """\
examples:
  # what `crosspool serve` with these flags will launch, on an H200, into the server's own folder
  crosspool compile --capability 90 --model-path models/Qwen3-30B-A3B --lanes 4

  # for a machine with another GPU and another Python, in one file; the folder of a model needs no
  # more than its config.json
  pip download --no-deps --python-version 3.12 --only-binary :all: triton==3.6.0
  crosspool compile --config deployment.yaml --capability 80 --capability 90 \\
      --triton triton-3.6.0-cp312-*.whl --python python3.12 --pack kernels.tar.gz

  # there
  crosspool compile --check kernels.tar.gz
  crosspool compile --unpack kernels.tar.gz
"""


def run(words: Sequence[str], prog: str) -> int:
    parser = _parser(prog)
    given, rest = parser.parse_known_args(words)
    if importlib.util.find_spec("triton") is None:
        raise ConfigError("Triton is not installed, which compiles the kernels: pip install triton")
    logging.basicConfig(level=logging.INFO, format=f"{prog}: %(message)s", stream=sys.stderr)
    from crosspool.kernels.triton_cache.toolchain import Toolchain

    toolchain = Toolchain.own() if given.triton is None else Toolchain.of(given.triton)
    if given.check is not None or given.unpack is not None:
        if rest:
            raise ConfigError(f"{rest[0]} does not go with --check or --unpack")
        if given.check is not None:
            return _check(given.check, toolchain)
        return _unpack(given.unpack, given.into, toolchain)
    return _compile(given, read_options(rest, prog), toolchain)


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = Parser(
        prog=prog,
        usage=_USAGE,
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--capability",
        type=int,
        action="append",
        metavar="NUMBER",
        help="Compute capability of the GPUs: 80 for an A100, 90 for an H100 or H200. It may be "
        "given several times.",
    )
    parser.add_argument(
        "--into",
        type=Path,
        metavar="FOLDER",
        help="Folder for compiled kernels (default: where servers look for them).",
    )
    parser.add_argument(
        "--pack",
        type=Path,
        metavar="FILE",
        help="Also write the kernels to a file, FILE.tar.gz.",
    )
    parser.add_argument(
        "--triton",
        type=Path,
        metavar="PLACE",
        help="Triton that will launch the kernels, where that machine has another Python: its "
        "wheel, or a folder that holds it. It must be of the version that is installed here.",
    )
    parser.add_argument(
        "--python",
        metavar="PROGRAM",
        help="That Python, for which Triton's launchers are compiled with its headers; without it "
        "they are compiled at the start there, which needs a C compiler (default: this Python, "
        "unless --triton is given).",
    )
    parser.add_argument(
        "--workers",
        type=int,
        metavar="NUMBER",
        help="Processes that compile (default: one for each core, if there is memory for them).",
    )
    parser.add_argument(
        "--check",
        type=Path,
        metavar="FILE_OR_FOLDER",
        help="Say what is in a packed file or a folder, and name what is damaged or made for "
        "another Triton.",
    )
    parser.add_argument(
        "--unpack", type=Path, metavar="FILE", help="Add a packed file's kernels to the folder."
    )
    return parser


def _compile(given: argparse.Namespace, options: Options, toolchain: Toolchain) -> int:
    if not given.capability:
        raise ConfigError("--capability is missing: name the GPUs' compute capability, such as 90")
    if given.workers is not None and given.workers < 1:
        raise ConfigError("--workers must be at least 1")
    from crosspool.kernels.triton_cache.archive import pack
    from crosspool.kernels.triton_cache.host_modules import Python
    from crosspool.kernels.triton_cache.kernel_cache import CompileError
    from crosspool.ranks.gpu.compile import compile_ahead, default_folder, deployment_launches

    python = None
    if given.python is not None or given.triton is None:
        python = Python.of(given.python or sys.executable)
        if python.tag != toolchain.python:
            raise ConfigError(
                f"--python: that is {python.tag}, and the Triton is for {toolchain.python}: name "
                "the Python to which the Triton belongs"
            )
    deployment = _deployment(options)
    check_kv_cache_dtype(deployment)
    specs = specs_of(deployment.models)
    placement = place(deployment, specs)
    launches: dict[str, list[Launch]] = {}
    for capability in given.capability:
        found = deployment_launches(deployment, specs, placement, capability)
        for model, of_model in found.items():
            launches.setdefault(model, []).extend(of_model)
    folder = given.into or default_folder(toolchain)
    try:
        compiled = compile_ahead(
            launches, folder, toolchain=toolchain, python=python, workers=given.workers
        )
    except CompileError as error:
        print(f"crosspool compile: {error}", file=sys.stderr)
        return 1
    print(f"{compiled.compiled} compiled, {compiled.found} found in {folder}")
    if given.pack is not None:
        pack(folder, compiled.entries, compiled.identity, given.pack)
        size = format_size(given.pack.stat().st_size)
        print(f"{len(compiled.entries)} packed into {given.pack} ({size})")
    return 0


def _deployment(options: Options) -> Deployment:
    """What ``crosspool serve`` would make of the options, as far as kernels depend on it. Where the
    options name CPUs, as they do by default, it is one GPU."""
    devices = (*options.kv_pool_devices, *options.weight_pool_devices)
    if any(device.is_cpu for device in devices):
        one = (Device("cuda:0"),)
        options = replace(options, kv_pool_devices=one, weight_pool_devices=one)
    settled = {
        "models": model_configs(options),
        "next_model": len(options.models),
        "kv_pool_bytes": options.kv_pool_bytes or 0,
        "weight_pool_bytes": sys.maxsize,
        "expert_pool_bytes": 0,
    }
    return Deployment(**{**asdict(options), **settled})


def _check(place: Path, toolchain: Toolchain) -> int:
    from crosspool.kernels.triton_cache import archive
    from crosspool.kernels.triton_cache.manifest import Identity, Manifest

    found: Manifest | None
    if place.is_dir():
        try:
            found = Manifest.read(place)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        if found is None:
            raise ConfigError(f"{place} holds no compiled kernels")
        wrong = list(found.damaged(place).values())
    else:
        found, wrong = archive.check(place)
    _describe(found)
    foreign = Identity.of(toolchain).differences(found.identity)
    for problem in wrong:
        print(f"damaged: {problem}")
    if foreign:
        print(f"foreign: {', '.join(foreign)}")
    return 1 if wrong or foreign else 0


def _describe(manifest: Manifest) -> None:
    identity = manifest.identity
    print(
        f"CrossPool {identity.crosspool}, Triton {identity.triton} for {identity.python}: "
        f"{len(manifest.entries)} entries"
    )
    counts: collections.Counter[tuple[str, str]] = collections.Counter()
    for entry in manifest.entries.values():
        kind = "launchers" if entry.capability is None else f"kernels for sm_{entry.capability}"
        counts.update((model, kind) for model in entry.models)
    for (model, kind), count in sorted(counts.items()):
        print(f"  {model}: {count} {kind}")


def _unpack(file: Path, into: Path | None, toolchain: Toolchain) -> int:
    from crosspool.kernels.triton_cache.archive import unpack
    from crosspool.kernels.triton_cache.kernel_cache import KernelCache
    from crosspool.ranks.gpu.compile import default_folder

    folder = into or default_folder(toolchain)
    count = unpack(file, KernelCache(folder, toolchain))
    print(f"{count} unpacked into {folder}")
    return 0
