"""What ``pip install`` is asked for can be installed together with the SGLang that is named."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
NODEPS = ROOT / "requirements" / "frontend-nodeps.txt"
PYTHON = {"python_version": "3.12", "sys_platform": "linux", "platform_machine": "x86_64"}


def ours() -> Iterator[tuple[str, Requirement]]:
    """Every requirement, and where it stands."""
    for line in PROJECT["dependencies"]:
        yield "dependencies", Requirement(line)
    for extra, lines in EXTRAS.items():
        for line in lines:
            yield f"the extra {extra}", Requirement(line)
    for line in NODEPS.read_text().splitlines():
        if line and not line.startswith("#"):
            yield NODEPS.name, Requirement(line)


def sglangs() -> list[Requirement]:
    """What SGLang requires on a GPU machine, without extras."""
    found = map(Requirement, metadata.requires("sglang") or [])
    return [r for r in found if r.marker is None or r.marker.evaluate({**PYTHON, "extra": ""})]


def cuda_versions(requirement: Requirement) -> set[str]:
    """CUDA versions that a requirement is for: ``nvidia-nvshmem-cu12``, ``flashinfer[cu13]``."""
    names = [requirement.name, *requirement.extras]
    return {found[1] for name in names if (found := re.search(r"(?:^|-)cu(\d\d)$", name))}


def pins(specifiers: SpecifierSet) -> list[str]:
    return [one.version for one in specifiers if one.operator == "=="]


def test_the_sglang_that_is_installed_is_the_one_that_is_named() -> None:
    named = {str(r.specifier) for _, r in ours() if r.name == "sglang"}
    assert named == {f"=={metadata.version('sglang')}"}


def test_every_extra_is_for_the_cuda_version_of_sglang() -> None:
    wanted = set().union(*map(cuda_versions, sglangs()))
    assert wanted == {"13"}
    for where, requirement in ours():
        assert cuda_versions(requirement) <= wanted, (
            f"{where}: {requirement}, but SGLang requires CUDA {', '.join(wanted)}"
        )


def test_no_pin_contradicts_one_of_sglang() -> None:
    theirs: dict[str, SpecifierSet] = {}
    for requirement in sglangs():
        name = canonicalize_name(requirement.name)
        theirs[name] = theirs.get(name, SpecifierSet()) & requirement.specifier
    compared = 0
    for where, requirement in ours():
        other = theirs.get(canonicalize_name(requirement.name))
        if other is None:
            continue
        compared += 1
        both = requirement.specifier & other
        for version in pins(both):
            assert both.contains(version, prereleases=True), (
                f"{where}: {requirement}, but SGLang requires {requirement.name}{other}"
            )
    assert compared > 20


def test_the_extra_for_gpus_brings_what_the_gpu_path_imports() -> None:
    """Triton, NVSHMEM and the driver's library come with PyTorch for CUDA, which SGLang pins."""
    names = {canonicalize_name(Requirement(line).name) for line in EXTRAS["cuda"]}
    assert names == {"sglang", "cuda-bindings"}
    assert {"torch", "cuda-python"} <= {canonicalize_name(r.name) for r in sglangs()}
