"""Installs the other engines, each into an environment of its own. Transformers and SGLang are in
this project's environment.

    python -m benchmark.peers.install [NAME ...] [--torch-index URL] [--force]

The environments are in ``peers/`` under CROSSPOOL_BENCH_DIR (``~/.cache/crosspool-bench``).
llama.cpp is compiled for this machine, which takes about ten minutes and a C++ compiler. PyTorch's
CPU wheels come from an index of their own: ``--torch-index https://download.pytorch.org/whl/cpu``.
An engine that cannot be installed is named at the end and does not keep the others from it.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmark.checkpoint import cache_dir
from benchmark.peers.protocol import Contestant

REQUIREMENTS = Path(__file__).with_name("requirements")


@dataclass(frozen=True)
class Peer:
    """An engine and how it is installed: from ``requirements/<name>.txt``, then from
    ``requirements/<name>-nodeps.txt`` without dependencies."""

    name: str
    module: str
    environment: dict[str, str] = field(default_factory=dict)
    """Environment variables for pip, which say how packages are compiled."""
    unwanted: tuple[str, ...] = ()
    """Dependencies that do not load here and are uninstalled."""
    ours: bool = False
    """Whether it is one of this project's dependencies and runs in the benchmark's environment."""

    @property
    def folder(self) -> Path:
        return cache_dir() / "peers" / self.name

    @property
    def python(self) -> Path:
        return Path(sys.executable) if self.ours else self.folder / "bin" / "python"

    @property
    def installed(self) -> bool:
        if self.ours:
            return importlib.util.find_spec(self.name) is not None
        mark = self.folder / ".installed"
        return mark.is_file() and mark.read_text() == self.requirements()

    def requirements(self) -> str:
        return "".join(path.read_text() for path in self.files())

    def files(self) -> list[Path]:
        names = (f"{self.name}.txt", f"{self.name}-nodeps.txt")
        return [REQUIREMENTS / name for name in names if (REQUIREMENTS / name).is_file()]

    def start(self, number: int = 0) -> Contestant:
        """Start a process of it, which is not loaded yet. ``number`` distinguishes processes of one
        engine."""
        log = cache_dir() / "logs" / f"{self.name}-{number}.log"
        return Contestant(self.python, self.module, log)


LLAMA_OPTIONS = (
    "-DGGML_NATIVE=ON -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_TOOLS=OFF"
    " -DLLAMA_BUILD_SERVER=OFF -DLLAVA_BUILD=OFF -DLLAMA_CURL=OFF"
)
UNWANTED = ("torchvision", "torchaudio", "torchcodec")
PEERS = {
    peer.name: peer
    for peer in (
        Peer("openvino", "benchmark.peers.openvino_peer", unwanted=("torchvision",)),
        Peer(
            "llama",
            "benchmark.peers.llama_peer",
            environment={"CMAKE_ARGS": LLAMA_OPTIONS, "CMAKE_BUILD_PARALLEL_LEVEL": "2"},
        ),
        Peer("vllm", "benchmark.peers.vllm_peer", unwanted=UNWANTED),
        Peer("transformers", "benchmark.peers.transformers_peer", ours=True),
        Peer("sglang", "benchmark.peers.sglang_peer", ours=True),
        Peer("kt", "benchmark.peers.kt_kernel"),
    )
}


def install(peer: Peer, torch_index: str | None = None) -> None:
    """Install an engine. Raises CalledProcessError where pip fails."""
    shutil.rmtree(peer.folder, ignore_errors=True)
    venv.create(peer.folder, with_pip=True)
    with_dependencies, *without = peer.files()
    torch = [
        line for line in with_dependencies.read_text().splitlines() if line.startswith("torch==")
    ]
    if torch:  # first, so that nothing else brings a build with CUDA libraries
        index = ["--index-url", torch_index] if torch_index else []
        _pip(peer, "install", *index, *torch)
    _pip(peer, "install", "-r", str(with_dependencies))
    for file in without:
        _pip(peer, "install", "--no-deps", "-r", str(file))
    if peer.unwanted:
        _pip(peer, "uninstall", "--yes", *peer.unwanted)
    (peer.folder / ".installed").write_text(peer.requirements())


def _pip(peer: Peer, *words: str) -> None:
    command = [str(peer.python), "-m", "pip", "--quiet", "--disable-pip-version-check", *words]
    subprocess.run(command, check=True, env={**os.environ, **peer.environment})


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmark.peers.install", description=__doc__)
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"engine: {', '.join(PEERS)}; all unless given"
    )
    parser.add_argument("--torch-index", help="package index of PyTorch's wheels for the CPU")
    parser.add_argument("--force", action="store_true", help="install again what is installed")
    given = parser.parse_args(words)
    unknown = set(given.names) - set(PEERS)
    if unknown:
        parser.error(f"no such engine: {', '.join(sorted(unknown))}; there are {', '.join(PEERS)}")
    failed = []
    for name in given.names or PEERS:
        peer = PEERS[name]
        if peer.ours:
            print(f"==> {name}: in this environment{'' if peer.installed else ', but missing'}")
            continue
        if peer.installed and not given.force:
            print(f"==> {name}: installed in {peer.folder}", flush=True)
            continue
        print(f"==> {name}: into {peer.folder}", flush=True)
        try:
            install(peer, given.torch_index)
        except subprocess.CalledProcessError as error:
            print(f"==> {name}: {error}", file=sys.stderr, flush=True)
            failed.append(name)
    if failed:
        print(f"not installed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
