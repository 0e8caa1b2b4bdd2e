"""Links in memory that device processes export to each other: between processes, with the fake
driver, whose memory another process can map, too."""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import sys
import threading
from itertools import pairwise
from pathlib import Path

import msgspec
import pytest
import torch
from crosspool.config.deployment import Deployment, ModelConfig
from crosspool.config.device import Device
from crosspool.config.errors import ConfigError
from crosspool.kernels.dlpack import tensor_at
from crosspool.transport import peer_memory, shared_memory
from crosspool.transport.data_path import DispatchHeader
from crosspool.transport.device_links import (
    DeviceLinks,
    attention_ranks_of,
    linked_ffn_ranks,
    links_bytes,
)
from crosspool.transport.lane_layout import LinkLayout
from crosspool.transport.peer_memory import PeerMemory
from crosspool.transport.rendezvous import RendezvousError
from crosspool.transport.shared_memory import SharedMemoryTransport
from support.fake_cuda_memory import CPU, FakeCuda
from transport.device_link_peer import DTYPES, MAX_ROW_BYTES, driver_of

PEER = Path(__file__).with_name("device_link_peer.py")
HIDDEN = 48
ROUNDS = 40
UNIT = 2 << 20


def deployment_of(folder: Path, kv: tuple[str, ...], weights: tuple[str, ...]) -> Deployment:
    return Deployment(
        models=(ModelConfig(name="m", path="m"),),
        kv_pool_devices=tuple(map(Device, kv)),
        weight_pool_devices=tuple(map(Device, weights)),
        kv_pool_bytes=1,
        weight_pool_bytes=1,
        chunked_prefill_size=12,
        max_running_requests=4,
        runtime_dir=str(folder),
    )


