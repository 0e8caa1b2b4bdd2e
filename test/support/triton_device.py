"""The ranks of a GPU for tests: on it, or on CPU tensors, its stages called one by one and Triton's
kernels interpreted."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Mapping
from typing import cast

import torch
from crosspool.config.deployment import Deployment
from crosspool.config.device import Device
from crosspool.kernels.nvshmem import Nvshmem
from crosspool.kvpool.cuda_virtualizer import CudaVirtualizer
from crosspool.models.spec import ModelSpec
from crosspool.ranks.device import DeviceRanks
from crosspool.ranks.gpu.executor import GPUExecutor
from crosspool.ranks.gpu.host_side import HostSide
from crosspool.ranks.gpu.join import join_lanes
from crosspool.ranks.gpu.load import load_gpu_ranks, load_parts
from crosspool.ranks.kv_memory import kv_pool_by
from crosspool.transport.device_links import DeviceLinks, linked_ffn_ranks, links_bytes
from crosspool.transport.kept_descriptors import KeptDescriptors
from crosspool.transport.lane_layout import LINK_HEAD_BYTES, PAGE_BYTES, LinkLayout, round_up
from crosspool.transport.links import GPUPeers, max_row_bytes
from crosspool.transport.nvshmem import SymmetricLinks
from crosspool.transport.shared_memory import SharedMemoryTransport
from crosspool.weightpool.placement import Placement
from support.fake_cuda_memory import CPU, FakeCuda
from support.fake_nvshmem import FakePE
from torch import Tensor


class Interpreted:
    """The devices of one deployment in this process; their links lie in plain memory, which is
    there as long as this is."""

    def __init__(self) -> None:
        self._links: dict[int, Tensor] = {}
        """Memory of the links of each FFN rank."""
        self._laid_out: list[tuple[Tensor, LinkLayout]] = []

    def load(
        self,
        deployment: Deployment,
        device: Device,
        specs: Mapping[int, ModelSpec],
        placement: Placement,
        lanes_fd: int | None,
    ) -> DeviceRanks:
        """Takes the place of :func:`crosspool.ranks.gpu.load.load_gpu_ranks`."""
        peers = None
        if lanes_fd is not None:
            layout = LinkLayout(deployment.max_step_tokens, max_row_bytes(specs))
            links, host = self._reach(deployment, device, layout), None
            if deployment.loop == "host":
                host = SharedMemoryTransport(lanes_fd, deployment, device, on_gpu=links)
            os.close(lanes_fd)
            peers = GPUPeers(links, host)
        return load_on_cpu(deployment, device, specs, placement, peers)

    @property
    def outstanding(self) -> int:
        """Number of dispatches that have no reply, on all links."""
        found = 0
        for memory, layout in self._laid_out:
            first = round_up(memory.data_ptr(), PAGE_BYTES) - memory.data_ptr()
            for at in range(first, len(memory) - LINK_HEAD_BYTES, layout.link_bytes):
                dispatched, combined = (
                    int(memory[at + line : at + line + 8].view(torch.int64)) for line in (0, 128)
                )
                found += dispatched - combined
        return found

    def _reach(self, deployment: Deployment, device: Device, layout: LinkLayout) -> DeviceLinks:
        bases = {}
        for rank in linked_ffn_ranks(deployment, device):
            if rank not in self._links:
                size = links_bytes(deployment, layout, rank)
                self._links[rank] = torch.full((size + PAGE_BYTES,), 0xFF, dtype=torch.uint8)
                clear_heads(self._links[rank], layout)
                self._laid_out.append((self._links[rank], layout))
            bases[rank] = round_up(self._links[rank].data_ptr(), PAGE_BYTES)
        return DeviceLinks(deployment, device, layout, bases, CPU)


def clear_heads(memory: Tensor, layout: LinkLayout) -> None:
    """Signals and headers are zero at first; payloads stay as they are."""
    first = round_up(memory.data_ptr(), PAGE_BYTES) - memory.data_ptr()
    for at in range(first, len(memory) - LINK_HEAD_BYTES, layout.link_bytes):
        memory[at : at + LINK_HEAD_BYTES] = 0


class Symmetric(Interpreted):
    """Devices like those of :class:`Interpreted`, with a copy of every link at either end."""

    def __init__(self) -> None:
        super().__init__()
        self.heaps: dict[int, int] = {}
        self.pes: list[FakePE] = []

    def load(
        self,
        deployment: Deployment,
        device: Device,
        specs: Mapping[int, ModelSpec],
        placement: Placement,
        lanes_fd: int | None,
    ) -> DeviceRanks:
        assert lanes_fd is not None
        os.close(lanes_fd)
        layout = LinkLayout(deployment.max_step_tokens, max_row_bytes(specs))
        sizes = [links_bytes(deployment, layout, r) for r in range(len(placement.shards))]
        pe = deployment.devices.index(device)
        heap = torch.full((sum(sizes) + PAGE_BYTES,), 0xFF, dtype=torch.uint8)
        clear_heads(heap, layout)
        self._links[pe] = heap
        self.heaps[pe] = base = round_up(heap.data_ptr(), PAGE_BYTES)
        bases = {rank: base + sum(sizes[:rank]) for rank in linked_ffn_ranks(deployment, device)}
        self.pes.append(FakePE(pe, self.heaps))
        links = SymmetricLinks(deployment, device, layout, bases, CPU, cast(Nvshmem, self.pes[-1]))
        return load_on_cpu(deployment, device, specs, placement, GPUPeers(links, None))


def load_on_cpu(
    deployment: Deployment,
    device: Device,
    specs: Mapping[int, ModelSpec],
    placement: Placement,
    peers: GPUPeers | None,
) -> DeviceRanks:
    """A GPU's ranks on CPU tensors, the KV pool's memory from the fake driver."""
    cpu = torch.device("cpu")
    resources = contextlib.ExitStack()
    virtualizer: CudaVirtualizer | None = None
    kv: Mapping[int, Tensor] = {}
    if device in deployment.kv_pool_devices:
        make = functools.partial(CudaVirtualizer, FakeCuda(deployment.kv_pool_bytes))
        virtualizer, kv = kv_pool_by(make, deployment, device, specs)
        resources.callback(virtualizer.close)
    parts = load_parts(deployment, device, specs, placement, kv, on=cpu)
    ranks, _ = join_lanes(
        deployment,
        device,
        parts,
        peers,
        virtualizer=virtualizer,
        host=HostSide(cpu),
        resources=resources,
    )
    return ranks


def load_interpreted(
    deployment: Deployment,
    device: Device,
    specs: Mapping[int, ModelSpec],
    placement: Placement,
    lanes_fd: int | None,
) -> DeviceRanks:
    """A GPU's ranks, both of them, on CPU tensors."""
    return Interpreted().load(deployment, device, specs, placement, lanes_fd)


def load_compiled(
    deployment: Deployment,
    device: Device,
    specs: Mapping[int, ModelSpec],
    placement: Placement,
    lanes_fd: int | None,
) -> DeviceRanks:
    """A GPU's ranks, with the KV memory that is mapped first full of NaN."""
    kept = KeptDescriptors([])
    ranks = load_gpu_ranks(deployment, device, specs, placement, lanes_fd, kept=kept)
    assert ranks.attention is not None and isinstance(ranks.executor, GPUExecutor)
    virtualizer = ranks.attention.virtualizer
    for model, kv in ranks.attention.kv.items():
        chunks = list(range(virtualizer.free_bytes // deployment.chunk_bytes))
        virtualizer.map(model, chunks)
        pages = len(chunks) * deployment.chunk_bytes // (kv[0].nbytes)
        with ranks.executor.quiesced():  # the device is never idle while a loop is resident
            kv[:pages].fill_(torch.nan)
            torch.cuda.synchronize()
        virtualizer.unmap(model, chunks)
    return ranks
