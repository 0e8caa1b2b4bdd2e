"""How much of the KV pool is promised to whom: growing promises, floors and ceilings, and what a
refused request is told."""

from random import Random
from typing import get_args, get_type_hints

import pytest
from crosspool.config.deployment import Deployment
from crosspool.kvpool.bounds import Bounds
from crosspool.scheduler.promise_rules import PROMISE_RULES
from crosspool.transport.messages import Logprobs
from simulation import Simulation, deployment, expected_tokens, request, spec


def never_ending(tokens):
    return 7


def growing(models=1, **fields):
    settings = {"promise": "growth", "growth_tokens": 8, "max_running_requests": 64}
    return deployment(models, **(settings | fields))


def model(sim, index=0):
    return sim.snapshot()["models"][index]


def test_every_rule_that_a_user_can_name_is_there():
    assert set(PROMISE_RULES) == set(get_args(get_type_hints(Deployment)["promise"]))


# --- promises that grow


def test_growth_promises_the_prompt_and_some_and_more_as_the_request_grows():
    sim = Simulation(growing(prefix_cache=False, page_size=1), [spec()], never_ending)
    sim.add(request("r", 20, 100))
    (seq,) = sim.core._ranks[0].running[0].values()
    assert len(seq.pages) == 28
    held = set()
    while not sim.finished("r"):
        held.add(len(seq.pages))
        sim.answer()
    # a page holds one token; the last token needs none of its own
    assert sorted(held) == [*range(28, 120, 9), 120]
    assert len(sim.tokens("r")) == 100 and model(sim)["pauses"] == 0
    sim.assert_empty()


@pytest.mark.parametrize("promise", ["worst_case", "growth"])
def test_growth_lets_more_in_where_answers_end_early(promise):
    """Every request asks for 400 tokens and ends after 24."""
    d = growing(kv_pool_bytes=16 * 4096, promise=promise)
    sim = Simulation(d, [spec(context=1000)], lambda tokens: 300 if len(tokens) > 60 else 7)
    sim.add(*(request(f"r{i}", 37, 400) for i in range(30)))
    most = model(sim)["running"]
    steps = 0
    while any(rank.steps for rank in sim.ranks):
        sim.answer_all()
        steps += 1
        most = max(most, model(sim)["running"])
    assert most == 2 if promise == "worst_case" else most >= 10
    assert steps >= 300 if promise == "worst_case" else steps <= 120
    assert all(sim.finish(f"r{i}").kind == "stop" for i in range(30))
    sim.assert_empty()


