"""The resident loop on a GPU: 10^5 steps of a small chain whose every stage changes the tokens, so
that a stage left out, repeated or out of place shows.

CROSSPOOL_GPU_STEPS: fewer or more steps, for compute-sanitizer (`make sanitize-gpu`)."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator

import pytest
import torch
from crosspool.kernels import cuda_loop
from crosspool.kernels.cuda_loop import (
    CudaLoop,
    CudaLoopError,
    GPUStage,
    GPUStepArguments,
    LanePlaces,
    LinkMemory,
    ModelStages,
)
from crosspool.kernels.engine_structs import DONE, TOKENS
from torch import Tensor

pytestmark = pytest.mark.gpu

STEPS = int(os.environ.get("CROSSPOOL_GPU_STEPS", "100000"))
LEASE = 50
KINDS = (False, True, True, False)
VOCABULARY = 50_021
ROWS = 4
LINK_BYTES = 4096


@pytest.fixture(scope="module", autouse=True)
def _gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU")
    if cuda_loop.library_path() is None:
        pytest.skip("libcrosspool_cuda.so was not built")


def captured(body: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """What ``body`` queues, as a graph that is not instantiated. It runs once before."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        body()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph(keep_graph=True)
        graph.capture_begin(capture_error_mode="thread_local")
        body()
        graph.capture_end()
        stream.synchronize()
    return graph


def following(token: int) -> int:
    """The token after ``token``: what the stages below make of it."""
    for layer, moe in enumerate(KINDS):
        token = token * 31 + layer
        token = token * (5 if moe else 3) + layer
    return token % VOCABULARY


class Chain:
    """A lane whose state is one int64 per row."""

    def __init__(self) -> None:
        self.words = torch.zeros(8, dtype=torch.int32, device="cuda")
        self.chosen = torch.zeros(ROWS, dtype=torch.int32, device="cuda")
        self.state = torch.zeros(ROWS, dtype=torch.int64, device="cuda")
        self.begin = torch.arange(1, ROWS + 1, dtype=torch.int64, device="cuda")
        self.graphs: dict[GPUStage, torch.cuda.CUDAGraph] = {}

    @property
    def places(self) -> LanePlaces:
        return LanePlaces(words=self.words.data_ptr(), chosen=self.chosen.data_ptr())

    def part(self, factor: int, state: Tensor) -> None:
        state.mul_(factor).add_(self.words[2:3])

    def head(self) -> None:
        self.state.remainder_(VOCABULARY)
        self.chosen.copy_(self.state)

    def capture(self) -> None:
        bodies: dict[GPUStage, Callable[[], None]] = {
            GPUStage.EMBED: lambda: self.state.copy_(self.begin),
            GPUStage.FEED: lambda: self.state.copy_(self.chosen),
            GPUStage.ATTENTION: lambda: self.part(31, self.state),
            GPUStage.DENSE_FFN: lambda: self.part(3, self.state),
            GPUStage.MOE_FFN: lambda: self.part(5, self.state),
            GPUStage.HEAD: self.head,
        }
        for stage, body in bodies.items():
            self.graphs[stage] = captured(body)


class Leases:
    """Keeps a lane busy with leases, and checks their tokens."""

    def __init__(self, loop: CudaLoop, lane: int) -> None:
        self.loop, self.lane = loop, lane
        self.steps = self.number = 0
        self.tokens = torch.zeros(LEASE, ROWS, dtype=torch.int32).pin_memory()
        expected = [[row] for row in range(1, ROWS + 1)]
        for row in expected:
            while len(row) <= LEASE:
                row.append(following(row[-1]))
        self.expected = torch.tensor(expected, dtype=torch.int32)[:, 1:].T.contiguous()

    def push(self) -> None:
        self.tokens.fill_(-1)
        self.number += 1
        self.loop.push_step(
            self.lane,
            GPUStepArguments(
                step=self.number,
                rows=ROWS,
                wanted=ROWS,
                lease=LEASE,
                tokens=self.tokens.data_ptr(),
            ),
        )

    def take(self, kind: int, step: int, first: int) -> None:
        assert (step, first) == (self.number, self.steps % LEASE)
        assert kind == (DONE if first == LEASE - 1 else TOKENS)
        self.steps += 1
        if kind == DONE:
            assert torch.equal(self.tokens, self.expected)
            self.push()


@pytest.fixture
def chains() -> list[Chain]:
    made = [Chain(), Chain()]
    for chain in made:
        chain.capture()
    return made


@pytest.fixture
def make_loop() -> Iterator[Callable[..., CudaLoop]]:
    """Makes loops as CudaLoop does. However the test ends, all leave the device before one is
    freed, since freeing device memory waits for everything there."""
    made: list[CudaLoop] = []

    def make(*arguments: object, **options: object) -> CudaLoop:
        made.append(CudaLoop(*arguments, **options))
        return made[-1]

    yield make
    try:
        for loop in made:
            loop.quiesce()
    except CudaLoopError as error:
        pytest.exit(f"the device is lost to further tests: {error}", returncode=1)
    for loop in made:
        loop.close()


