"""The face of a GPU's resident loop, and what it does when something is wrong, over a fake driver.

That the state machine takes the right stages in every interleaving is checked by the native tests
(test_cuda_lanes.py); that it runs on a GPU, by test_cuda_loop_gpu.py."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from crosspool.kernels import cuda_loop
from crosspool.kernels import cuda_loop_structs as cs
from crosspool.kernels.cuda_loop import (
    DONE,
    LOGITS,
    TOKENS,
    CudaLoop,
    CudaLoopError,
    LanePlaces,
    ModelStages,
    Phase,
    Stage,
    StepArguments,
)
from support import fake_cuda_graphs
from support.fake_cuda_graphs import FakeCuda, Knob, Node

pytestmark = pytest.mark.skipif(fake_cuda_graphs.COMPILER is None, reason="no C++ compiler")

STAGES = (
    Stage.EMBED,
    Stage.FEED,
    Stage.ATTENTION,
    Stage.DENSE_FFN,
    Stage.MOE_FFN,
    Stage.HEAD,
)


@pytest.fixture(scope="session")
def fake_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fake_cuda_graphs.build(tmp_path_factory.mktemp("fake_cuda"))


@pytest.fixture
def driver(fake_library: Path) -> Iterator[FakeCuda]:
    fake = FakeCuda(fake_library)
    yield fake
    fake.close()


class Bench:
    """A model of a dense and a MoE layer on lanes whose stages note that they ran."""

    def __init__(
        self,
        driver: FakeCuda,
        *,
        lanes: int = 1,
        leave_out: Stage | None = None,
        ticks: int = 1,
        take_turns: bool = False,
        wait_s: float = 5.0,
    ) -> None:
        self.driver = driver
        self.ran: list[tuple[int, Stage, int, int]] = []
        self.words = [(cs.StageWords * 2)() for _ in range(lanes)]
        self.chosen = [(ctypes.c_int32 * 2)() for _ in range(lanes)]
        self.next_token = 100
        self.kept: list[object] = []
        places = [
            LanePlaces(words=_aligned(words), chosen=ctypes.addressof(chosen))
            for words, chosen in zip(self.words, self.chosen, strict=True)
        ]
        self.loop = CudaLoop(
            [ModelStages(kinds=(False, True))],
            places,
            [2],
            take_turns=take_turns,
            spin_s=1e-6,
            wait_s=wait_s,
            native=driver.native,
        )
        for lane in range(lanes):
            for stage in STAGES:
                if stage != leave_out:
                    graph = driver.graph(self._body(lane, stage, places[lane]), ticks=ticks)
                    self.loop.add_graph(lane, 0, stage, 0, graph)

    def _body(self, lane: int, stage: Stage, places: LanePlaces) -> Callable[[], None]:
        words = cs.StageWords.from_address(places.words)

        def body() -> None:
            self.ran.append((lane, stage, words.layer, words.done))
            if stage == Stage.HEAD:
                for row in range(words.rows):
                    self.chosen[lane][row] = self.next_token
                    self.next_token += 1

        return body

    def step(self, number: int = 1, **fields: int) -> StepArguments:
        lease = fields.get("lease", 1)
        self.tokens = (ctypes.c_int32 * (2 * lease))()
        self.kept.append(self.tokens)
        arguments = StepArguments(
            step=number, rows=2, wanted=2, lease=1, tokens=ctypes.addressof(self.tokens)
        )
        for name, value in fields.items():
            setattr(arguments, name, value)
        return arguments

    def events(self, units: int = 4000) -> list[tuple[int, int, int]]:
        """What happens in so much progress: kind, step, steps of the lease before."""
        self.driver.run(units)
        found = []
        while (event := self.loop.pop()) is not None:
            found.append((event.kind, event.step, event.first))
        return found

    def close(self) -> None:
        self.loop.close()
        assert self.driver.live == 0
        assert self.driver.violations == []


def _aligned(words: ctypes.Array[cs.StageWords]) -> int:
    return (ctypes.addressof(words) + 31) // 32 * 32


def test_a_step_goes_through_its_stages(driver: FakeCuda) -> None:
    bench = Bench(driver)
    bench.loop.push_step(0, bench.step(7))
    bench.loop.start()
    assert bench.events() == [(DONE, 7, 0)]
    assert [(stage, layer) for _, stage, layer, _ in bench.ran] == [
        (Stage.EMBED, 0),
        (Stage.ATTENTION, 0),
        (Stage.DENSE_FFN, 0),
        (Stage.ATTENTION, 1),
        (Stage.MOE_FFN, 1),
        (Stage.HEAD, 2),
    ]
    assert list(bench.tokens) == [100, 101]
    assert bench.loop.status(0).launches == 6
    bench.close()


def test_a_lease_feeds_tokens_back_until_a_stop_token(driver: FakeCuda) -> None:
    bench = Bench(driver)
    stops, ends = (ctypes.c_int32 * 2)(104, 103), (ctypes.c_uint32 * 2)(1, 2)
    arguments = bench.step(lease=5, stops=ctypes.addressof(stops), stop_ends=ctypes.addressof(ends))
    bench.loop.push_step(0, arguments)
    bench.loop.start()
    # The first row's stop token 104 comes in the third step; 103 is the second row's and comes in
    # the second.
    assert bench.events() == [(TOKENS, 1, 0), (DONE, 1, 1)]
    assert list(bench.tokens) == [100, 101, 102, 103] + 6 * [0]
    assert [done for _, stage, _, done in bench.ran if stage == Stage.HEAD] == [0, 1]
    assert [stage for _, stage, _, _ in bench.ran if stage in STAGES[:2]] == [
        Stage.EMBED,
        Stage.FEED,
    ]
    bench.close()


def test_a_recall_ends_a_lease(driver: FakeCuda) -> None:
    bench = Bench(driver)
    bench.loop.push_step(0, bench.step(lease=1000))
    bench.loop.start()
    assert len(bench.events(200)) > 2
    bench.loop.push_recall(0, 1)
    assert bench.events()[-1][0] == DONE
    bench.close()


def test_the_host_may_look_at_logits(driver: FakeCuda) -> None:
    bench = Bench(driver)
    bench.loop.push_step(0, bench.step(1, for_host=1))
    bench.loop.push_step(0, bench.step(2))
    bench.loop.start()
    assert bench.events() == [(LOGITS, 1, 0)]
    assert bench.loop.status(0).phase == Phase.HOST
    bench.loop.push_resume(0, 1)
    assert bench.events() == [(DONE, 1, 0), (DONE, 2, 0)]
    bench.close()


def test_quiesced_nothing_runs_and_nothing_is_lost(driver: FakeCuda) -> None:
    bench = Bench(driver, lanes=2)
    for lane in range(2):
        bench.loop.push_step(lane, bench.step(lane, lease=30))
    bench.loop.start()
    before = bench.events(300)
    with pytest.raises(CudaLoopError, match="quiesce"):
        bench.loop.add_graph(0, 0, Stage.DISPATCH, 0, driver.graph())
    with bench.loop.quiesced():
        assert [bench.loop.status(lane).phase for lane in range(2)] == [Phase.NEXT, Phase.NEXT]
        ran = len(bench.ran)
        driver.run(1000)
        assert len(bench.ran) == ran
        assert [bench.loop.status(lane).left for lane in range(2)] == [1, 1]
        bench.loop.add_graph(0, 0, Stage.DISPATCH, 0, driver.graph())
    events = before + bench.events(20000)
    for lane in range(2):
        assert [first for _, step, first in events if step == lane] == list(range(30))
    bench.close()


def test_who_gives_up_its_turn_lets_nobody_in(driver: FakeCuda) -> None:
    """While a stage hangs, those who wait for their turn fail; none runs beside it."""
    bench = Bench(driver, lanes=3, take_turns=True, ticks=3000, wait_s=4e-5)
    for lane in range(3):
        bench.loop.push_step(lane, bench.step(lane))
        if lane == 0:
            bench.loop.start()
        driver.run(200)
    with pytest.raises(CudaLoopError, match="waited too long in phase 2"):
        bench.events(3000)
    assert bench.ran == []
    assert [bench.loop.status(lane).launches for lane in range(3)] == [1, 0, 0]
    bench.loop.close()


def test_lanes_that_take_turns_may_share_graphs(driver: FakeCuda) -> None:
    alone = Bench(driver, leave_out=Stage.HEAD)
    with pytest.raises(CudaLoopError, match="cannot share"):
        alone.loop.add_graph(cuda_loop.EVERY_LANE, 0, Stage.HEAD, 0, driver.graph())
    alone.close()
    both = Bench(driver, lanes=2, leave_out=Stage.HEAD, take_turns=True)
    both.loop.add_graph(cuda_loop.EVERY_LANE, 0, Stage.HEAD, 0, driver.graph())
    for lane in range(2):
        both.loop.push_step(lane, both.step(lane))
    both.loop.start()
    assert sorted(both.events()) == [(DONE, 0, 0), (DONE, 1, 0)]
    both.close()


@pytest.mark.parametrize(
    ("nodes", "empty", "message"),
    [
        ([(Node.HOST, None)], False, "'host'"),
        ([(Node.ALLOCATION, None)], False, "'allocation'"),
        ([], True, "empty"),
        ([(Node.EMPTY, None)], True, "'empty'"),
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_a_graph_that_no_device_launches_is_refused(
    driver: FakeCuda, nodes: list[tuple[Node, None]], empty: bool, message: str, nested: bool
) -> None:
    bench = Bench(driver, leave_out=Stage.HEAD)
    graph = driver.graph(nodes=nodes, empty=empty)
    if nested:
        graph = driver.graph(nodes=[(Node.CHILD_GRAPH, graph)], empty=True)
    with pytest.raises(CudaLoopError, match=f"head of model 0, bucket 0.*{message}"):
        bench.loop.add_graph(0, 0, Stage.HEAD, 0, graph)
    bench.close()  # the driver itself was not asked: no violation


@pytest.mark.parametrize(
    ("knob", "violation", "error"),
    [
        (Knob.DROP_UPLOAD, "not uploaded", "was not launched: cudaErrorInvalidValue"),
        (Knob.DROP_DEVICE_LAUNCH, "not made for the device", "cudaErrorInvalidValue"),
        (Knob.RELAUNCH_TWICE, "second pending launch of itself", "could not launch itself again"),
        (Knob.FLOOD_TAILS, "more than 255", "cudaErrorLaunchPendingCountExceeded"),
    ],
)
def test_a_launch_beyond_the_limits_fails_the_lane(
    driver: FakeCuda, knob: Knob, violation: str, error: str
) -> None:
    """The fake driver notices what is documented not to work, and the host hears of it."""
    driver.turn(knob)
    bench = Bench(driver)
    bench.loop.push_step(0, bench.step())
    bench.loop.start()
    with pytest.raises(CudaLoopError, match=error):
        bench.events()
    assert any(violation in text for text in driver.violations)
    with pytest.raises(CudaLoopError, match=error):  # it stays so
        bench.loop.pop()
    bench.loop.close()
    assert driver.live == 0


def test_a_refused_stage_fails_its_lane_alone(driver: FakeCuda) -> None:
    bench = Bench(driver, lanes=2, take_turns=True)
    for lane in range(2):
        bench.loop.push_step(lane, bench.step(lane, lease=3))
    driver.fail_tail_launch(fake_cuda_graphs.INVALID_VALUE)
    bench.loop.start()
    driver.run(20000)
    kinds, errors = [], 0
    for _ in range(10):
        try:
            event = bench.loop.pop()
        except CudaLoopError:
            errors += 1
        else:
            assert event is not None
            kinds.append(event.kind)
    assert kinds == [TOKENS, TOKENS, DONE]
    assert errors == 7
    bench.loop.close()


@pytest.mark.parametrize(
    ("call", "successes"),
    [("host_alloc", 0), ("stream_query", 0), ("stream_query", 3), ("launch", 0)]
    + [("device_alloc", n) for n in range(6)]
    + [("stream_create", n) for n in range(2)]
    + [("copy_to_device", n) for n in range(6)]
    + [("scheduler_graph", n) for n in range(2)]
    + [("instantiate", n) for n in range(8)],
)
def test_nothing_is_left_when_a_call_fails(driver: FakeCuda, call: str, successes: int) -> None:
    driver.fail_call(call, successes)
    bench = None
    with pytest.raises(CudaLoopError, match="cudaErrorInvalidValue"):
        bench = Bench(driver, lanes=2)
        bench.loop.start()
    if bench is not None:
        bench.loop.close()
    driver.run(100)
    assert driver.violations == [] or driver.live == 0
    if bench is not None or call != "instantiate":
        assert driver.live == 0


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model", 1),
        ("bucket", 1),
        ("rows", 0),
        ("rows", 3),
        ("wanted", 3),
        ("lease", 0),
        ("for_host", 2),
    ],
)
def test_bad_arguments_fail_the_lane(driver: FakeCuda, field: str, value: int) -> None:
    bench = Bench(driver)
    bench.loop.push_step(0, bench.step(**{field: value}))
    bench.loop.start()
    if (field, value) == ("for_host", 2):  # any other than 0 asks for the logits
        assert bench.events() == [(LOGITS, 1, 0)]
    else:
        with pytest.raises(CudaLoopError, match=f"the step's {field} contradicts"):
            bench.events()
        assert bench.ran == []
    bench.loop.close()


def test_a_lease_needs_a_token_per_row(driver: FakeCuda) -> None:
    bench = Bench(driver)
    bench.loop.push_step(0, bench.step(wanted=1, lease=2))
    bench.loop.start()
    with pytest.raises(CudaLoopError, match="the step's lease contradicts"):
        bench.events()
    bench.loop.close()


def test_a_missing_graph_is_named(driver: FakeCuda) -> None:
    bench = Bench(driver, leave_out=Stage.MOE_FFN)
    bench.loop.push_step(0, bench.step())
    bench.loop.start()
    with pytest.raises(CudaLoopError, match="layer 1: there is no graph for stage 4"):
        bench.events()
    bench.loop.close()


def test_steps_beyond_a_lanes_room_are_refused(driver: FakeCuda) -> None:
    bench = Bench(driver)
    for number in range(cuda_loop.MAX_HELD):
        bench.loop.push_step(0, bench.step(number))
    with pytest.raises(CudaLoopError, match="8 steps already"):
        bench.loop.push_step(0, bench.step(8))
    bench.loop.start()
    assert [step for _, step, _ in bench.events()] == list(range(8))
    bench.loop.push_step(0, bench.step(8))
    assert bench.events() == [(DONE, 8, 0)]
    bench.close()


def test_a_host_that_never_resumes_fails_the_lane(driver: FakeCuda) -> None:
    bench = Bench(driver, wait_s=1e-4)
    bench.loop.push_step(0, bench.step(for_host=1))
    bench.loop.start()
    with pytest.raises(CudaLoopError, match="waited too long in phase 5"):
        for _ in range(10):
            bench.events()
    bench.loop.close()


def test_a_stage_that_never_ends_is_noticed(driver: FakeCuda) -> None:
    bench = Bench(driver, ticks=10**9, wait_s=0.2)
    bench.loop.push_step(0, bench.step(3))
    bench.loop.start()
    with pytest.raises(CudaLoopError, match="not come back from stage 0, layer 0, step 3"):
        bench.loop.wait(20.0)
    with pytest.raises(CudaLoopError, match="lane 0 does not leave"):
        bench.loop.quiesce(0.05)
    driver.fault_stage()  # ends it


def test_a_stage_that_faults_is_noticed(driver: FakeCuda) -> None:
    bench = Bench(driver)
    bench.loop.push_step(0, bench.step(lease=10**6))
    bench.loop.start()
    driver.run(3)
    driver.fault_stage()
    with pytest.raises(CudaLoopError, match="cudaErrorIllegalAddress"):
        for _ in range(3):
            bench.loop.wait(1.0)
            bench.events(0)


def test_what_contradicts_itself_is_refused_at_once(driver: FakeCuda) -> None:
    place, model = LanePlaces(words=32, chosen=32), ModelStages(kinds=(True,))
    for models, lanes, buckets, message in (
        ([model], [], [1], "a lane"),
        ([], [place], [1], "a model"),
        ([model], [place], [], "a row bucket"),
        ([model], [place], [2, 2], "ascend"),
        ([ModelStages(kinds=())], [place], [1], "no layer"),
        ([ModelStages(kinds=(True,), local=False)], [place], [1], "nowhere"),
        ([ModelStages(kinds=(True,), links=(0,))], [place], [1], "lane 0 does not have"),
        ([model], [LanePlaces(words=48, chosen=32)], [1], "aligned"),
        ([model], [LanePlaces(words=32, chosen=0)], [1], "chosen"),
        ([model], [LanePlaces(words=32, chosen=0, serves=True)], [1], "serves no link"),
    ):
        with pytest.raises(CudaLoopError, match=message):
            CudaLoop(models, lanes, buckets, native=driver.native)
    assert driver.live == 0


def test_a_library_of_other_structures_is_refused(
    fake_library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Longer(ctypes.Structure):
        _fields_ = (*cs.StepArguments._fields_, ("more", ctypes.c_uint64))

    mirrored = tuple(Longer if one is cs.StepArguments else one for one in cs.MIRRORED)
    monkeypatch.setattr(cs, "MIRRORED", mirrored)
    with pytest.raises(ImportError, match="64 bytes for Longer"):
        cuda_loop.load(fake_library)


def test_structures_and_names_are_the_headers(tmp_path: Path) -> None:
    """Every field at the header's offset, every enumerator with the header's value."""
    names = {"Command": "crosspool::Command", "Event": "crosspool::Event"}
    names["LinkMemory"] = "crosspool::LinkMemory"
    lines = ['#include "cuda/loop.h"', "using namespace crosspool::gpu;"]
    for structure in cs.MIRRORED:
        name = names.get(structure.__name__, structure.__name__)
        lines.append(f"static_assert(sizeof({name}) == {ctypes.sizeof(structure)});")
        for field, _ in structure._fields_:
            if not field.startswith("_"):
                offset = getattr(structure, field).offset
                lines.append(f"static_assert(offsetof({name}, {field}) == {offset});")
    spelt = {"FFN": "FFN", "MOE": "MoE"}
    for enumeration in (Stage, Phase, cuda_loop.Fault, cuda_loop.BadArgument):
        for member in enumeration:
            words = [spelt.get(word, word.capitalize()) for word in member.name.split("_")]
            value = f"static_cast<int>({enumeration.__name__}::k{''.join(words)})"
            lines.append(f"static_assert({value} == {member.value});")
    lines.append(f"static_assert(kMaxHeld == {cuda_loop.MAX_HELD});")
    source = tmp_path / "layout.cpp"
    source.write_text("\n".join(lines) + "\n")
    native = fake_cuda_graphs.NATIVE
    command = [fake_cuda_graphs.COMPILER, "-std=c++20", "-fsyntax-only", source]
    subprocess.run([*command, "-I", native, "-I", native / "include"], check=True, timeout=60)
