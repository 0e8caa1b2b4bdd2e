"""Links in memory that device processes export to each other: between processes, with the fake
driver, whose memory another process can map, too."""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import msgspec
import pytest
import torch
from crosspool.config.deployment import Deployment
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
from crosspool.transport.kept_descriptors import KeptDescriptors
from crosspool.transport.lane_layout import LinkLayout
from crosspool.transport.peer_memory import PeerMemory, Share
from crosspool.transport.rendezvous import RendezvousError
from crosspool.transport.shared_memory import SharedMemoryTransport
from support.fake_cuda_memory import CPU, FakeCuda
from support.linked_devices import deployment_of
from transport.device_link_peer import DTYPES, MAX_ROW_BYTES, driver_of

PEER = Path(__file__).with_name("device_link_peer.py")
HIDDEN = 48
ROUNDS = 40
UNIT = 2 << 20


def exchange_with_peers(folder: Path, weights: tuple[str, ...], real: bool) -> None:
    """Random dispatches to every FFN rank on all lanes, each of them a process."""
    deployment = deployment_of(("cuda:0",), weights, runtime_dir=str(folder))
    device, layout = Device("cuda:0"), LinkLayout(deployment.max_step_tokens, MAX_ROW_BYTES)
    fd = shared_memory.create(deployment, MAX_ROW_BYTES)
    driver = driver_of(device, real)
    kept = KeptDescriptors.create(1 + len(weights))
    numbers = ",".join(map(str, kept.fds))
    peers = [
        subprocess.Popen(
            [
                *[sys.executable, str(PEER), str(fd), numbers],
                *[
                    msgspec.json.encode(deployment).decode(),
                    name,
                    str(ROUNDS),
                    "real" if real else "fake",
                ],
            ],
            pass_fds=[fd, *kept.fds],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in weights
    ]
    with contextlib.ExitStack() as resources:
        links = peer_memory.join(
            deployment, device, layout, driver, kept, resources=resources, timeout=30.0
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
    kept.close()
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
    kv, weights = ("cuda:0", "cuda:1", "cuda:2"), ("cuda:1", "cuda:3", "cuda:0")
    deployment = deployment_of(kv, weights, runtime_dir=str(tmp_path))
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


SHARES = {"cuda:1": Share(1, UNIT + 1)}


@pytest.fixture
def kept() -> Iterator[KeptDescriptors]:
    with contextlib.closing(KeptDescriptors.create(2)) as made:
        yield made


def devices() -> list[FakeCuda]:
    return [FakeCuda(total=2 * UNIT, name=f"cuda:{index}") for index in range(2)]


def test_memory_is_zero_and_outlives_its_owner(kept):
    drivers = devices()
    owner = PeerMemory(drivers[1], kept, "cuda:1", SHARES)
    with contextlib.closing(PeerMemory(drivers[0], kept, "cuda:0", SHARES)) as here:
        assert list(here.addresses) == ["cuda:1"]
        mine = tensor_at(here.addresses["cuda:1"], (2 * UNIT,), torch.uint8, CPU)
        theirs = tensor_at(owner.addresses["cuda:1"], (2 * UNIT,), torch.uint8, CPU)
        assert not mine.any()
        theirs[-1] = 5
        assert mine[-1] == 5
        owner.close()
        assert drivers[1].is_clean
        mine[0] = 6
        assert mine.sum() == 11
    assert drivers[0].is_clean


def test_the_next_owner_finds_the_memory_as_it_was_left(kept):
    """Its peers keep the addresses that they have; what they wrote meanwhile is there."""
    drivers = devices()
    owner = PeerMemory(drivers[1], kept, "cuda:1", SHARES)
    with contextlib.closing(PeerMemory(drivers[0], kept, "cuda:0", SHARES)) as here:
        mine = tensor_at(here.addresses["cuda:1"], (2 * UNIT,), torch.uint8, CPU)
        tensor_at(owner.addresses["cuda:1"], (1,), torch.uint8, CPU)[0] = 5
        owner.close()
        mine[1] = 6
        drivers[1] = FakeCuda(total=0, name="cuda:1")  # nothing is made anew
        with contextlib.closing(PeerMemory(drivers[1], kept, "cuda:1", SHARES)) as next_owner:
            theirs = tensor_at(next_owner.addresses["cuda:1"], (2 * UNIT,), torch.uint8, CPU)
            assert theirs[:2].tolist() == [5, 6]
            theirs[2] = 7
            assert mine[:3].tolist() == [5, 6, 7]
    assert all(driver.is_clean for driver in drivers)


MAKER = """
import sys
from crosspool.transport.kept_descriptors import KeptDescriptors
from crosspool.transport.peer_memory import PeerMemory, Share
from support.fake_cuda_memory import FakeCuda
numbers, nbytes = [int(word) for word in sys.argv[1].split(",")], int(sys.argv[2])
driver = FakeCuda(total=nbytes + (2 << 20), name="cuda:1")
PeerMemory(driver, KeptDescriptors(numbers), "cuda:1", {"cuda:1": Share(1, nbytes)})
print("made", flush=True)
sys.stdin.read()
"""


def test_memory_of_a_killed_process_is_found_though_nobody_had_mapped_it(kept):
    fds = ",".join(map(str, kept.fds))
    maker = subprocess.Popen(
        [sys.executable, "-c", MAKER, fds, str(SHARES["cuda:1"].nbytes)],
        pass_fds=kept.fds,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert maker.stdout is not None and maker.stdout.readline() == "made\n"
    maker.kill()
    maker.wait()
    before = os.listdir("/proc/self/fd")
    for name in ("cuda:0", "cuda:1"):
        driver = FakeCuda(total=0, name=name)
        with contextlib.closing(PeerMemory(driver, kept, name, SHARES)) as memory:
            whole = tensor_at(memory.addresses["cuda:1"], (2 * UNIT,), torch.uint8, CPU)
            assert int(whole.sum()) == (1 if name == "cuda:1" else 0)
            whole[0] = 1
        assert driver.is_clean
    assert os.listdir("/proc/self/fd") == before
    maker.communicate()


def test_a_peer_out_of_reach_names_both_devices(kept):
    drivers = devices()
    owner = PeerMemory(drivers[1], kept, "cuda:1", SHARES)
    drivers[0].fail["set_access"] = 0, "CUDA_ERROR_INVALID_DEVICE"
    with pytest.raises(ConfigError, match=r"cuda:0 cannot reach memory of cuda:1 .*INVALID_DEVICE"):
        PeerMemory(drivers[0], kept, "cuda:0", SHARES)
    owner.close()
    assert all(driver.is_clean for driver in drivers)


def test_nothing_is_left_when_a_peer_does_not_come(kept):
    driver = FakeCuda(total=2 * UNIT)
    shares = {**SHARES, "cuda:0": Share(0, 100)}
    before = os.listdir("/proc/self/fd")
    with pytest.raises(RendezvousError, match="cuda:1 did not make the memory of its links"):
        PeerMemory(driver, kept, "cuda:0", shares, timeout=0.2)
    assert driver.is_clean
    assert os.listdir("/proc/self/fd") == before


def test_memory_of_another_size_is_refused(kept):
    driver = FakeCuda(total=2 * UNIT)
    before = os.listdir("/proc/self/fd")
    descriptor = os.memfd_create("short")
    kept.keep(1, descriptor, UNIT)
    os.close(descriptor)
    with pytest.raises(RendezvousError, match=f"cuda:1 has {UNIT} bytes for its links"):
        PeerMemory(driver, kept, "cuda:0", SHARES)
    assert driver.is_clean
    assert os.listdir("/proc/self/fd") == before
