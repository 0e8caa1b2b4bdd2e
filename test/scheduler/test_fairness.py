"""No model and no request waits for ever: bounds in steps and admissions, not in seconds."""

from itertools import pairwise

import pytest
from simulation import Simulation, deployment, hashed_token, request, spec


def never_ending(tokens):
    return 7


def test_steps_of_a_model_are_at_most_a_round_apart_under_floods_of_others():
    sim = Simulation(deployment(5, lanes=1), [spec()] * 5, never_ending)
    sim.add(*(request(f"{m}-{i}", 60, 40, model=m) for m in (0, 1, 3, 4) for i in range(40)))
    for _ in range(5):
        sim.answer()
    sim.add(request("lone", 20, 40, model=2))
    at = len(sim.ranks[0].served)
    while not sim.finished("lone"):
        sim.answer()
    steps = [i for i, model in enumerate(sim.ranks[0].served) if model == 2]
    assert steps[0] - at <= 1
    assert max(b - a for a, b in pairwise(steps)) <= 5


def test_a_lane_that_is_slow_with_one_model_serves_the_others():
    sim = Simulation(deployment(3, lanes=2), [spec()] * 3, never_ending)
    sim.add(*(request(f"r{m}", 8, 30, model=m) for m in range(3)))
    for _ in range(40):
        sim.answer(index=1)
    assert sim.ranks[0].served.count(0) == 1
    assert sim.ranks[0].served.count(1) == sim.ranks[0].served.count(2) >= 20


def test_while_a_request_answers_prompts_are_read_by_one_step_at_a_time_in_turn():
    d = deployment(4, lanes=3, chunked_prefill_size=8, max_running_requests=4)
    sim = Simulation(d, [spec()] * 4, never_ending)
    sim.add(request("answering", 4, 200, model=0))
    sim.answer()
    others = [request(f"{m}-{i}", 40, 20, model=m) for m in range(1, 4) for i in range(4)]
    sim.add(*others)
    readers = []
    while not all(sim.finished(r.rid) for r in others):
        steps = sim.ranks[0].steps
        reading = [step.model for step in steps if any(len(r.tokens) > 1 for r in step.rows)]
        assert len(reading) <= 1, "two models' prompts at once delay a third model's token twice"
        if reading and readers[-1:] != reading:
            readers += reading
        sim.answer()
    assert sim.ranks[0].served.count(0) >= 60, "and the answer goes on meanwhile"
    assert readers[:6] in ([1, 2, 3] * 2, [2, 3, 1] * 2, [3, 1, 2] * 2)


def test_a_flood_of_one_model_delays_another_by_one_admission():
    d = deployment(2, kv_pool_bytes=4 * 4096, max_running_requests=64)
    sim = Simulation(d, [spec(), spec()], never_ending)
    sim.add(*(request(f"flood{i}", 40, 20, model=0) for i in range(60)))
    sim.add(request("other", 40, 20, model=1), request("another", 40, 20, model=1))
    sim.run()
    order = sim.started
    assert order.index("other") <= 5
    assert order.index("another") <= 7
    sim.assert_empty()


def test_models_with_floods_share_the_pool_evenly():
    d = deployment(3, kv_pool_bytes=6 * 4096, max_running_requests=64)
    sim = Simulation(d, [spec()] * 3, never_ending)
    sim.add(*(request(f"{m}-{i}", 40, 20, model=m) for m in range(3) for i in range(20)))
    sim.run()
    order = sim.started
    for end in range(10, 60):
        admitted = [sum(rid.startswith(f"{m}-") for rid in order[:end]) for m in range(3)]
        assert max(admitted) - min(admitted) <= 6


def test_a_request_as_large_as_the_pool_gets_in_despite_a_stream_of_small_ones():
    d = deployment(2, kv_pool_bytes=8 * 4096, max_running_requests=64)
    sim = Simulation(d, [spec(context=1000), spec()], never_ending)
    sim.add(*(request(f"before{i}", 30, 20, model=1) for i in range(20)))
    sim.add(request("large", 12, 500, model=0))
    for i in range(200):
        sim.add(request(f"after{i}", 30, 20, model=1))
        sim.answer()
        if sim.snapshot()["models"][0]["running"]:
            break
    else:
        pytest.fail("the large request starved")
    assert i <= 60
    sim.run()
    sim.assert_empty()


def test_no_request_overtakes_a_larger_one_of_its_own_model():
    d = deployment(1, kv_pool_bytes=8 * 4096, max_running_requests=64)
    sim = Simulation(d, [spec(context=1000)], never_ending)
    sizes = [100, 480, 20, 300, 20, 20, 490, 20]
    sim.add(*(request(f"r{i}", 10, size, model=0) for i, size in enumerate(sizes)))
    sim.run()
    assert sim.started == [f"r{i}" for i in range(8)]


def test_a_large_request_keeps_one_rank_to_itself_and_leaves_the_others_open():
    d = deployment(2, ranks=2, kv_pool_bytes=2 * 8 * 4096, max_running_requests=64)
    sim = Simulation(d, [spec(context=1000), spec()], never_ending)
    sim.add(*(request(f"r{i}", 30, 34, model=1) for i in range(12)))
    sim.add(request("large", 12, 500, model=0))
    sim.add(*(request(f"s{i}", 30, 34, model=1) for i in range(60)))
    while "large" not in sim.started:
        sim.answer_all()
    overtaking = [rid for rid in sim.started if rid.startswith("s")]
    assert 1 <= len(overtaking) <= 24
    sim.run()
    sim.assert_empty()


def test_a_model_at_its_own_limit_keeps_nobody_out():
    d = deployment(2, max_running_requests=2)
    sim = Simulation(d, [spec(), spec()], never_ending)
    sim.add(*(request(f"r{i}", 10, 20, model=0) for i in range(5)))
    sim.add(request("other", 10, 20, model=1))
    models = sim.snapshot()["models"]
    assert [m["running"] for m in models] == [2, 1]


def test_requests_go_to_the_rank_with_most_free_kv():
    sim = Simulation(deployment(1, ranks=3), [spec()], never_ending)
    sim.add(*(request(f"r{i}", 60, 60) for i in range(6)))
    assert [rank["running"] for rank in sim.snapshot()["ranks"]] == [2, 2, 2]
    sim.add(request("large", 200, 56))
    sim.add(*(request(f"s{i}", 60, 60) for i in range(2)))
    assert [rank["running"] for rank in sim.snapshot()["ranks"]] == [3, 3, 3]


def test_three_times_the_pool_is_served_in_full_without_an_interruption():
    d = deployment(2, kv_pool_bytes=16 * 4096, max_running_requests=64)
    sim = Simulation(d, [spec(), spec(head_dim=12)], hashed_token)
    requests = [request(f"r{i}", 90, 70, model=i % 2, ignore_eos=True) for i in range(16)]
    sim.add(*requests)
    tokens = sum(len(r.input_ids) + 70 for r in requests)
    assert tokens * 80 > 3 * 16 * 4096
    fewest_free = 16
    while any(rank.steps for rank in sim.ranks):
        sim.answer_all()
        fewest_free = min(fewest_free, sim.snapshot()["ranks"][0]["free_chunks"])
    assert fewest_free <= 2
    for r in requests:
        assert len(sim.tokens(r.rid)) == 70 and sim.finish(r.rid).kind == "length"
    sim.assert_empty()
