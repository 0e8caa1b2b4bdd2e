"""How NVSHMEM is started over our control path, with a library in its place that checks what it is
asked; and its own unique id, where its wheel is installed."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from crosspool.config.deployment import Deployment, ModelConfig
from crosspool.config.device import Device
from crosspool.transport import nvshmem
from crosspool.transport.lane_layout import LinkLayout
from crosspool.transport.rendezvous import RendezvousError
from support.fake_cuda_memory import CPU

MEMBERS = ("cuda:0", "cuda:1", "cuda:2")


@dataclass
class World:
    """What the libraries of all PEs share."""

    barrier: threading.Barrier
    ids: set[bytes] = field(default_factory=set)
    sizes: set[int] = field(default_factory=set)
    heaps: dict[int, torch.Tensor] = field(default_factory=dict)


@dataclass
class FakeNvshmem:
    """One PE."""

    world: World
    pe: int = -1
    unique: bytes = bytes(range(128))

    def unique_id(self) -> bytes:
        assert self.pe == -1
        return self.unique

    def init(self, pe: int, pes: int, unique_id: bytes) -> None:
        assert pes == self.world.barrier.parties
        self.pe = pe
        self.world.ids.add(unique_id)
        self.world.barrier.wait(10)

    def allocate(self, nbytes: int) -> int:
        self.world.sizes.add(nbytes)
        self.world.heaps[self.pe] = torch.zeros(nbytes, dtype=torch.uint8)
        self.world.barrier.wait(10)
        return self.world.heaps[self.pe].data_ptr()


@pytest.fixture
def deployment(tmp_path):
    return Deployment(
        models={0: ModelConfig(name="m", path="m")},
        next_model=1,
        kv_pool_devices=(Device("cuda:0"), Device("cuda:1")),
        weight_pool_devices=(Device("cuda:2"), Device("cuda:1")),
        kv_pool_bytes=1,
        weight_pool_bytes=1,
        chunked_prefill_size=12,
        max_running_requests=4,
        runtime_dir=str(tmp_path),
    )


def in_processes(deployment, world, work):
    """Runs ``work(library, device)`` for every device; returns what each gave, or its error."""
    results = {}

    def run(name):
        library = FakeNvshmem(world)
        try:
            results[name] = work(library, Device(name))
        except Exception as error:
            results[name] = error

    threads = [threading.Thread(target=run, args=(name,)) for name in MEMBERS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_all_initialise_with_the_first_ones_id(deployment):
    world = World(threading.Barrier(3))
    results = in_processes(
        deployment, world, lambda library, device: nvshmem.initialise(library, deployment, device)
    )
    assert results == {"cuda:0": 0, "cuda:1": 1, "cuda:2": 2}
    assert world.ids == {bytes(range(128))}


def test_an_id_of_another_size_is_refused(deployment):
    world = World(threading.Barrier(3))

    def work(library, device):
        library.unique = b"short"
        return nvshmem.initialise(library, deployment, device, 10.0)

    results = in_processes(deployment, world, work)
    for error in results.values():
        assert isinstance(error, RendezvousError)
        assert "cuda:0 told an NVSHMEM id of 5 bytes, not 128" in str(error)
    assert world.ids == set()


def test_both_ends_have_the_link_at_one_symmetric_place(deployment):
    world = World(threading.Barrier(3))
    layout = LinkLayout(deployment.max_step_tokens, 192)

    def work(library, device):
        nvshmem.initialise(library, deployment, device)
        return nvshmem.links(library, deployment, device, layout, CPU)

    found = in_processes(deployment, world, work)
    # FFN rank 0 has two attention ranks on other devices, FFN rank 1 (beside attention rank 1) one.
    assert world.sizes == {(2 + 1) * 2 * layout.link_bytes}
    heaps = [world.heaps[pe].data_ptr() for pe in range(3)]
    offsets = set()
    pes = {0: 2, 1: 1}
    for attention_rank, ffn_rank in ((0, 0), (1, 0), (0, 1)):
        for lane in range(2):
            there = found[f"cuda:{pes[ffn_rank]}"]
            here_at, peer = found[f"cuda:{attention_rank}"].attention_end(lane, ffn_rank)
            there_at, back = there.ffn_end(attention_rank, lane)
            assert (peer, back) == (pes[ffn_rank], attention_rank)
            offset = here_at.address - heaps[attention_rank]
            assert offset == there_at.address - heaps[pes[ffn_rank]]
            offsets.add(offset)
            assert there.payloads(attention_rank, lane, ffn_rank).numel() == (
                2 * layout.payload_bytes
            )
    assert offsets == {n * layout.link_bytes for n in range(6)}
    with pytest.raises(ValueError, match="cuda:1 has no link"):
        found["cuda:1"].attention_end(0, 1)
    with pytest.raises(ValueError, match="cuda:2 has no link"):
        found["cuda:2"].payloads(0, 0, 1)


UNIQUE_ID = """
import ctypes, sys
from pathlib import Path
from crosspool.config.deployment import load
from crosspool.config.device import Device
from crosspool.transport import nvshmem

class Host:
    library = ctypes.CDLL(sys.argv[1])

    def unique_id(self):
        unique = (ctypes.c_char * nvshmem.UNIQUE_ID_BYTES)()
        ctypes.c_int.from_buffer(unique).value = (1 << 16) + nvshmem.UNIQUE_ID_BYTES
        assert self.library.nvshmemx_get_uniqueid(unique) == 0
        return unique.raw

    def init(self, pe, pes, unique_id):
        print(pe, pes, unique_id.hex())

deployment = load(Path(sys.argv[2]))
nvshmem.initialise(Host(), deployment, Device(sys.argv[3]), 30.0)
"""


def test_nvshmems_own_id_reaches_every_process(deployment, tmp_path):
    spec = importlib.util.find_spec("nvidia")
    folders = list(spec.submodule_search_locations or []) if spec else []
    libraries = [
        library for folder in folders for library in Path(folder).glob("nvshmem/lib/*_host.so.3")
    ]
    if not libraries:
        pytest.skip("no nvidia-nvshmem wheel")
    import msgspec

    file = tmp_path / "deployment.json"
    file.write_bytes(msgspec.json.encode(deployment))
    environment = {**os.environ, **nvshmem.ENVIRONMENT, "PYTHONPATH": os.pathsep.join(sys.path)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", UNIQUE_ID, str(libraries[0]), str(file), name],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in MEMBERS
    ]
    said = [process.communicate(timeout=60)[0].split() for process in processes]
    assert [line[:2] for line in said] == [[str(pe), "3"] for pe in range(3)]
    assert len({line[2] for line in said}) == 1
    assert len(bytes.fromhex(said[0][2])) == 128
    assert any(bytes.fromhex(said[0][2])[4:])
