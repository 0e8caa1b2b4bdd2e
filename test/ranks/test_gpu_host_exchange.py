"""The host-launched loop of a GPU whose rows leave the device, or come from others: in which order
it launches, tells and hears, with a launcher that only takes notes."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from crosspool.config.deployment import Deployment, ModelConfig
from crosspool.config.device import Device
from crosspool.config.errors import ConfigError
from crosspool.kernels.cuda_loop import GPUStage, ModelStages
from crosspool.kernels.cuda_loop_structs import GPUStepArguments
from crosspool.kernels.engine_structs import DONE
from crosspool.models.spec import DenseFFN, MoEFFN, RouterSpec
from crosspool.ranks.gpu.exchange import HostExchange
from crosspool.ranks.gpu.executor import GPUExecutor
from crosspool.ranks.gpu.links import Crossing, crossing_of
from crosspool.ranks.gpu.loop import HostLaunchedLoop
from crosspool.ranks.gpu.shares import check_share
from crosspool.transport.data_path import DispatchHeader, LaneError
from crosspool.transport.heartbeats import Activity
from crosspool.transport.messages import Release
from crosspool.weightpool.placement import FFNShard
from support.link_ends import Ends, NeverRings
from support.one_gpu import spec

ROW_BYTES = 64
KINDS = (False, True)


class Launches:
    """A launcher whose device is done when a test says so."""

    def __init__(self) -> None:
        self.log: list[tuple[int, Any, int]] = []
        self.words: dict[int, tuple[int, ...]] = {}
        self.busy: set[int] = set()

    def write(
        self, lane: int, inputs: int, rows: int, done: int, *, layer: int = 0, link: int = 0
    ) -> None:
        self.words[lane] = rows, layer, link

    def set_layer(self, lane: int, layer: int) -> None:
        self.words[lane] = (self.words[lane][0], layer, 0)

    def launch(self, lane: int, model: int, stage: GPUStage, bucket: int) -> None:
        self.log.append((lane, stage, self.words[lane][1]))

    def fetch(self, lane: int, address: int, count: int) -> None:
        pass

    def fence(self, lane: int) -> None:
        self.busy.add(lane)

    def finished(self, lane: int) -> bool:
        return lane not in self.busy

    def synchronize(self, lane: int) -> None:
        pass

    def of(self, lane: int) -> list[Any]:
        return [(stage, layer) for other, stage, layer in self.log if other == lane]


def crossing(links: tuple[int, ...], local: bool) -> ModelStages:
    return ModelStages(kinds=KINDS, row_bytes=ROW_BYTES, links=links, local=local)


def turn(loop: HostLaunchedLoop, times: int = 20) -> list[tuple[int, int]]:
    """Kind and step of what happened."""
    found = []
    for _ in range(times):
        loop.wait(0.0)
        while (event := loop.pop()) is not None:
            found.append((event.kind, event.step))
    return found


def test_a_layer_waits_for_its_payloads_and_for_every_partial_sum() -> None:
    launches: Any = Launches()
    ends = [[Ends(lane=lane), Ends(lane=lane)] for lane in range(2)]
    loop = HostLaunchedLoop(
        [crossing((0, 1), True), crossing((1,), False)],
        2,
        launches,
        exchange=HostExchange(NeverRings(), ends),
    )
    loop.push_step(0, GPUStepArguments(step=1, model=0, rows=3, lease=1))
    loop.push_step(1, GPUStepArguments(step=2, model=1, rows=2, lease=1))
    turn(loop)
    began = [(GPUStage.EMBED, 0), (GPUStage.ATTENTION, 0), (GPUStage.DISPATCH, 0)]
    assert launches.of(0) == launches.of(1) == began
    assert all(end.free for of_lane in ends for end in of_lane)  # payloads are being written
    launches.busy.clear()
    turn(loop)
    for end in ends[0]:
        assert end.outstanding == DispatchHeader(epoch=0, model=0, layer=0, rows=3)
        assert end.row_bytes == ROW_BYTES
    assert ends[1][0].free and ends[1][1].outstanding is not None
    assert launches.of(0)[3:] == [(GPUStage.DENSE_FFN, 0)]  # this device's own share meanwhile
    assert launches.of(1)[3:] == []
    ends[0][0].announce_reply()
    ends[1][1].announce_reply()
    turn(loop)
    assert launches.of(0)[4:] == []  # one partial sum is missing
    following = [(GPUStage.COMBINE, 0), (GPUStage.ATTENTION, 1), (GPUStage.DISPATCH, 1)]
    assert launches.of(1)[3:] == following
    ends[0][1].announce_reply()
    turn(loop)
    assert launches.of(0)[4:] == following
    launches.busy.clear()
    turn(loop)
    for end in (end for of_lane in ends for end in of_lane if not end.free):
        end.announce_reply()
    assert turn(loop) == []  # the last layer's sum is under way
    assert launches.of(0)[-2:] == [(GPUStage.MOE_FFN, 1), (GPUStage.COMBINE, 1)]
    assert launches.of(1)[-2:] == [(GPUStage.DISPATCH, 1), (GPUStage.COMBINE, 1)]
    launches.busy.clear()
    assert sorted(turn(loop)) == [(DONE, 1), (DONE, 2)]
    assert all(end.free for of_lane in ends for end in of_lane)


def test_a_predecessors_dispatch_is_waited_for() -> None:
    launches: Any = Launches()
    end = Ends(outstanding=DispatchHeader(0, 0, 0, 1))
    loop = HostLaunchedLoop(
        [crossing((0,), False)], 1, launches, exchange=HostExchange(NeverRings(), [[end]])
    )
    loop.push_step(0, GPUStepArguments(step=1, model=0, rows=3, lease=1))
    turn(loop)
    assert launches.of(0) == [(GPUStage.EMBED, 0), (GPUStage.ATTENTION, 0)]
    end.announce_reply()
    end.accept()
    turn(loop)
    assert launches.of(0)[-1] == (GPUStage.DISPATCH, 0)


def serving(ends: list[Ends]) -> tuple[HostLaunchedLoop, Launches]:
    launches: Any = Launches()
    exchange = HostExchange(NeverRings(), (), [ends], frozenset({0}), [1, 2, 4])
    models = [ModelStages(kinds=KINDS, row_bytes=ROW_BYTES)] * 2
    return HostLaunchedLoop(models, 0, launches, exchange=exchange), launches


def test_dispatches_are_served_in_turn_one_at_a_time() -> None:
    ends = [Ends(lane=lane) for lane in range(3)]
    loop, launches = serving(ends)
    executor = GPUExecutor(None, loop, polls_peers=True)
    for end in ends[1:]:
        end.announce(DispatchHeader(epoch=0, model=0, layer=1, rows=3), ROW_BYTES)
    order = []
    for _ in range(6):
        assert executor.run(0.0) == []
        assert len(launches.log) <= len(order) + 1
        if launches.busy:
            assert launches.words[0][:2] == (3, 1)
            order.append(launches.words[0][2])
            launches.busy.clear()
            executor.run(0.0)
            assert ends[order[-1]].replied and loop.served == len(order)
            if len(order) == 1:  # the same lane again: the others come first
                ends[1].accept()
                ends[1].announce(DispatchHeader(epoch=0, model=0, layer=1, rows=3), ROW_BYTES)
    assert order == [1, 2, 1]
    assert launches.of(0) == [(GPUStage.MOE_FFN, 1)] * 3
    assert not executor.quiet and not executor.drained
    with pytest.raises(RuntimeError, match="without an attention rank"):
        executor.submit(Release(model=0, requests=[], unmap_chunks=[]))


@pytest.mark.parametrize(
    ("header", "row_bytes", "problem"),
    [
        (DispatchHeader(0, 1, 0, 1), ROW_BYTES, "model 1, of which nothing lies here"),
        (DispatchHeader(0, 7, 0, 1), ROW_BYTES, "model 7, of which nothing lies here"),
        (DispatchHeader(0, 0, 2, 1), ROW_BYTES, "layer 2 of 2"),
        (DispatchHeader(0, 0, 0, 5), ROW_BYTES, "5 rows; 4 fit"),
        (DispatchHeader(0, 0, 0, 1), 32, "rows of 32 bytes, not 64"),
    ],
)
def test_a_dispatch_that_does_not_fit(header: DispatchHeader, row_bytes: int, problem: str) -> None:
    end = Ends(attention_rank=2, lane=1)
    loop, launches = serving([end])
    end.announce(header, row_bytes)
    with pytest.raises(LaneError, match=f"attention rank 2, lane 1: dispatched {problem}"):
        turn(loop)
    assert launches.log == []


def test_where_a_models_rows_go() -> None:
    first, second, third = (Device(f"cuda:{i}") for i in range(3))
    deployment = Deployment(
        models={
            0: ModelConfig(name="everywhere", path=""),
            1: ModelConfig(name="here", path="", weight_pool_devices=(second,)),
            2: ModelConfig(name="away", path="", weight_pool_devices=(third,)),
        },
        next_model=3,
        kv_pool_devices=(second, first),
        weight_pool_devices=(first, second, third),
        kv_pool_bytes=1,
        weight_pool_bytes=1,
    )
    found = [crossing_of(deployment, second, model) for model in range(3)]
    # Links of the second device: to FFN ranks 0 and 2.
    assert found == [Crossing((0, 1), own=1), Crossing((), own=0), Crossing((1,), own=None)]


def test_shares_that_the_kernels_do_not_take() -> None:
    model = ModelConfig(name="m", path="")
    router = RouterSpec(top_k=1, score="softmax", renormalize=False)
    moe = MoEFFN(experts=2, intermediate=48, router=router)
    of_moe = dataclasses.replace(spec(1), ffn=(moe,))
    of_dense = dataclasses.replace(spec(1), ffn=(DenseFFN(intermediate=64),))
    check_share(model, of_dense, FFNShard(rank=1, ranks=4, parallel="tp"))
    check_share(model, of_moe, FFNShard(rank=1, ranks=2, parallel="ep"))
    with pytest.raises(ConfigError, match="m: gated MLPs of 48 columns cannot be split between 2"):
        check_share(model, of_moe, FFNShard(rank=1, ranks=2, parallel="tp"))
    with pytest.raises(ConfigError, match="m: 2 experts cannot be dealt to 3 GPUs"):
        check_share(model, of_moe, FFNShard(rank=0, ranks=3, parallel="ep"))


def test_the_loop_tells_whether_it_waits_for_the_device_or_for_a_peer() -> None:
    launches: Any = Launches()
    ends = [Ends(lane=0)]
    exchange = HostExchange(NeverRings(), [ends])
    loop = HostLaunchedLoop([crossing((0,), False)], 1, launches, exchange=exchange)
    assert loop.activity([]) == (Activity.IDLE, 1, 0)
    loop.push_step(0, GPUStepArguments(step=1, model=0, rows=3, lease=1))
    assert loop.activity([0])[0] == Activity.COMPUTING
    turn(loop)
    computing, _, begun = loop.activity([0])
    assert computing == Activity.COMPUTING and begun > 0
    turn(loop)
    assert loop.activity([0])[::2] == (Activity.COMPUTING, begun)  # the device hangs
    launches.busy.clear()
    turn(loop)
    waiting, looks, later = loop.activity([0])
    assert waiting == Activity.WAITING and later > begun
    turn(loop)
    assert loop.activity([0]) == (Activity.WAITING, looks + 1, later)
    for _ in KINDS:
        ends[0].announce_reply()
        turn(loop)
        launches.busy.clear()
        turn(loop)
    assert loop.activity([])[0] == Activity.IDLE


def test_an_ffn_rank_without_a_dispatch_is_idle() -> None:
    launches: Any = Launches()
    end = Ends(lane=0)
    exchange = HostExchange(NeverRings(), (), [[end]], frozenset({0}), [4])
    loop = HostLaunchedLoop([crossing((), True)], 0, launches, exchange=exchange)
    turn(loop)
    assert loop.activity([])[0] == Activity.IDLE
    end.announce(DispatchHeader(epoch=0, model=0, layer=0, rows=3), ROW_BYTES)
    turn(loop)
    assert loop.activity([])[0] == Activity.COMPUTING
    launches.busy.clear()
    turn(loop)
    assert end.ready() and loop.activity([])[0] == Activity.IDLE
