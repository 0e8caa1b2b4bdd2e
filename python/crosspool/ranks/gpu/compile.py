"""Compiles ahead every kernel that the devices of a deployment launch: the stages of their models
are called over tensors without memory, while launches are recorded."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from crosspool.kernels.cuda_loop import LinkMemory
from crosspool.kernels.triton_cache.host_modules import Python, host_modules
from crosspool.kernels.triton_cache.kernel_cache import KernelCache, Task, worker_count
from crosspool.kernels.triton_cache.launches import Launch, recording
from crosspool.kernels.triton_cache.manifest import CacheEntry, Identity
from crosspool.kernels.triton_cache.toolchain import Toolchain
from crosspool.kvpool.layout import KVLayout
from crosspool.models.gpu_features import check_features
from crosspool.observability.progress import loading
from crosspool.ranks.gpu.host_side import HostSide
from crosspool.ranks.gpu.lanes import make_serving, make_stages, model_stages
from crosspool.ranks.gpu.links import ServedCounts, crossing_of, remote_ffn_ranks
from crosspool.ranks.gpu.model import GPUModel
from crosspool.ranks.gpu.shares import check_share
from crosspool.ranks.gpu.stages import HasStages, buckets_up_to
from crosspool.ranks.gpu.weights import GPUFFN, GPUAttention
from crosspool.ranks.weights import TORCH_DTYPES, held_models

if TYPE_CHECKING:
    from crosspool.config.deployment import Deployment
    from crosspool.config.device import Device
    from crosspool.models.spec import ModelSpec
    from crosspool.ranks.weights import HeldModel
    from crosspool.weightpool.placement import Placement

log = logging.getLogger(__name__)

NOWHERE = torch.device("meta")
"""Tensors there have no memory, but addresses as far as kernels are specialised by them."""


@dataclass
class CompilationTasks:
    """What must be compiled, by its entry in Triton's cache."""

    tasks: dict[str, Task] = field(default_factory=dict)
    models: dict[str, list[str]] = field(default_factory=dict)
    """Models for which each entry is."""

    def add(self, task: Task, model: str) -> None:
        name = task.entry
        self.tasks.setdefault(name, task)
        models = self.models.setdefault(name, [])
        if model not in models:
            models.append(model)


@dataclass(frozen=True)
class Compiled:
    """What a call of :func:`compile_ahead` came to."""

    compiled: int
    """Kernels, and host modules that launch them."""
    found: int
    """Those that were in the cache."""
    wrong: list[str]
    """What was wrong with the cache; it is mended."""
    entries: dict[str, CacheEntry]
    """All of them, by the names of their folders in the cache."""
    identity: Identity


def default_folder(toolchain: Toolchain) -> Path:
    """Folder of compiled kernels: the user's TRITON_CACHE_DIR, or one of our own for each
    Triton."""
    if named := os.environ.get("TRITON_CACHE_DIR"):
        return Path(named)
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "crosspool" / "triton" / f"{toolchain.version}-{toolchain.python}"


def compile_ahead(
    launches: dict[str, list[Launch]],
    folder: Path,
    *,
    toolchain: Toolchain,
    python: Python | None,
    workers: int | None = None,
) -> Compiled:
    """Compiles into ``folder`` what is not there yet, with a progress bar.

    ``launches``: by model; ``python``: the Python that launches them, for which host modules are
    compiled, too; None leaves those out.

    Raises CompileError that names the kernels that do not compile, ConfigError for a folder that
    cannot be used."""
    wanted = CompilationTasks()
    with toolchain.used():
        for model, of_model in launches.items():
            for launch in of_model:
                wanted.add(launch, model)
            for module in host_modules(of_model, python) if python is not None else ():
                wanted.add(module, model)
    cache = KernelCache(folder, toolchain)
    with cache.opened() as wrong:
        for problem in wrong:
            log.warning("compiled kernels in %s: %s; compiling them again", folder, problem)
        missing = cache.missing(wanted.tasks)
        if missing:
            count = workers or worker_count()
            what = f"compilation by {min(count, len(missing))} processes"
            with loading("Triton", what, len(missing), unit="kernels") as loaded:

                def on_done(name: str) -> None:
                    loaded.say(wanted.models[name][0])
                    loaded.progress(1)

                cache.fill(missing, wanted.models, count, on_done)
    entries = {name: cache.manifest.entries[name] for name in wanted.tasks}
    found = len(entries) - len(missing)
    return Compiled(len(missing), found, wrong, entries, cache.identity)


