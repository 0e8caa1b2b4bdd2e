"""Random traffic over three models and two attention ranks, with aborts at any time. The simulated
ranks check every message; here: every request ends once, with the tokens it should have, and
nothing is left behind."""

from random import Random
from typing import Any, ClassVar

import pytest
from crosspool.kvpool.bounds import Bounds
from crosspool.scheduler.request import GenerateRequest, Grammar
from crosspool.transport.messages import Logprobs
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from simulation import Simulation, ToyMatcher, deployment, expected_tokens, request, spec

GRAMMAR = Grammar(kind="regex", source="[0-9]*")

shapes = st.tuples(
    st.integers(0, 2),  # model
    st.integers(1, 120),  # prompt tokens
    st.integers(0, 3),  # prompts of one family begin alike; 0: like no other
    st.one_of(st.none(), st.integers(0, 80)),  # max_new_tokens
    st.booleans(),  # stream
    st.sampled_from(["plain", "plain", "stop", "logprobs", "grammar"]),
)


class Traffic(RuleBasedStateMachine):
    fields: ClassVar[dict[str, Any]] = {}

    def __init__(self) -> None:
        super().__init__()
        d = deployment(
            3,
            ranks=2,
            kv_pool_bytes=2 * 24 * 4096,
            max_queued_requests=60,
            queue_timeout=900.0,
            **self.fields,
        )
        specs = [spec(), spec(context=300, head_dim=12), spec(context=150, layers=10, head_dim=14)]
        self.sim = Simulation(d, specs)
        self.bounds = Bounds.of(d)
        self.requests: dict[str, GenerateRequest] = {}

    @rule(burst=st.lists(shapes, min_size=1, max_size=12))
    def arrive(self, burst):
        for model, length, family, max_new_tokens, stream, kind in burst:
            rid = f"{len(self.requests) % 7}-{len(self.requests)}"
            self.requests[rid] = request(
                rid,
                self.prompt(length, family),
                max_new_tokens,
                model=model,
                stream=stream,
                stop_strings=("ab", "\x00") if kind == "stop" else (),
                logprobs=Logprobs(output=True, prompt_start=length // 2)
                if kind == "logprobs"
                else None,
                grammar=GRAMMAR if kind == "grammar" else None,
            )
        self.sim.add(*list(self.requests.values())[-len(burst) :])

    def prompt(self, length, family):
        number = len(self.requests)
        if not family:
            return [(number * 7 + 3 * i) % 256 for i in range(length)]
        alike = length - number % 12
        return [(family if i < alike else number + i) % 256 for i in range(length)]

    @rule(index=st.integers(0, 10**6), more=st.integers(1, 20))
    def follow_up(self, index, more):
        """The next turn of a conversation."""
        ended = [r for r in self.requests.values() if self.sim.finished(r.rid)]
        if not ended:
            return
        last = ended[index % len(ended)]
        rid = f"{len(self.requests) % 7}-{len(self.requests)}"
        prompt = last.input_ids + self.sim.tokens(last.rid) + [5] * more
        if len(prompt) < self.sim.specs[last.model].context:
            self.requests[rid] = request(rid, prompt, more, model=last.model)
            self.sim.add(self.requests[rid])

    @rule(model=st.none() | st.integers(0, 2))
    def flush(self, model):
        self.sim.core.flush(model)
        self.sim.schedule()

    @rule(steps=st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), max_size=60))
    def progress(self, steps):
        for rank, index in steps:
            if self.sim.ranks[rank].steps:
                self.sim.now += 1
                self.sim.answer(rank, index)

    @rule(prefix=st.integers(0, 6), model=st.one_of(st.none(), st.integers(0, 2)))
    def abort(self, prefix, model):
        for rid in self.requests:
            if rid.startswith(f"{prefix}-"):
                self.sim.core.abort(rid, model)
        self.sim.schedule()

    @rule()
    def compile(self):
        for grammars in self.sim.grammars:
            for future in grammars.futures:
                if not future.done():
                    future.set_result(ToyMatcher([set(range(48, 58))] * 30))
        self.sim.schedule()

    @rule(seconds=st.integers(0, 400))
    def wait(self, seconds):
        self.sim.now += seconds
        self.sim.schedule()

    @invariant()
    def the_books_agree(self):
        snapshot = self.sim.snapshot()
        for rank, simulated in zip(snapshot["ranks"], self.sim.ranks, strict=True):
            used = rank["promised_chunks"] + rank["cached_chunks"]
            assert rank["free_chunks"] + used == rank["budget_chunks"]
            assert [m["mapped_chunks"] for m in rank["models"]] == [
                len(chunks) for chunks in simulated.mapped.values()
            ]
            assert rank["steps_in_flight"] == len(simulated.steps)
            promised = {m["model"]: m["promised_chunks"] for m in rank["models"]}
            assert self.bounds.allow(promised)
            assert rank["steps_in_flight"] or not rank["running"], "everybody is stuck"
        unfinished = sum(not self.sim.finished(rid) for rid in self.requests)
        assert sum(m["waiting"] + m["running"] for m in snapshot["models"]) == unfinished

    def teardown(self):
        self.compile()
        self.sim.run()
        self.sim.assert_empty()
        ended = 0
        for rid, r in self.requests.items():
            assert self.sim.finished(rid)
            assert sum(output.finish is not None for output in self.sim.outputs[rid]) == 1
            ended += self.right(r)
        counters = self.sim.snapshot()["models"]
        assert sum(sum(m["finished"].values()) for m in counters) == ended
        assert sum(sum(m["aborted"].values()) for m in counters) == len(self.requests) - ended

    def right(self, r: GenerateRequest) -> bool:
        """Whether ``r`` ended by itself; its tokens are right either way."""
        finish, tokens = self.sim.finish(r.rid), self.sim.tokens(r.rid)
        ended = finish.kind != "abort"
        assert ended or finish.status in (429, 499)
        if not ended and finish.status == 429:
            assert 1 <= finish.retry_after <= 900
        if r.grammar is not None:
            assert all(48 <= token < 58 for token in tokens)
            return ended
        expected = expected_tokens(r, self.sim.specs[r.model])
        if not ended or r.stop.stop_strings:
            expected = expected[: len(tokens)]
        assert tokens == expected
        if isinstance(finish.matched, str):
            assert finish.matched in self.sim.text(r.rid)
        if ended and r.logprobs.output:
            outputs = self.sim.outputs[r.rid]
            assert [p.token for o in outputs for p in o.output_logprobs] == tokens
            prompt = [p.token for p in outputs[0].prompt_logprobs]
            assert prompt == r.input_ids[r.logprobs.prompt_start :]
        return ended