@pytest.mark.parametrize("seed", range(12))
def test_nobody_is_stuck_whatever_the_pool_and_the_requests(seed):
    """Tight pools of odd page sizes in which every request takes its longest. All are served in
    full, and whenever requests run, a step is in flight."""
    random = Random(seed)
    models = random.randint(1, 3)
    specs = [
        spec(context=400, layers=random.randint(1, 5), head_dim=random.choice((2, 6, 8, 14, 22)))
        for _ in range(models)
    ]
    chunks = 1 + max(-(-s.kv_bytes_per_token * 4 * -(-s.context // 4) // 4096) for s in specs)
    chunks += random.choice((0, 1, 2, chunks // 2))
    d = growing(
        models,
        kv_pool_bytes=chunks * 4096,
        growth_tokens=random.choice((1, 4, 8, 30)),
        prefix_cache=random.random() < 0.7,
        lanes=random.randint(1, 2),
        queue_timeout=1e9,
    )
    sim = Simulation(d, specs)
    requests = []
    for i in range(40):
        length = random.choice((random.randint(1, 30), random.randint(1, 300)))
        tokens = min(random.choice((5, 50, 390)), 400 - length)
        which = random.randrange(models)
        requests.append(request(f"r{i}", length, tokens, model=which, ignore_eos=True))
    for r in requests:
        sim.add(r)
        for _ in range(random.randint(0, 30)):
            sim.answer_all()
    pauses = 0
    while any(rank.steps for rank in sim.ranks):
        sim.answer_all()
        (rank,) = sim.snapshot()["ranks"]
        pauses += rank["paused"]
        assert rank["steps_in_flight"] or not rank["running"]
    for r in requests:
        assert sim.tokens(r.rid) == expected_tokens(r, sim.specs[r.model])
    assert (pauses > 0) <= (sum(m["pauses"] for m in sim.snapshot()["models"]) > 0)
    sim.assert_empty()


def contended():
    """Two requests that both want the whole pool, of which each holds a part."""
    d = growing(kv_pool_bytes=8 * 4096, prefix_cache=False)
    sim = Simulation(d, [spec(context=1000)], never_ending)
    sim.add(request("a", 40, 400), request("b", 60, 300))
    while not model(sim)["paused"]:
        sim.answer()
    return sim


def test_nobody_comes_in_while_one_is_paused_and_all_end():
    sim = contended()
    paused_at = len(sim.started)
    sim.add(*(request(f"small{i}", 5, 3) for i in range(5)))
    while model(sim)["paused"]:
        assert len(sim.started) == paused_at == 2
        sim.answer()
    sim.run()
    assert len(sim.tokens("a")) == 400 and len(sim.tokens("b")) == 300
    assert all(len(sim.tokens(f"small{i}")) == 3 for i in range(5))
    sim.assert_empty()


def test_a_paused_request_can_be_aborted():
    sim = contended()
    (paused,) = sim.core._ranks[0].paused[0].values()
    sim.core.abort(paused.request.rid)
    sim.schedule()
    assert sim.finish(paused.request.rid).status == 499
    assert model(sim)["paused"] == 0
    sim.run()
    sim.assert_empty()


# --- floors and ceilings


def test_a_floor_is_there_for_its_model_when_others_have_taken_all_else():
    d = deployment(
        2,
        kv_pool_bytes=16 * 4096,
        max_running_requests=64,
        bounds={1: {"kv_floor_bytes": 4 * 4096}},
    )
    sim = Simulation(d, [spec(context=1000)] * 2, never_ending)
    sim.add(*(request(f"flood{i}", 40, 80) for i in range(20)))
    assert model(sim)["promised_chunks"] == 12 and model(sim)["waiting"] > 0
    sim.add(request("floor", 100, 100, model=1))
    assert model(sim, 1)["running"] == 1
    sim.run()
    sim.assert_empty()


def test_others_cache_in_a_floor_until_its_model_needs_it():
    d = deployment(2, kv_pool_bytes=16 * 4096, bounds={1: {"kv_floor_bytes": 8 * 4096}})
    sim = Simulation(d, [spec(context=1000)] * 2, never_ending)
    for i in range(20):
        sim.add(request(f"{i}", 120, 4))
        sim.run()
    assert model(sim)["cached_chunks"] >= 15
    sim.add(request("floor", 100, 400, model=1))
    assert model(sim, 1)["running"] == 1
    sim.run()
    sim.assert_empty()


@pytest.mark.parametrize("promise", ["worst_case", "growth"])
def test_a_ceiling_bounds_what_a_model_is_promised(promise):
    d = deployment(
        2,
        kv_pool_bytes=16 * 4096,
        max_running_requests=64,
        promise=promise,
        bounds={0: {"kv_ceiling_bytes": 5 * 4096}},
    )
    sim = Simulation(d, [spec(context=1000)] * 2, never_ending)
    sim.add(*(request(f"{i}", 40, 80) for i in range(20)))
    most = 0
    while any(rank.steps for rank in sim.ranks):
        most = max(most, model(sim)["promised_chunks"])
        sim.answer_all()
    assert 4 <= most <= 5
    assert all(len(sim.tokens(f"{i}")) == 80 for i in range(20))
    assert sim.core.max_tokens(0) == 5 * 4096 // 64
    sim.add(request("too long", 40, 5 * 4096 // 64 - 39))
    assert sim.finish("too long").status == 400
    assert f"{5 * 4096} bytes" in sim.finish("too long").message
    sim.assert_empty()


def test_scattered_cached_pages_keep_nobody_below_a_ceiling_out():
    """A beginning whose pages came to lie in five chunks, with a ceiling of four: with them the
    next request would touch too many, without them it fits."""
    d = deployment(1, kv_pool_bytes=32 * 4096, bounds={0: {"kv_ceiling_bytes": 4 * 4096}})
    sim = Simulation(d, [spec(context=1000)], never_ending)
    for turn in range(5):
        # the last one computes every page itself, and leaves the one that is new
        alone = Logprobs(prompt_start=0) if turn == 4 else None
        sim.add(request(f"turn{turn}", [5] * 4 * (turn + 1), 0, logprobs=alone))
        sim.run()
        sim.add(request(f"fills the chunk {turn}", [10 + turn] * 60, 0))
        sim.run()
    matched = sim.core._ranks[0].promises.match(
        sim.core._intake.sequence(request("probe", [5] * 20 + [6], 0))
    )
    assert len(matched) == len({entry.page // 16 for entry in matched}) == 5
    sim.add(request("next", [5] * 20 + [6], 2))
    sim.run()
    assert sim.outputs["next"][-1].cached_tokens == 0 and len(sim.tokens("next")) == 2
    sim.assert_empty()


def test_shares_of_floors_and_ceilings_on_two_ranks_are_whole_chunks():
    d = deployment(
        2,
        ranks=2,
        bounds={0: {"kv_floor_bytes": 4096 * 3}, 1: {"kv_ceiling_bytes": 4096 * 5}},
    )
    assert Bounds.of(d) == Bounds(budget=64, floors={0: 2, 1: 0}, ceilings={0: 64, 1: 2})


# --- what a refused request is told


def busy(**fields):
    """One request at a time, each for ten seconds; the queue is always full."""
    d = deployment(1, max_running_requests=1, max_queued_requests=5, watchdog_timeout=1e9, **fields)
    sim = Simulation(d, [spec()], never_ending)
    count = 0

    def fill():
        nonlocal count
        while True:
            sim.add(request(f"r{count}", 8, 10))
            count += 1
            if sim.finished(f"r{count - 1}"):
                return sim.finish(f"r{count - 1}")

    refusals = [fill()]
    for _ in range(100):
        sim.now += 1.0
        sim.answer()
        refusals.append(fill())
    return refusals


def test_retry_after_tells_how_long_the_queue_takes_at_its_present_pace():
    refusals = busy()
    assert {finish.status for finish in refusals} == {429}
    # nothing is known yet
    assert refusals[0].retry_after == 1.0
    # five wait, and every ten seconds one is admitted
    assert all(35 <= finish.retry_after <= 66 for finish in refusals[30:])


def test_retry_after_is_at_most_the_queues_deadline():
    assert max(finish.retry_after for finish in busy(queue_timeout=20.0)) == 20.0


def test_who_waited_in_vain_is_told_too():
    d = deployment(1, max_running_requests=1, queue_timeout=30.0, watchdog_timeout=1e9)
    sim = Simulation(d, [spec()], never_ending)
    sim.add(request("running", 8, 20), request("waiting", 8, 20))
    sim.now += 30
    sim.schedule()
    assert sim.finish("waiting").status == 429
    assert sim.finish("waiting").retry_after == 30.0
