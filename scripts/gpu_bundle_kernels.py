"""The kernels that the GPU report launches, compiled for the GPU of the bundle."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import gpu_bundle_parts as parts
from gpu_bundle_parts import Bundle, BundleError
from gpu_bundle_run import KERNELS

if TYPE_CHECKING:
    from crosspool.kernels.triton_cache.host_modules import Python
    from crosspool.kernels.triton_cache.launches import Launch
    from crosspool.models.spec import ModelSpec
    from crosspool.ranks.gpu.model import GPUModel
    from crosspool.ranks.gpu.stages import HasStages

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
    """What the checks of the report launch on a GPU of ``capability`` (90: sm_90), by model."""
    from crosspool.kernels.triton_cache.launches import recording

    launches = {}
    for name in models:
        with recording(capability) as recorded:
            found = _bundled(scale, name) if name in scale.models else _of_times(scale)
            for stages in found:
                for call in stages.calls.values():
                    call()
        launches[name] = recorded
    return launches


def _bundled(scale: Scale, name: str) -> Iterator[HasStages]:
    """Stages of a bundled model: with all buckets, with each alone, and with those that exchange
    rows with another device."""
    from crosspool.kernels.cuda_loop import LinkMemory
    from crosspool.models.registry import read_model
    from crosspool.ranks.gpu.compile import NOWHERE
    from crosspool.ranks.gpu.lanes import make_serving, make_stages
    from crosspool.ranks.gpu.links import Crossing, ServedCounts

    from benchmark.gpu_report.bundled import DEMO, PAGES

    spec = read_model(DEMO / name, dtype="float32")
    model = _hollow(dataclasses.replace(spec, ffn=spec.ffn[: scale.layers]), PAGES)
    for buckets in (scale.buckets, *([bucket] for bucket in scale.buckets)):
        yield from make_stages([model], buckets, 1, buckets[-1], NOWHERE)[1].values()
    links, last = [LinkMemory()], scale.buckets[-1]
    crossing = Crossing(links=(0,), own=None)
    _, stages = make_stages(
        [model], scale.buckets, 1, last, NOWHERE, links=[links], crossings=[crossing]
    )
    yield from stages.values()
    assert model.ffn is not None
    counts = ServedCounts(1, NOWHERE)
    _, served = make_serving(
        [model.spec], {0: model.ffn}, scale.buckets, links, NOWHERE, counts=counts, first_lane=1
    )
    yield from served.values()


def _of_times(scale: Scale) -> Iterator[HasStages]:
    """Stages of the model whose times are taken, at each size of a batch."""
    from crosspool.ranks.gpu.compile import NOWHERE
    from crosspool.ranks.gpu.lanes import make_stages

    from benchmark.gpu import pages_of, spec_of

    pages = pages_of(scale.batches, scale.context, scale.tokens)
    model = _hollow(spec_of(scale.shape), pages)
    for batch in scale.batches:
        yield from make_stages([model], [batch], 1, batch, NOWHERE)[1].values()


def _hollow(spec: ModelSpec, pages: int) -> GPUModel:
    """A model on a device that has no memory."""
    import torch
    from crosspool.ranks.gpu.compile import NOWHERE
    from crosspool.ranks.gpu.model import GPUModel
    from crosspool.ranks.gpu.weights import GPUFFN, GPUAttention
    from crosspool.ranks.weights import TORCH_DTYPES
    from crosspool.weightpool.placement import FFNShard

    from benchmark.gpu import PAGE_SIZE

    positions = min(spec.context, pages * PAGE_SIZE)
    kv = torch.empty(
        (pages, spec.layers, PAGE_SIZE, spec.kv_width),
        dtype=TORCH_DTYPES[spec.dtype],
        device=NOWHERE,
    )
    shard = FFNShard(rank=0, ranks=1, parallel="tp")
    return GPUModel(
        spec,
        GPUAttention(spec, None, NOWHERE, positions, lambda _: None),
        GPUFFN(spec, None, shard, NOWHERE, lambda _: None),
        kv,
    )
