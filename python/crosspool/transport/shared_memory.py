"""The data path between devices of one host: one shared-memory segment for all of them.

The segment (a memfd that the launcher creates and every device process inherits) holds

- a header: what the segment was made for, checked by everyone who attaches;
- one doorbell per device, in the order of ``deployment.devices``;
- one link per pair of attention rank and FFN rank on different devices of one host, and lane::

      offset
           0  dispatch signal   64-bit number   written by the attention rank
          64  dispatch header   epoch, model, layer, rows, row bytes    "
         128  combine signal    64-bit number   written by the FFN rank
         192  combine header    epoch, rows, row bytes                  "
         256  dispatch payload  rows x row bytes                        "  attention rank
              combine payload   rows x row bytes                        "  FFN rank

Order of publication. Dispatch n (n = 1, 2, ...): the attention rank writes payload and header,
stores n into the dispatch signal (release), and rings the doorbell of the FFN rank's device. The
FFN rank, which polls, loads n (acquire), reads header and payload in place, writes its partial sum
and header, stores n into the combine signal (release), and rings the doorbell of the attention
rank's device. The attention rank loads n (acquire) and reads the partial sum in place.

Who may write when. Payloads belong to the attention rank while the signals are equal and to the FFN
rank while the dispatch signal is one ahead. No other state exists, and it lives in the segment
alone: an FFN rank that attaches anew finds the dispatch that its predecessor did not reply to.

include/crosspool/lanes.h in sgl-kernel-ext/ is the same protocol for native code; model/lanes.pml
there is its model.

Waiting. A device waits on its doorbell for all of its links at once.
:meth:`SharedMemoryTransport.wait` remembers the doorbell's count from before the caller looked at
its links, so a ring in between ends the next wait at once.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from crosspool.config.deployment import Deployment
from crosspool.config.device import Device
from crosspool.kernels.native import Doorbell
from crosspool.transport.data_path import LaneError, spin_ns_of, within_hosts
from crosspool.transport.device_links import DeviceLinks
from crosspool.transport.lane_layout import (
    LINE_BYTES,
    PAGE_BYTES,
    LinkLayout,
    LinkPlace,
    round_up,
)
from crosspool.transport.shared_links import (
    SegmentLink,
    SharedMemoryAttentionLink,
    SharedMemoryFFNLink,
)

_SEGMENT_HEADER = struct.Struct("<8s7IxxxxQ")
_MAGIC = b"CPLANES1"


@dataclass(frozen=True)
class _Segment:
    """Offsets and sizes within a deployment's segment, in bytes."""

    deployment: Deployment
    max_hidden_bytes: int

    @cached_property
    def pairs(self) -> list[tuple[int, int]]:
        return within_hosts(self.deployment)

    @cached_property
    def layout(self) -> LinkLayout:
        return LinkLayout(self.deployment.max_step_tokens, self.max_hidden_bytes)

    @property
    def links_offset(self) -> int:
        return round_up(LINE_BYTES * (1 + len(self.deployment.devices)), PAGE_BYTES)

    @property
    def total_bytes(self) -> int:
        return self.links_offset + len(self.pairs) * self.deployment.lanes * self.layout.link_bytes

    @property
    def header(self) -> bytes:
        deployment = self.deployment
        return _SEGMENT_HEADER.pack(
            _MAGIC,
            len(deployment.devices),
            len(deployment.kv_pool_devices),
            len(deployment.weight_pool_devices),
            deployment.lanes,
            deployment.max_step_tokens,
            self.max_hidden_bytes,
            len(self.pairs),
            self.total_bytes,
        )

    def doorbell(self, device: Device) -> int:
        return LINE_BYTES * (1 + self.deployment.devices.index(device))

    def link(self, attention_rank: int, lane: int, ffn_rank: int) -> int:
        pair = self.pairs.index((attention_rank, ffn_rank))
        return self.links_offset + (pair * self.deployment.lanes + lane) * self.layout.link_bytes


def create(deployment: Deployment, max_hidden_bytes: int) -> int:
    """Makes the segment, zeroed and sealed against resizing; returns its file descriptor.

    ``max_hidden_bytes``: most bytes of one row, hidden size times dtype bytes, over all models. The
    descriptor is closed on exec unless handed on (``pass_fds``). Raises ValueError when the
    deployment needs no segment, OSError when the system refuses it."""
    segment = _Segment(deployment, max_hidden_bytes)
    if not segment.pairs:
        raise ValueError("no two ranks on different devices of one host share a link")
    fd = os.memfd_create("crosspool-lanes", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, segment.total_bytes)
        os.pwrite(fd, segment.header, 0)
        seals = fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _attach(fd: int, deployment: Deployment) -> tuple[mmap.mmap, _Segment]:
    """Raises LaneError when ``fd`` is no segment of this deployment."""
    raw = os.pread(fd, _SEGMENT_HEADER.size, 0)
    if len(raw) < _SEGMENT_HEADER.size:
        raise LaneError("the lanes' file is too short for a segment")
    segment = _Segment(deployment, _SEGMENT_HEADER.unpack(raw)[6])
    if raw != segment.header or os.fstat(fd).st_size != segment.total_bytes:
        raise LaneError("the lanes' segment was made for another deployment")
    return mmap.mmap(fd, segment.total_bytes), segment


