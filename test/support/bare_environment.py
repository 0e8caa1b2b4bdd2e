"""An environment in which a bundle for GPU machines must work: the packages that such a machine
has, none of the others, and no package index."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import re
import shutil
import subprocess
import venv
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import Distribution
from pathlib import Path

from packaging.requirements import Requirement
from support.packages import installed

ON_A_GPU_MACHINE = (
    *("torch", "triton", "numpy", "transformers", "cuda-bindings", "pytest", "psutil", "tqdm"),
    *("rich", "pyyaml", "prometheus-client"),
)


def repacked(package: str, folder: Path) -> Path:
    """Packs an installed distribution as the wheel that it was installed from; returns it."""
    found = importlib.metadata.distribution(package)
    assert found.files is not None, package
    about = found.read_text("WHEEL")
    assert about is not None, package
    tags = re.findall(r"^Tag: (\S+)$", about, re.M)
    sets = (sorted({tag.split("-")[i] for tag in tags}) for i in range(3))
    name = re.sub(r"[-_.]+", "_", found.metadata["Name"])
    wheel = folder / f"{name}-{found.version}-{'-'.join('.'.join(words) for words in sets)}.whl"
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(wheel, "w") as archive:
        for file in found.files:
            if ".." not in file.parts and file.suffix != ".pyc" and file.name != "INSTALLER":
                archive.write(file.locate(), str(file))
    return wheel


class BareEnvironment:
    """A virtual environment without pip whose packages are links to those of this one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        venv.create(folder, with_pip=False, symlinks=True)
        self.site = next(folder.glob("lib/python*/site-packages"))
        for package in with_dependencies(name for name in ON_A_GPU_MACHINE if installed(name)):
            for top in _tops(package):
                link = self.site / top.name
                if not link.exists():
                    link.symlink_to(top)
        self.home = folder / "home"
        self.home.mkdir()

    @property
    def variables(self) -> Mapping[str, str]:
        return {
            "PATH": os.pathsep.join([str(self.folder / "bin"), "/usr/bin", "/bin"]),
            "HOME": str(self.home),
            "PIP_NO_INDEX": "1",
            "OMP_NUM_THREADS": "1",
            "LANG": "C.UTF-8",
        }

    def run(
        self, command: Sequence[str | Path], cwd: Path, timeout_s: float = 120.0
    ) -> subprocess.CompletedProcess[str]:
        """Runs a command that reaches no network, where the system permits that to be forbidden."""
        return subprocess.run(
            [*_without_network(), *map(str, command)],
            cwd=cwd,
            env=self.variables,
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )


def with_dependencies(packages: Iterable[str]) -> list[Distribution]:
    """Distributions with all that they need, as far as it is installed."""
    found: dict[str, Distribution] = {}
    left = list(packages)
    while left:
        name = re.sub(r"[-_.]+", "-", left.pop()).lower()
        if name in found or not installed(name):
            continue
        found[name] = importlib.metadata.distribution(name)
        needed = map(Requirement, found[name].requires or ())
        left += [
            need.name
            for need in needed
            if need.marker is None or need.marker.evaluate({"extra": ""})
        ]
    return list(found.values())


def _tops(package: Distribution) -> set[Path]:
    """What a distribution has directly in its site-packages."""
    assert package.files is not None, package.name
    names = {file.parts[0] for file in package.files} - {"..", "__pycache__"}
    return {Path(str(package.locate_file(name))) for name in names}


@functools.cache
def _without_network() -> tuple[str, ...]:
    command = ("unshare", "--map-root-user", "--net")
    permitted = (
        shutil.which(command[0]) is not None
        and subprocess.run([*command, "true"], capture_output=True).returncode == 0
    )
    return command if permitted else ()