class GrowingTraffic(Traffic):
    fields: ClassVar = {"promise": "growth", "growth_tokens": 8}


class BoundedTraffic(Traffic):
    """Model 0 has a floor, model 1 a ceiling, model 2 both."""

    fields: ClassVar = {
        "bounds": {
            0: {"kv_floor_bytes": 2 * 3 * 4096},
            1: {"kv_ceiling_bytes": 2 * 7 * 4096},
            2: {"kv_floor_bytes": 2 * 3 * 4096, "kv_ceiling_bytes": 2 * 21 * 4096},
        },
    }


class BoundedGrowingTraffic(BoundedTraffic):
    fields: ClassVar = {**BoundedTraffic.fields, **GrowingTraffic.fields}


class LeasedTraffic(Traffic):
    """Traffic on devices that make several decode steps of one message."""

    fields: ClassVar = {"loop": "resident", "lease_steps": 7}


class LeasedGrowingTraffic(BoundedGrowingTraffic):
    fields: ClassVar = {**BoundedGrowingTraffic.fields, **LeasedTraffic.fields}


KINDS = (
    Traffic,
    GrowingTraffic,
    BoundedTraffic,
    BoundedGrowingTraffic,
    LeasedTraffic,
    LeasedGrowingTraffic,
)
TestTraffic = Traffic.TestCase
TestGrowingTraffic = GrowingTraffic.TestCase
TestBoundedGrowingTraffic = BoundedGrowingTraffic.TestCase
TestLeasedTraffic = LeasedTraffic.TestCase
TestTraffic.settings = settings(
    derandomize=True, max_examples=15, stateful_step_count=40, deadline=None
)
TestGrowingTraffic.settings = TestBoundedGrowingTraffic.settings = TestTraffic.settings
TestLeasedTraffic.settings = TestTraffic.settings


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(2))
def test_hundreds_of_requests(kind, seed):
    random = Random(seed)
    traffic = kind()
    for _ in range(60):
        traffic.arrive(
            burst=[
                (
                    random.choice([0, 0, 1, 2]),
                    random.randint(1, 120),
                    random.randrange(4),
                    random.choice([None, 0, random.randint(1, 80)]),
                    random.random() < 0.5,
                    random.choice(["plain", "stop", "logprobs", "grammar"]),
                )
                for _ in range(random.randint(1, 10))
            ]
        )
        traffic.progress(steps=[(random.randrange(2), random.randrange(2)) for _ in range(50)])
        if random.random() < 0.2:
            traffic.abort(prefix=random.randrange(7), model=random.choice([None, 0, 1, 2]))
        for _ in range(3):
            traffic.follow_up(index=random.randrange(10**6), more=random.randint(1, 20))
        if random.random() < 0.5:
            traffic.compile()
        if random.random() < 0.05:
            traffic.flush(model=random.choice([None, 0, 1, 2]))
        traffic.the_books_agree()
    traffic.teardown()
    counters = traffic.sim.snapshot()["models"]
    assert len(traffic.requests) >= 250
    assert sum(sum(m["finished"].values()) for m in counters) >= 150
    assert sum(m["aborted"].get("499", 0) for m in counters) >= 20
    assert sum(m["prefix_hits"] for m in counters) >= 50
    assert sum(m["evicted_pages"] for m in counters) >= 500
    assert (sum(m["pauses"] for m in counters) > 0) == ("promise" in kind.fields)
    leased = sum(rank.leased_steps for rank in traffic.sim.ranks)
    assert (leased > 500) == ("lease_steps" in kind.fields)