class SharedMemoryTransport:
    """One device's ends of all links to other devices, and its doorbell.

    >>> transport = SharedMemoryTransport(fd, deployment, device)
    >>> links = [transport.ffn_link(a, lane) for a in ... for lane in ...]
    >>> while True:
    ...     if not any(serve(link) for link in links):
    ...         transport.wait(timeout=1.0)
    """

    def __init__(
        self,
        fd: int,
        deployment: Deployment,
        device: Device,
        spin_ns: int | None = None,
        *,
        on_gpu: DeviceLinks | None = None,
    ) -> None:
        """``fd`` may be closed afterwards. ``spin_ns``: longest spin of :meth:`wait`; None: as
        :func:`~crosspool.transport.data_path.spin_ns_of` says. ``on_gpu``: the GPU memory that
        holds the payloads of all links of this device, if they are not in the segment.

        Raises LaneError when ``fd`` is no segment of this deployment."""
        import torch

        self._memory, self._segment = _attach(fd, deployment)
        self._deployment = deployment
        self._device = device
        self._on_gpu = on_gpu
        self._base = base = torch.frombuffer(self._memory, dtype=torch.uint8).data_ptr()
        self._doorbells = {
            peer: Doorbell(base + self._segment.doorbell(peer)) for peer in deployment.devices
        }
        self._doorbell = self._doorbells[device]
        self._seen = self._doorbell.rings()
        # A predecessor may have died between a store and its ring.
        for peer, doorbell in self._doorbells.items():
            if peer != device:
                doorbell.ring()
        self._spin_ns = spin_ns_of(deployment, device) if spin_ns is None else spin_ns

    def attention_link(self, lane: int, ffn_rank: int) -> SharedMemoryAttentionLink:
        """This device's attention rank's end of a lane to an FFN rank on another device.

        Raises ValueError when there is no such link."""
        attention_rank = _rank_on(self._device, self._deployment.kv_pool_devices)
        peer = self._doorbells[self._deployment.weight_pool_devices[ffn_rank]]
        link = self._lane(attention_rank, lane, ffn_rank)
        return SharedMemoryAttentionLink(link, peer)

    def ffn_link(self, attention_rank: int, lane: int) -> SharedMemoryFFNLink:
        """This device's FFN rank's end of a lane of an attention rank on another device.

        Raises ValueError when there is no such link."""
        ffn_rank = _rank_on(self._device, self._deployment.weight_pool_devices)
        peer = self._doorbells[self._deployment.kv_pool_devices[attention_rank]]
        link = self._lane(attention_rank, lane, ffn_rank)
        return SharedMemoryFFNLink(link, peer)

    @property
    def max_row_bytes(self) -> int:
        """Bytes of the widest row that a link has room for."""
        return self._segment.layout.max_row_bytes

    @property
    def doorbell_address(self) -> int:
        """Address of this device's doorbell. The memory is mapped as long as the transport is."""
        return self._base + self._segment.doorbell(self._device)

    @property
    def network_address(self) -> int:
        """0: no peer of these links is on another host."""
        return 0

    def attention_place(self, lane: int, ffn_rank: int) -> LinkPlace:
        """Where the link of :meth:`attention_link` lies, for native code.

        Raises ValueError when there is no such link."""
        attention_rank = _rank_on(self._device, self._deployment.kv_pool_devices)
        peer = self._deployment.weight_pool_devices[ffn_rank]
        return self._place(attention_rank, lane, ffn_rank, peer)

    def ffn_place(self, attention_rank: int, lane: int) -> LinkPlace:
        """Where the link of :meth:`ffn_link` lies, for native code.

        Raises ValueError when there is no such link."""
        ffn_rank = _rank_on(self._device, self._deployment.weight_pool_devices)
        peer = self._deployment.kv_pool_devices[attention_rank]
        return self._place(attention_rank, lane, ffn_rank, peer)

    def wait(self, timeout: float) -> bool:
        """Sleeps until a peer rings this device's doorbell, at most ``timeout`` seconds; returns
        whether one has rung. A ring since the last call's return ends it at once, so a caller that
        looks at its links after each call misses none."""
        seen = self._seen
        self._seen = self._doorbell.wait(seen, self._spin_ns, int(timeout * 1e9))
        return self._seen != seen

    def _place(self, attention_rank: int, lane: int, ffn_rank: int, peer: Device) -> LinkPlace:
        self._check(attention_rank, lane, ffn_rank)
        segment = self._segment
        return LinkPlace(
            address=self._base + segment.link(attention_rank, lane, ffn_rank),
            payload_bytes=segment.layout.payload_bytes,
            max_rows=segment.layout.max_rows,
            max_row_bytes=segment.layout.max_row_bytes,
            peer_doorbell=self._base + segment.doorbell(peer),
        )

    def _lane(self, attention_rank: int, lane: int, ffn_rank: int) -> SegmentLink:
        self._check(attention_rank, lane, ffn_rank)
        link, segment = (attention_rank, lane, ffn_rank), self._segment
        return SegmentLink(self._memory, segment.link(*link), segment.layout, link, self._on_gpu)

    def _check(self, attention_rank: int, lane: int, ffn_rank: int) -> None:
        if (attention_rank, ffn_rank) not in self._segment.pairs:
            raise ValueError(
                f"attention rank {attention_rank} and FFN rank {ffn_rank} are on one device"
            )
        if not 0 <= lane < self._deployment.lanes:
            raise ValueError(f"lane {lane} of {self._deployment.lanes}")


def _rank_on(device: Device, pool: Sequence[Device]) -> int:
    if device not in pool:
        raise ValueError(f"device {device.name} has no rank of this pool")
    return list(pool).index(device)