def test_many_steps(chains: list[Chain], make_loop: Callable[..., CudaLoop]) -> None:
    """Two lanes at a time, with the loop off the device now and then, amidst leases."""
    loop = make_loop([ModelStages(kinds=KINDS)], [c.places for c in chains], [ROWS])
    for lane, chain in enumerate(chains):
        for stage, graph in chain.graphs.items():
            loop.add_graph(lane, 0, stage, 0, graph.raw_cuda_graph())
    lanes = [Leases(loop, lane) for lane in range(len(chains))]
    loop.start()
    for lease in lanes:
        lease.push()
    pauses = 0
    while sum(lane.steps for lane in lanes) < STEPS:
        event = loop.pop()
        if event is None:
            assert loop.wait(10.0)
            continue
        lanes[event.lane].take(event.kind, event.step, event.first)
        if sum(lane.steps for lane in lanes) // 10_000 > pauses:
            pauses += 1
            with loop.quiesced():
                torch.cuda.synchronize()  # would not come back behind a resident loop
    assert min(lane.steps for lane in lanes) > STEPS // 10


def test_a_graph_that_no_device_launches_is_refused(
    chains: list[Chain], make_loop: Callable[..., CudaLoop]
) -> None:
    runtime = pytest.importorskip("cuda.bindings.runtime")
    loop = make_loop([ModelStages(kinds=KINDS)], [chains[0].places], [ROWS])
    _, empty = runtime.cudaGraphCreate(0)
    with pytest.raises(CudaLoopError, match="empty"):
        loop.add_graph(0, 0, GPUStage.HEAD, 0, int(empty))
    runtime.cudaGraphAddEmptyNode(empty, None, 0)
    with pytest.raises(CudaLoopError, match="'empty'"):
        loop.add_graph(0, 0, GPUStage.HEAD, 0, int(empty))
    runtime.cudaGraphDestroy(empty)


def test_two_loops_exchange_rows(chains: list[Chain], make_loop: Callable[..., CudaLoop]) -> None:
    """An attention rank and an FFN rank as two loops on one GPU: links in its memory."""
    attention, ffn = chains
    link = torch.zeros(LINK_BYTES, dtype=torch.uint8, device="cuda")
    payload_bytes = 8 * ROWS
    assert link.data_ptr() % 64 == 0
    dispatched = link[256 : 256 + payload_bytes].view(torch.int64)
    combined = link[256 + 64 : 256 + 64 + payload_bytes].view(torch.int64)
    memory = LinkMemory(link.data_ptr(), 64, ROWS, 8)
    of_attention = LanePlaces(attention.words.data_ptr(), attention.chosen.data_ptr(), (memory,))
    of_ffn = LanePlaces(ffn.words.data_ptr(), 0, (memory,), serves=True)

    def serve(factor: int) -> None:
        combined.copy_(dispatched)
        ffn.part(factor, combined)

    graphs = dict(attention.graphs)
    graphs[GPUStage.DISPATCH] = captured(lambda: dispatched.copy_(attention.state))
    graphs[GPUStage.COMBINE] = captured(lambda: attention.state.copy_(combined))
    remote = {
        GPUStage.DENSE_FFN: captured(lambda: serve(3)),
        GPUStage.MOE_FFN: captured(lambda: serve(5)),
    }
    link.zero_()
    torch.cuda.synchronize()
    # Rows of 8 bytes, all of them, in one bucket.
    crossing = ModelStages(kinds=KINDS, row_bytes=8, links=(0,), local=False)
    loop = make_loop([crossing], [of_attention], [ROWS])
    peer = make_loop([ModelStages(kinds=KINDS, row_bytes=8)], [of_ffn], [ROWS])
    for stage, graph in graphs.items():
        if stage not in remote:
            loop.add_graph(0, 0, stage, 0, graph.raw_cuda_graph())
    for stage, graph in remote.items():
        peer.add_graph(0, 0, stage, 0, graph.raw_cuda_graph())
    lane = Leases(loop, 0)
    peer.start()
    loop.start()
    lane.push()
    while lane.steps < STEPS // 10:
        event = loop.pop()
        if event is None:
            assert loop.wait(10.0)
            continue
        lane.take(event.kind, event.step, event.first)


def test_nvshmem_carries_a_dispatch_and_its_answer() -> None:
    """One PE that is its own peer: both copies of the link are one."""
    from crosspool.kernels import nvshmem

    try:
        library = nvshmem.Nvshmem()
    except ImportError as error:
        pytest.skip(str(error))
    runtime = pytest.importorskip("cuda.bindings.runtime")
    torch.cuda.init()
    os.environ.setdefault("NVSHMEM_BOOTSTRAP_UID_SOCK_IFNAME", "lo")
    os.environ.setdefault("NVSHMEM_CUMEM_GRANULARITY", str(2 << 20))
    library.init(0, 1, library.unique_id())
    address = library.allocate(LINK_BYTES)
    words = torch.zeros(8, dtype=torch.int32, device="cuda")
    words[2], words[4] = 3, 2  # layer, rows
    end = nvshmem.LinkEnd(address, 0, 0)
    raw = bytearray(nvshmem.device_ends([address], [0]))
    ends = torch.frombuffer(raw, dtype=torch.uint8).cuda()

    def both() -> None:
        stream = torch.cuda.current_stream().cuda_stream
        library.capture_dispatch(
            end, words=words.data_ptr(), epoch=7, model=1, row_bytes=16, stream=stream
        )
        library.capture_reply(ends.data_ptr(), 64, words.data_ptr(), stream)

    graph = captured(both)  # has run once
    graph.instantiate()
    graph.replay()
    torch.cuda.synchronize()
    host = (ctypes.c_uint64 * 32)()
    runtime.cudaMemcpy(
        ctypes.addressof(host), address, 256, runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
    )
    signals = host[0], host[16]
    header = bytes(host)[64:88]
    library.finalize()
    assert signals == (2, 2)
    assert header == (7).to_bytes(8, "little") + b"".join(
        value.to_bytes(4, "little") for value in (1, 3, 2, 16)
    )