def exchange_with_peers(folder: Path, weights: tuple[str, ...], real: bool) -> None:
    """Random dispatches to every FFN rank on all lanes, each of them a process."""
    deployment = deployment_of(folder, ("cuda:0",), weights)
    device, layout = Device("cuda:0"), LinkLayout(deployment.max_step_tokens, MAX_ROW_BYTES)
    fd = shared_memory.create(deployment, MAX_ROW_BYTES)
    driver = driver_of(device, real)
    peers = [
        subprocess.Popen(
            [
                *[sys.executable, str(PEER), str(fd), msgspec.json.encode(deployment).decode()],
                *[name, str(ROUNDS), "real" if real else "fake"],
            ],
            pass_fds=[fd],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in weights
    ]
    with contextlib.ExitStack() as resources:
        links = peer_memory.join(
            deployment, device, layout, driver, resources=resources, timeout=30.0
        )
        transport = SharedMemoryTransport(fd, deployment, device, on_gpu=links)
        rows = dispatch_to_all(transport, deployment, links)
        for rank, peer in enumerate(peers):
            assert peer.stdout is not None
            assert peer.stdout.readline() == f"{rows[rank]}\n"
            for lane in range(deployment.lanes):
                head = links.attention_place(lane, rank).address
                assert tensor_at(head, (256,), torch.uint8, driver.dlpack_device)[0].item() == 77
        for peer in peers:
            peer.communicate("", timeout=60)
            assert peer.returncode == 0
        # Payloads went through the device's memory alone.
        segment = os.pread(fd, os.fstat(fd).st_size, 0)
        links_at = shared_memory._Segment(deployment, MAX_ROW_BYTES).link(0, 0, 0)
        for start in range(links_at, len(segment), layout.link_bytes):
            assert segment[start : start + 8] != bytes(8)
            assert not any(segment[start + 256 : start + layout.link_bytes])
    os.close(fd)
    if not real:
        assert driver.is_clean


def dispatch_to_all(
    transport: SharedMemoryTransport, deployment: Deployment, on_gpu: DeviceLinks
) -> list[list[int]]:
    """Returns the rows that went to each FFN rank, by lane."""
    draw = random.Random(3)
    where = on_gpu.payloads(0, 0, 0).device
    ends = [
        [transport.attention_link(lane, rank) for lane in range(deployment.lanes)]
        for rank in range(len(deployment.weight_pool_devices))
    ]
    for layer in range(ROUNDS):
        sent = []
        for end in (end for of_rank in ends for end in of_rank):
            rows, model = draw.randint(1, deployment.max_step_tokens), draw.randrange(2)
            hidden = torch.randn(rows, HIDDEN, device=where).to(DTYPES[model])
            end.dispatch(DispatchHeader(epoch=1, model=model, layer=layer, rows=rows), hidden)
            sent.append((end, hidden))
        for end, hidden in sent:
            while not end.ready():
                assert transport.wait(60.0), "no reply came"
            partial = end.combine(hidden.shape, hidden.dtype)
            assert torch.equal(partial, hidden * 2 + (layer + end.lane / 4))
    return [[end.counters.rows for end in of_rank] for of_rank in ends]


@pytest.mark.parametrize("weights", [("cuda:1",), ("cuda:1", "cuda:2")], ids=["one", "two"])
def test_dispatch_and_combine_go_through_memory_of_the_ffn_ranks_device(tmp_path, weights):
    exchange_with_peers(tmp_path, weights, real=False)


def test_links_lie_side_by_side_without_overlap(tmp_path):
    deployment = deployment_of(
        tmp_path, ("cuda:0", "cuda:1", "cuda:2"), ("cuda:1", "cuda:3", "cuda:0")
    )
    layout = LinkLayout(deployment.max_step_tokens, MAX_ROW_BYTES)
    assert [attention_ranks_of(deployment, rank) for rank in range(3)] == [
        [0, 2],
        [0, 1, 2],
        [1, 2],
    ]
    assert linked_ffn_ranks(deployment, Device("cuda:0")) == [0, 1, 2]
    assert linked_ffn_ranks(deployment, Device("cuda:3")) == [1]
    assert linked_ffn_ranks(deployment, Device("cuda:2")) == [0, 1, 2]
    bases = {0: 1 << 30, 1: 2 << 30, 2: 3 << 30}
    seen = set()
    for rank, attention_rank in enumerate(range(3)):
        device = deployment.kv_pool_devices[attention_rank]
        links = DeviceLinks(deployment, device, layout, bases, CPU)
        for ffn_rank in range(3):
            for lane in range(2):
                if device == deployment.weight_pool_devices[ffn_rank]:
                    with pytest.raises(ValueError, match="has no link of attention rank"):
                        links.attention_place(lane, ffn_rank)
                    continue
                place = links.attention_place(lane, ffn_rank)
                other = DeviceLinks(
                    deployment, deployment.weight_pool_devices[ffn_rank], layout, bases, CPU
                )
                assert other.ffn_place(rank, lane) == place
                assert place.peer_doorbell == 0
                end = place.address + 256 + 2 * place.payload_bytes
                assert end <= bases[ffn_rank] + links_bytes(deployment, layout, ffn_rank)
                seen.add(place.address)
        with pytest.raises(ValueError, match="lane 2"):
            links.attention_place(2, 1)
    assert len(seen) == 2 * 7
    addresses = sorted(seen)
    gaps = [b - a for a, b in pairwise(addresses)]
    assert min(gaps) == layout.link_bytes


def meet(tmp_path, driver, results, me="cuda:1", nbytes=100) -> threading.Thread:
    def run() -> None:
        try:
            memory = PeerMemory(driver, tmp_path / "m", me, ["cuda:0", "cuda:1"], own_bytes=nbytes)
            results.append(memory)
        except Exception as error:
            results.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def test_memory_is_zero_and_outlives_its_owner(tmp_path):
    drivers = [FakeCuda(total=2 * UNIT, name=f"cuda:{index}") for index in range(2)]
    results: list[PeerMemory] = []
    thread = meet(tmp_path, drivers[1], results, nbytes=UNIT + 1)
    with contextlib.closing(
        PeerMemory(drivers[0], tmp_path / "m", "cuda:0", ["cuda:0", "cuda:1"], own_bytes=0)
    ) as here:
        thread.join()
        assert list(here.addresses) == ["cuda:1"]
        mine = tensor_at(here.addresses["cuda:1"], (2 * UNIT,), torch.uint8, CPU)
        theirs = tensor_at(results[0].addresses["cuda:1"], (2 * UNIT,), torch.uint8, CPU)
        assert not mine.any()
        theirs[-1] = 5
        assert mine[-1] == 5
        results[0].close()
        assert drivers[1].is_clean
        mine[0] = 6
        assert mine.sum() == 11
    assert drivers[0].is_clean


def test_a_peer_out_of_reach_names_both_devices(tmp_path):
    drivers = [FakeCuda(total=2 * UNIT, name=f"cuda:{index}") for index in range(2)]
    results: list[PeerMemory] = []
    thread = meet(tmp_path, drivers[1], results)
    drivers[0].fail["set_access"] = 0, "CUDA_ERROR_INVALID_DEVICE"
    with pytest.raises(ConfigError, match=r"cuda:0 cannot reach memory of cuda:1 .*INVALID_DEVICE"):
        PeerMemory(drivers[0], tmp_path / "m", "cuda:0", ["cuda:0", "cuda:1"], own_bytes=0)
    thread.join()
    results[0].close()
    assert all(driver.is_clean for driver in drivers)


def test_nothing_is_left_when_a_peer_does_not_come(tmp_path):
    driver = FakeCuda(total=2 * UNIT)
    before = os.listdir("/proc/self/fd")
    with pytest.raises(RendezvousError, match="cuda:1 did not come"):
        PeerMemory(
            driver, tmp_path / "m", "cuda:0", ["cuda:0", "cuda:1"], own_bytes=100, timeout=0.2
        )
    assert driver.is_clean
    assert os.listdir("/proc/self/fd") == before
