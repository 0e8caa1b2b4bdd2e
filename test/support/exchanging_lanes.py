"""An attention rank and an FFN rank as two loops on one GPU, driven by themselves: no scheduler and
no messages. On CPU tensors the same with stages that are called one by one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from crosspool.kernels.cuda_loop import CudaLoop, LinkMemory
from crosspool.models.spec import DTYPE_BYTES
from crosspool.ranks.gpu.exchange import HostExchange
from crosspool.ranks.gpu.host_side import HostSide, start
from crosspool.ranks.gpu.inputs import HostMemory
from crosspool.ranks.gpu.lanes import join_loop, make_serving, make_stages, model_stages
from crosspool.ranks.gpu.links import Crossing, ServedCounts
from crosspool.ranks.gpu.model import GPUModel
from crosspool.transport.lane_layout import LINK_HEAD_BYTES, LinkLayout
from support.link_ends import Ends, NeverRings

from benchmark.gpu_lanes import Lanes


class ExchangingLanes(Lanes):
    """Lanes whose models have their FFN parts on a rank of its own, behind a link of each lane."""

    def __init__(
        self,
        models: Sequence[GPUModel],
        *,
        lanes: int,
        buckets: Sequence[int],
        device: torch.device,
        resident: bool,
        lease: int = 1,
    ) -> None:
        self.models, self.device = models, device
        self._buckets, self._flying, self._steps = buckets, {}, 0
        self.host = HostSide(device)
        sequences, specs = buckets[-1], [model.spec for model in models]
        row_bytes = max(spec.hidden * DTYPE_BYTES[spec.dtype] for spec in specs)
        layout = LinkLayout(buckets[-1], row_bytes)
        self._links = torch.full((lanes, layout.link_bytes), 0xFF, dtype=torch.uint8, device=device)
        self._links[:, :LINK_HEAD_BYTES] = 0
        places = [
            LinkMemory(link.data_ptr(), layout.payload_bytes, layout.max_rows, row_bytes)
            for link in self._links
        ]
        crossing = Crossing(links=(0,), own=None)
        away = [GPUModel(m.spec, m.attention, None, m.kv) for m in models]
        self.places, self.stages = make_stages(
            away,
            buckets,
            lanes,
            sequences,
            device,
            links=[[place] for place in places],
            crossings=[crossing] * len(models),
        )
        ffns = {i: model.ffn for i, model in enumerate(models) if model.ffn is not None}
        self.served = ServedCounts(lanes, self.host)
        serving, served_stages = make_serving(
            specs, ffns, buckets, places, device, counts=self.served, first_lane=0
        )
        elements = max(stages.layout.elements for stages in self.stages.values())
        self.memory = [HostMemory(elements, sequences, lease, self.host) for _ in range(lanes)]
        ends = [Ends(lane=lane) for lane in range(lanes)]
        bell = NeverRings()
        served: Any = HostExchange(bell, (), [ends], frozenset(ffns), buckets)
        self._peer = join_loop(
            [model_stages(spec, Crossing()) for spec in specs],
            serving,
            served_stages,
            buckets,
            host=self.host,
            resident=resident,
            exchange=served,
        )
        own = join_loop(
            [model_stages(spec, crossing) for spec in specs],
            self.places,
            self.stages,
            buckets,
            host=self.host,
            resident=resident,
            exchange=HostExchange(bell, [[end] for end in ends]),
        )
        for loop in (own, self._peer):
            start(loop, self.host)
        self.loop = own if resident else _InTurn(own, self._peer)

    def close(self) -> None:
        # Freeing device memory waits for everything on the device.
        for loop in (self.loop, self._peer):
            if isinstance(loop, CudaLoop):
                loop.quiesce()
        self.loop.close()
        self._peer.close()
        self.host.close()


class _InTurn:
    """A host-launched loop whose waits let another one work, too."""

    def __init__(self, loop: Any, peer: Any) -> None:
        self._loop, self._peer = loop, peer

    def wait(self, timeout_s: float) -> bool:
        self._peer.wait(0.0)
        return bool(self._loop.wait(0.0))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loop, name)