def compile_deployment(
    deployment: Deployment, specs: Mapping[int, ModelSpec], placement: Placement, capability: int
) -> Compiled:
    """Compiles every kernel of a deployment that is not in the folder of compiled kernels yet, and
    makes Triton look there. All device processes of a host may call it at once: the first one
    compiles, and the others wait for it and find the kernels.

    Raises as :func:`compile_ahead` and :func:`deployment_launches` do."""
    toolchain = Toolchain.own()
    folder = default_folder(toolchain)
    os.environ["TRITON_CACHE_DIR"] = str(folder)
    launches = deployment_launches(deployment, specs, placement, capability)
    return compile_ahead(launches, folder, toolchain=toolchain, python=Python.of())


def deployment_launches(
    deployment: Deployment, specs: Mapping[int, ModelSpec], placement: Placement, capability: int
) -> dict[str, list[Launch]]:
    """Returns what the devices of a deployment launch on GPUs of ``capability`` (90: sm_90), by
    model.

    Raises ConfigError for a model, or a share of one, that a GPU does not drive."""
    launches: dict[str, list[Launch]] = {}
    for device in deployment.devices:
        for held in held_models(deployment, device, specs, placement):
            with recording(capability) as recorded:
                for stages in _stages(deployment, device, specs, held):
                    for call in stages.calls.values():
                        call()
            launches.setdefault(deployment.models[held.index].name, []).extend(recorded)
    return launches


def _stages(
    deployment: Deployment, device: Device, specs: Mapping[int, ModelSpec], held: HeldModel
) -> Iterator[HasStages]:
    """The stages of a model on a device, as :mod:`crosspool.ranks.gpu.join` makes them, without
    memory."""
    spec, buckets = held.spec, buckets_up_to(deployment.max_step_tokens)
    crossing, ffn = crossing_of(deployment, device, held.index), None
    check_features(deployment.models[held.index], spec)
    model_stages(spec, crossing)
    if held.ffn is not None:
        check_share(deployment.models[held.index], spec, held.ffn)
        ffn = GPUFFN(spec, None, held.ffn, NOWHERE, lambda _: None)
    if held.attention:
        pages = _pages(deployment, spec)
        shape = (pages, spec.layers, deployment.page_size, spec.kv_width)
        kv = torch.empty(shape, dtype=TORCH_DTYPES[spec.dtype], device=NOWHERE)
        positions = min(spec.context, pages * deployment.page_size)
        attention = GPUAttention(spec, None, NOWHERE, positions, lambda _: None)
        _, stages = make_stages(
            [GPUModel(spec, attention, ffn, kv)],
            buckets,
            1,
            deployment.max_running_requests,
            NOWHERE,
            links=[[LinkMemory() for _ in remote_ffn_ranks(deployment, device)]],
            crossings=[crossing],
        )
        yield from stages.values()
    if ffn is not None and any(peer != device for peer in deployment.kv_pool_devices):
        counts = ServedCounts(1, HostSide(NOWHERE))
        _, served = make_serving(
            list(specs.values()),
            {held.index: ffn},
            buckets,
            [LinkMemory()],
            NOWHERE,
            counts=counts,
            first_lane=0,
        )
        yield from served.values()


def _pages(deployment: Deployment, spec: ModelSpec) -> int:
    """Pages of a model's KV cache; where the pool's size is open, those of its longest sequence."""
    layout = KVLayout(spec, deployment.page_size, deployment.chunk_bytes)
    if not deployment.kv_pool_bytes:
        return layout.pages_for(spec.context)
    share = deployment.kv_pool_bytes // len(deployment.kv_pool_devices)
    return layout.pages_in(share // deployment.chunk_bytes)


@contextlib.contextmanager
def telling_of_compilation() -> Iterator[list[str]]:
    """Logs every kernel that this process compiles itself, although they were compiled ahead; the
    list fills with their names."""
    from triton import knobs

    names: list[str] = []

    def listen(*, src: object, cache_hit: bool, **_: object) -> None:
        if not cache_hit:
            names.append(str(getattr(src, "name", src)))

    before = knobs.compilation.listener
    knobs.compilation.listener = listen
    try:
        yield names
    finally:
        knobs.compilation.listener = before
        if names:
            log.warning(
                "%d kernels were not among those compiled ahead, and were compiled one after "
                "another: %s",
                len(names),
                ", ".join(sorted(set(names))),
            )
