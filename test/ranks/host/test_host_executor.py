"""The order in which the host loop works, with parts whose arithmetic can be done in the head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import pytest
import torch
from crosspool.models.spec import DenseFFN, GQASpec, ModelSpec, RopeSpec
from crosspool.observability.trace import LaneTrace
from crosspool.ranks.host import lm_head
from crosspool.ranks.host.attention_rank import AttentionRank
from crosspool.ranks.host.executor import HostLoop
from crosspool.ranks.host.ffn_rank import FFNRank
from crosspool.transport.data_path import DispatchHeader, LaneError, LocalLink
from crosspool.transport.messages import Logprobs, Open, Release, Row, Sampling, Step, StepResult

VOCAB = 32
LAYERS = (2, 5, 2)


def spec(layers: int) -> ModelSpec:
    return ModelSpec(
        family="none",
        hidden=VOCAB,
        vocab=VOCAB,
        context=64,
        dtype="float32",
        norm_eps=1e-6,
        tied_embeddings=True,
        attention=GQASpec(
            q_heads=1, kv_heads=1, head_dim=1, scale=1.0, rope=RopeSpec(dim=1, interleaved=False)
        ),
        ffn=(DenseFFN(intermediate=1),) * layers,
        eos_token_ids=(0,),
    )


class OneHot:
    """Both parts at once: tokens are one-hot rows, every layer moves them on by one token, so the
    next token is token + layers."""

    def __init__(self, model: int, log: list[tuple[str, int, int]]) -> None:
        self.model = model
        self.log = log

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.one_hot(token_ids, VOCAB).float()

    def attend(
        self, layer: int, residual: torch.Tensor, _batch: Any, _kv: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.log.append(("attention", self.model, layer))
        return torch.zeros_like(residual), residual

    def forward(self, layer: int, x: torch.Tensor) -> torch.Tensor:
        self.log.append(("ffn", self.model, layer))
        return x.roll(1, dims=1)

    def logits(self, rows: torch.Tensor) -> torch.Tensor:
        self.log.append(("lm_head", self.model, len(rows)))
        return rows * 10


@dataclass
class Chunks:
    """A virtualizer that only counts."""

    log: list[tuple[str, int, int]]
    mapped: set[tuple[int, int]] = field(default_factory=set)
    free_bytes: int = 0

    def map(self, model: int, chunks: Sequence[int]) -> None:
        self.log.append(("map", model, len(chunks)))
        self.mapped |= {(model, chunk) for chunk in chunks}

    def unmap(self, model: int, chunks: Sequence[int]) -> None:
        self.log.append(("unmap", model, len(chunks)))
        self.mapped -= {(model, chunk) for chunk in chunks}


class Device:
    """Both ranks on one device, ``lanes`` lanes."""

    def __init__(self, lanes: int = 2) -> None:
        self.log: list[tuple[str, int, int]] = []
        specs = {model: spec(layers) for model, layers in enumerate(LAYERS)}
        parts: list[Any] = [OneHot(model, self.log) for model in range(len(LAYERS))]
        chunks: Any = Chunks(self.log)
        kv = {model: torch.empty(8, 1, 4, 1) for model in specs}
        self.trace = LaneTrace()
        self.attention = AttentionRank(0, specs, dict(enumerate(parts)), chunks, kv)
        ffn = FFNRank(0, specs, dict(enumerate(parts)), set(specs), self.trace)
        links = [LocalLink(0, lane, 0) for lane in range(lanes)]
        ffn.links = links
        self.loop = HostLoop(
            self.attention,
            [[link] for link in links],
            ffn,
            ffn_ranks=dict.fromkeys(specs, (0,)),
            doorbell=None,
            serves_peers=False,
            trace=self.trace,
        )

    def run(self, steps: int) -> list[StepResult]:
        results: list[StepResult] = []
        for _ in range(1000):
            if len(results) >= steps:
                return results
            results += self.loop.run(0.0)
        raise AssertionError(f"{len(results)} of {steps} steps ended")


def step(number: int, model: int, tokens: Sequence[int] = (3,), **logprobs: Any) -> Step:
    """The whole life of a request: opened, one chunk of prompt, a token sampled."""
    return Step(
        step=number,
        model=model,
        map_chunks=[number],
        opens=[
            Open(
                request=number,
                prompt_len=len(tokens),
                sampling=Sampling(temperature=0.0),
                logprobs=Logprobs(**logprobs),
            )
        ],
        rows=[Row(request=number, start=0, tokens=list(tokens), pages=[0, 1], sample=True)],
    )


def test_lanes_take_turns_part_by_part() -> None:
    device = Device()
    device.loop.submit(step(1, 0))
    device.loop.submit(step(2, 1))
    results = device.run(2)
    assert [(r.step, r.rows[0].token) for r in results] == [(1, 3 + 2), (2, 3 + 5)]
    parts = [entry for entry in device.log if entry[0] in ("attention", "ffn")]
    together = parts[: 2 * 2 * LAYERS[0]]
    # While both lanes have work, neither gets two parts ahead of the other.
    for i in range(0, len(together), 2):
        assert {model for _, model, _ in together[i : i + 2]} == {0, 1}, together
    for model, layers in enumerate(LAYERS[:2]):
        own = [(what, layer) for what, m, layer in parts if m == model]
        assert own == [(w, layer) for layer in range(layers) for w in ("attention", "ffn")]


def test_a_batch_that_ends_is_replaced_at_once() -> None:
    device = Device()
    device.trace.start()
    for number, model in ((1, 0), (2, 1), (3, 2)):
        device.loop.submit(step(number, model))
    assert device.run(3)[0].step == 1
    events = [e for e in device.trace.stop() if e.role == "attention"]
    lanes = {e.step: e.lane for e in events}
    assert lanes[3] == lanes[1] != lanes[2]
    order = [e.step for e in events]
    assert order.index(3) < len(order) - 1 - order[::-1].index(2)


def test_a_batch_goes_to_its_models_ffn_ranks_only() -> None:
    """One model on FFN rank 0, one on rank 1, one on both, whose partial sums make a double; lanes
    change between them, so each link is left out by some batches and used by the next."""
    device = Device()
    ffn_ranks = [[0], [1], [0, 1]]
    links = [[LocalLink(0, lane, rank) for rank in (0, 1)] for lane in (0, 1)]
    specs = {model: spec(layers) for model, layers in enumerate(LAYERS)}
    loops = []
    logs: list[list[tuple[str, int, int]]] = [[], []]
    for rank, log in enumerate(logs):
        parts: Any = {m: OneHot(m, log) for m, ranks in enumerate(ffn_ranks) if rank in ranks}
        ffn = FFNRank(rank, specs, parts, set(parts), LaneTrace())
        ffn.links = [of_lane[rank] for of_lane in links]
        loops.append(
            HostLoop(
                *((device.attention, links) if rank == 0 else (None, [])),
                ffn,
                ffn_ranks=dict(enumerate(ffn_ranks)),
                doorbell=None,
                serves_peers=rank == 1,
                trace=LaneTrace(),
            )
        )
    for number in range(12):
        loops[0].submit(step(number, number % 3))
    results: list[StepResult] = []
    for _ in range(1000):
        for loop in loops:
            results += loop.run(0.0)
    assert {r.step: r.rows[0].token for r in results} == {n: 3 + LAYERS[n % 3] for n in range(12)}
    for rank, log in enumerate(logs):
        own = [m for m, ranks in enumerate(ffn_ranks) if rank in ranks]
        assert {model for _, model, _ in log} == set(own)
        dispatches = sum(of_lane[rank].counters.dispatches for of_lane in links)
        assert dispatches == len(log) == 4 * sum(LAYERS[model] for model in own)


def test_a_dispatch_of_a_model_that_lies_elsewhere_is_an_error() -> None:
    link = LocalLink(0, 0, 1)
    parts: Any = {1: OneHot(1, [])}
    ffn = FFNRank(1, dict.fromkeys(range(2), spec(1)), parts, {1}, LaneTrace())
    link.dispatch(DispatchHeader(epoch=0, model=0, layer=0, rows=1), torch.zeros(1, VOCAB))
    with pytest.raises(LaneError, match="FFN rank 1 holds nothing of model 0"):
        ffn.serve(link)


def test_a_dispatch_of_a_model_that_has_yet_to_come_waits() -> None:
    link = LocalLink(0, 0, 1)
    specs, models = {0: spec(1)}, {0}
    parts: Any = {0: OneHot(0, []), 7: OneHot(7, [])}
    ffn = FFNRank(1, specs, parts, models, LaneTrace())
    link.dispatch(DispatchHeader(epoch=0, model=7, layer=0, rows=1), torch.zeros(1, VOCAB))
    assert not ffn.serve(link)
    specs[7] = spec(1)
    models.add(7)
    assert ffn.serve(link)


def test_a_dispatch_of_a_model_that_has_left_is_refused() -> None:
    """An attention rank that died has left it behind, and its successor needs the lane."""
    link = LocalLink(0, 0, 1)
    specs, parts = {0: spec(1), 7: spec(1)}, {0: OneHot(0, []), 7: OneHot(7, [])}
    ffn = FFNRank(1, specs, cast(Any, parts), {0, 7}, LaneTrace())
    link.dispatch(DispatchHeader(epoch=0, model=7, layer=0, rows=1), torch.zeros(1, VOCAB))
    del specs[7], parts[7]
    assert ffn.serve(link) and not ffn.serve(link)
    assert link.ready() and link.take_refusal() and link.free


def test_dispatches_that_are_left_of_a_model_that_falls_asleep_are_refused() -> None:
    links = [LocalLink(0, lane, 1) for lane in range(3)]
    parts: Any = {0: OneHot(0, []), 7: OneHot(7, [])}
    ffn = FFNRank(1, dict.fromkeys(parts, spec(1)), parts, set(parts), LaneTrace())
    ffn.links = links
    for link, model in zip(links, (7, 0), strict=False):
        link.dispatch(DispatchHeader(epoch=0, model=model, layer=0, rows=1), torch.zeros(1, VOCAB))
    ffn.refuse_left(7)
    assert links[0].ready() and links[0].take_refusal() and links[0].free
    assert not links[1].ready() and ffn.serve(links[1]), "another model's waits for its turn"


def test_a_step_that_one_of_its_ffn_ranks_refuses_ends_without_rows() -> None:
    """The other rank replies; the lane takes the next step."""
    device = Device(lanes=1)
    links = [LocalLink(0, 0, rank) for rank in (0, 1)]
    specs = {0: spec(LAYERS[0])}
    here: dict[int, Any] = {}
    ffn = [
        FFNRank(rank, specs, parts, {0}, LaneTrace())
        for rank, parts in enumerate(({0: cast(Any, OneHot(0, []))}, here))
    ]
    loop = HostLoop(
        *(device.attention, [links], None),
        ffn_ranks={0: (0, 1)},
        doorbell=None,
        serves_peers=False,
        trace=LaneTrace(),
    )

    def results() -> list[StepResult]:
        found = []
        for _ in range(20):
            found += loop.run(0.0)
            for rank, link in zip(ffn, links, strict=True):
                rank.serve(link)
        return found

    loop.submit(step(1, 0))
    assert results() == []
    ffn[1].refusing.add(0)
    assert results() == [StepResult(step=1, rows=[], refused=True)]
    assert not loop.has(0)
    ffn[1].refusing.clear()
    here[0] = OneHot(0, [])
    loop.submit(step(2, 0))
    assert [r.step for r in results() if not r.refused] == [2]


def test_chunks_of_a_model_that_sleeps_are_given_back_at_once() -> None:
    """Others need them while it sleeps. What comes behind a step that waits for its weights waits
    with it."""
    device = Device()
    device.loop.submit(step(1, 0))
    device.run(1)
    device.loop.hold(0)
    device.loop.submit(Release(model=0, requests=[1], unmap_chunks=[1]))
    assert ("unmap", 0, 1) in device.log
    device.loop.submit(step(2, 0))
    device.loop.submit(Release(model=0, requests=[2], unmap_chunks=[2]))
    assert device.log.count(("unmap", 0, 1)) == 1 and device.loop.has(0)
    device.loop.resume(0)
    device.run(1)
    device.loop.run(0.0)
    assert device.log.count(("unmap", 0, 1)) == 2 and not device.loop.has(0)
    device.loop.hold(0)
    device.loop.forget(0)


def test_steps_wait_for_a_lane_in_order() -> None:
    device = Device(lanes=1)
    for number in (1, 2, 3):
        device.loop.submit(step(number, number % 2))
    assert [r.step for r in device.run(3)] == [1, 2, 3]
    assert [model for what, model, _ in device.log if what == "map"] == [1, 0, 1]
    assert device.log.index(("map", 0, 1)) > device.log.index(("lm_head", 1, 1))


def test_a_release_waits_for_its_model_and_holds_up_what_follows() -> None:
    device = Device()
    device.loop.submit(step(1, 1))
    device.loop.submit(Release(model=1, requests=[1], unmap_chunks=[1]))
    device.loop.submit(step(2, 0))
    assert [r.step for r in device.run(2)] == [1, 2]
    unmap = device.log.index(("unmap", 1, 1))
    assert device.log.index(("lm_head", 1, 1)) < unmap < device.log.index(("map", 0, 1))
    assert device.attention.requests == 1


def test_a_release_of_another_model_does_not_wait() -> None:
    device = Device()
    device.loop.submit(step(1, 0))
    device.run(1)
    device.loop.submit(step(2, 1))
    device.loop.submit(Release(model=0, requests=[1], unmap_chunks=[1]))
    assert device.log[-1] == ("unmap", 0, 1)


def test_quiet_and_drained() -> None:
    device = Device()
    assert device.loop.quiet
    assert device.loop.drained
    device.loop.submit(step(1, 0))
    assert not device.loop.quiet
    assert not device.loop.drained
    device.run(1)
    assert device.loop.quiet


def test_long_prompt_logprobs_let_the_other_lane_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lm_head, "LOGITS_BYTES", 4 * VOCAB * 2)
    device = Device()
    device.loop.submit(step(1, 0, tokens=[5, 7, 9, 4, 6, 20, 22], prompt_start=1))
    device.loop.submit(step(2, 1))
    long, _ = sorted(device.run(2), key=lambda r: r.step)
    heads = [
        i for i, (what, model, rows) in enumerate(device.log) if (what, model) == ("lm_head", 0)
    ]
    assert [device.log[i][2] for i in heads] == [2, 2, 2, 1]
    assert any(model == 1 for _, model, _ in device.log[heads[0] : heads[-1]])
    row = long.rows[0]
    assert row.token == 24
    assert [p.token for p in row.prompt] == [7, 9, 4, 6, 20, 22]
    # The model expects token + 2, with a logit of 10 among zeros.
    right = torch.log_softmax(torch.tensor([10.0] + [0.0] * (VOCAB - 1)), 0)[0].item()
    expected = [right, right, right - 10, right, right - 10, right]
    assert [p.logprob for p in row.prompt] == pytest.approx(expected, abs=1e-5)


def test_partial_sums_are_added_in_float32() -> None:
    device = Device()
    batch = device.attention.begin(step(1, 0))
    batch.residual = torch.zeros(1, VOCAB, dtype=torch.bfloat16)
    partials = [torch.full((1, VOCAB), value, dtype=torch.bfloat16) for value in (256.0, 1.0, 1.0)]
    device.attention.combine(batch, partials)
    assert batch.residual.dtype == torch.bfloat16
    assert batch.residual[0, 0].item() == 258.0  # 256 + 1 + 1 in bfloat16 stays 256


def test_a_step_that_contradicts_the_page_table_is_refused() -> None:
    device = Device()
    with pytest.raises(RuntimeError, match="request 1 has pages for 8 tokens, not for 9"):
        device.loop.submit(step(1, 0, tokens=list(range(9))))


def test_waits_on_the_doorbell_when_nothing_is_ready() -> None:
    waited: list[float] = []

    class Doorbell:
        def wait(self, timeout: float) -> bool:
            waited.append(timeout)
            return False

    class Silent(LocalLink):
        """A peer on another device that has not replied yet."""

        def poll(self) -> None:
            return None

    device = Device(lanes=1)
    link = Silent(0, 0, 0)
    loop = HostLoop(
        device.attention,
        [[link]],
        None,
        ffn_ranks=dict.fromkeys(range(len(LAYERS)), (0,)),
        doorbell=Doorbell(),
        serves_peers=False,
        trace=LaneTrace(),
    )
    loop.submit(step(1, 0))
    for _ in range(3):
        assert loop.run(0.25) == []
    assert waited == [0.25, 0.25]
    assert device.log == [("map", 0, 1), ("attention", 0, 0)]
