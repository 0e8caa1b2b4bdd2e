"""The kernels that the GPU report launches, compiled for the GPU of the bundle."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import gpu_bundle_parts as parts
from gpu_bundle_parts import Bundle, BundleError
from gpu_bundle_run import KERNELS

if TYPE_CHECKING:
    from crosspool.kernels.triton_cache.host_modules import Python
    from crosspool.kernels.triton_cache.launches import Launch

    from benchmark.gpu_report.platform import Scale


def compiled_kernels(
    bundle: Bundle, interpreter: str | None, models: Sequence[str] | None, triton: Path | None
) -> None:
    """Compiles kernels and packs them, as ``crosspool compile`` does.

    ``interpreter``: the Python of the bundle, whose headers Triton's launchers need; ``models``:
    only those of these models; ``triton``: the wheel of Triton for that Python, or where it is
    installed."""
    if importlib.util.find_spec("triton") is None:
        raise BundleError(
            "Triton is not installed, which compiles the kernels: make dev fetches it"
        )
    sys.path.insert(0, str(parts.ROOT))
    from crosspool.config.errors import ConfigError
    from crosspool.kernels.triton_cache.archive import pack
    from crosspool.kernels.triton_cache.kernel_cache import CompileError
    from crosspool.kernels.triton_cache.toolchain import Toolchain
    from crosspool.ranks.gpu.compile import compile_ahead

    from benchmark.gpu_report.platform import Scale

    scale = Scale()
    known = {*scale.models, scale.shape}
    if unknown := set(models or ()) - known:
        raise BundleError(
            f"--models: the report has no {', '.join(sorted(unknown))}, it has "
            f"{', '.join(sorted(known))}"
        )
    tag = "cp" + bundle.python.replace(".", "")
    try:
        toolchain = Toolchain.own()
        if toolchain.python != tag:
            toolchain = Toolchain.of(triton or _triton_wheel(bundle.python))
        python = _python(bundle, interpreter, tag)
        launches = report_launches(scale, int(bundle.architecture), models or sorted(known))
        folder = parts.WORK / f"kernels-{toolchain.version}-{tag}"
        made = compile_ahead(launches, folder, toolchain=toolchain, python=python)
        pack(folder, made.entries, made.identity, bundle.folder / KERNELS)
    except (ConfigError, CompileError) as error:
        raise BundleError(str(error)) from None
    bundle.triton = toolchain.version
    print(f"{made.compiled} compiled, {made.found} found;", end=" ")


def _python(bundle: Bundle, interpreter: str | None, tag: str) -> Python | None:
    """The Python of the bundle; None, with the reason told, where it is not here."""
    from crosspool.config.errors import ConfigError
    from crosspool.kernels.triton_cache.host_modules import Python

    own = f"{sys.version_info.major}.{sys.version_info.minor}" == bundle.python
    try:
        python = Python.of(interpreter or (sys.executable if own else f"python{bundle.python}"))
        python.check_headers()
    except ConfigError as error:
        if interpreter is not None:
            raise
        bundle.left_out["Triton's launchers"] = (
            f"{error}; name it by --interpreter. Without, they are compiled there at the first "
            "launch, which needs gcc and Python.h"
        )
        return None
    if python.tag != tag:
        raise BundleError(f"--interpreter: that is {python.tag}, and the bundle is for {tag}")
    return python


def _triton_wheel(python: str) -> Path:
    """The wheel of Triton for another Python, fetched once."""
    folder = parts.WORK / "triton"
    version, tag = importlib.metadata.version("triton"), "cp" + python.replace(".", "")
    pattern = f"triton-{version}-{tag}-*.whl"
    if not any(folder.glob(pattern)):
        parts.pip(["download", "--dest", str(folder)], [f"triton=={version}"], python)
    return next(folder.glob(pattern))


def report_launches(
    scale: Scale, capability: int, models: Sequence[str]
) -> dict[str, list[Launch]]:
    """What the checks of the report launch, by model."""
    from benchmark.gpu_report import launches

    return launches.report_launches(scale, capability, models)
