"""What the prefix cache does for requests, for memory and between models. The simulated ranks read
every request's prompt out of the pages that it is given, so a wrong page is a wrong token."""

import pytest
from crosspool.scheduler.request import Finish
from crosspool.transport.messages import Logprobs
from simulation import Simulation, deployment, expected_tokens, request, spec

PAGE = 4


def never_ending(tokens):
    return 7


def cached(sim, rid):
    """Cached tokens of the request, on which all of its outputs agree."""
    (count,) = {output.cached_tokens for output in sim.outputs[rid]}
    return count


def run(sim, *requests):
    sim.add(*requests)
    sim.run()


def prompt(length, seed=0):
    return [(seed * 37 + 11 * i) % 256 for i in range(length)]


def test_a_prompt_that_was_computed_is_not_computed_again():
    sim = Simulation(deployment(1), [spec()])
    first = request("first", prompt(50), 8, stream=True)
    second = request("second", prompt(50), 8, stream=True)
    run(sim, first)
    before = sim.snapshot()["models"][0]
    run(sim, second)
    assert (cached(sim, "first"), cached(sim, "second")) == (0, 48)
    assert sim.tokens("first") == sim.tokens("second") == expected_tokens(first, sim.specs[0])
    after = sim.snapshot()["models"][0]
    assert after["prompt_tokens"] - before["prompt_tokens"] == 2
    assert (after["cached_tokens"], after["prefix_hits"]) == (48, 1)
    sim.assert_empty()


@pytest.mark.parametrize("length", [1, 4, 5, 8, 9, 12])
def test_at_least_one_prompt_token_is_computed(length):
    sim = Simulation(deployment(1), [spec()])
    run(sim, request("a", prompt(12), 0), request("b", prompt(length), 3))
    run(sim, request("c", prompt(length), 3), request("prefill", prompt(length), 0))
    assert cached(sim, "c") == cached(sim, "prefill") == (length - 1) // PAGE * PAGE
    assert sim.tokens("c") == sim.tokens("b")
    assert sim.finish("prefill") == Finish(kind="length")


def test_an_answer_is_cached_too_as_far_as_it_was_computed():
    sim = Simulation(deployment(1), [spec()], never_ending)
    run(sim, request("turn 1", prompt(10), 11))
    # 20 of the 21 tokens went through a step: 5 pages
    run(sim, request("turn 2", prompt(10) + [7] * 11 + prompt(9, 1), 5))
    assert cached(sim, "turn 2") == 20


def test_a_prompt_serves_others_as_soon_as_its_prefill_has_landed():
    sim = Simulation(deployment(1, chunked_prefill_size=16), [spec()], never_ending)
    sim.add(request("first", prompt(40), 50))
    sim.answer()
    sim.add(request("too early", prompt(40), 4))
    sim.answer()
    sim.answer()
    sim.add(request("in time", prompt(40), 4))
    sim.run()
    assert (cached(sim, "too early"), cached(sim, "in time")) == (0, 36)
    sim.assert_empty()


def test_an_aborted_request_leaves_what_its_steps_have_computed():
    sim = Simulation(deployment(1, chunked_prefill_size=16), [spec()], never_ending)
    sim.add(request("aborted", prompt(60), 50))
    sim.answer()
    sim.core.abort("aborted")
    sim.schedule()
    sim.run()
    run(sim, request("next", prompt(60), 4))
    assert cached(sim, "next") == 32
    sim.assert_empty()


@pytest.mark.parametrize(
    ("start", "expected"), [(-1, 48), (0, 0), (1, 0), (8, 4), (9, 8), (50, 48)]
)
def test_log_probabilities_of_the_prompt_are_computed(start, expected):
    sim = Simulation(deployment(1), [spec()])
    run(sim, request("first", prompt(50), 2))
    run(sim, request("second", prompt(50), 2, logprobs=Logprobs(output=True, prompt_start=start)))
    assert cached(sim, "second") == expected
    said = sim.outputs["second"][0].prompt_logprobs
    assert [p.token for p in said] == (prompt(50)[start:] if start >= 0 else [])


def test_namespaces_and_models_do_not_share():
    sim = Simulation(deployment(2), [spec(), spec()])

    def ask(rid, model=0, **namespace):
        run(sim, request(rid, prompt(30), 2, model=model, **namespace))
        return cached(sim, rid)

    assert ask("a") == 0
    assert ask("b", model=1) == 0
    assert ask("c", cache_namespace=("tenant", "")) == 0
    assert ask("d", cache_namespace=("", "tenant")) == 0
    assert ask("e") == ask("f", model=1) == ask("g", cache_namespace=("tenant", "")) == 28
    sim.assert_empty()


def test_switched_off_nothing_is_cached():
    sim = Simulation(deployment(1, prefix_cache=False), [spec()])
    run(sim, request("a", prompt(30), 2))
    run(sim, request("b", prompt(30), 2))
    assert cached(sim, "b") == 0 and not sim.core.flush()
    assert not any(sim.ranks[0].mapped.values())
    sim.assert_empty()


def test_requests_at_once_each_compute_and_one_copy_stays():
    sim = Simulation(deployment(1), [spec()], never_ending)
    run(sim, *(request(f"r{i}", prompt(31), 5) for i in range(6)))
    # 35 of the 36 tokens went through a step: 8 pages of 256 bytes, a chunk has 16
    assert sim.snapshot()["models"][0]["cached_chunks"] <= 2
    run(sim, request("next", prompt(31), 5))
    assert cached(sim, "next") == 28
    sim.assert_empty()


# --- memory


def pool(sim):
    (rank,) = sim.snapshot()["ranks"]
    return {k: rank[f"{k}_chunks"] for k in ("promised", "cached", "free", "mapped")}


def test_what_is_cached_stays_mapped_and_is_told_apart_from_what_is_promised():
    sim = Simulation(deployment(1), [spec()], never_ending)
    run(sim, request("a", prompt(127), 1))
    assert pool(sim) == {"promised": 0, "cached": 2, "free": 62, "mapped": 2}
    sim.add(request("b", prompt(127), 1))
    # 31 of the 32 pages are shared, one is b's own
    assert pool(sim) == {"promised": 2, "cached": 0, "free": 62, "mapped": 2}
    sim.core.flush()
    sim.schedule()
    assert pool(sim)["mapped"] == 2, "what a request uses is not flushed"
    sim.run()
    sim.assert_empty()


def test_cached_pages_are_given_up_before_anyone_waits():
    d = deployment(2, kv_pool_bytes=8 * 4096)
    sim = Simulation(d, [spec(context=1000), spec(context=1000)], never_ending)
    for i in range(20):
        run(sim, request(f"{i}", prompt(100, i), 4, model=i % 2))
        assert sim.finish(f"{i}").kind == "length"
        assert pool(sim)["free"] + pool(sim)["cached"] == 8
    assert pool(sim)["cached"] >= 7
    run(sim, request("as large as the pool", prompt(12), 500))
    assert len(sim.tokens("as large as the pool")) == 500
    assert sum(m["evicted_pages"] for m in sim.snapshot()["models"]) > 100
    sim.assert_empty()


def test_a_request_that_cannot_get_in_anyway_empties_no_cache():
    d = deployment(2, kv_pool_bytes=8 * 4096)
    sim = Simulation(d, [spec(context=1000), spec(context=1000)], never_ending)
    run(sim, request("old", prompt(100), 4))
    sim.add(request("running", prompt(100, 1), 150, model=1))
    before = pool(sim)
    sim.add(request("waiting", prompt(12, 2), 450, model=1))
    assert pool(sim) == before and pool(sim)["cached"] == 2
    assert sim.snapshot()["models"][1]["waiting"] == 1
    while not sim.finished("running"):
        sim.answer()
    sim.run()
    assert sim.snapshot()["models"][0]["evicted_pages"] > 0
    sim.assert_empty()


def test_a_scan_of_one_model_takes_the_least_recently_used_of_all():
    d = deployment(3, kv_pool_bytes=16 * 4096)
    sim = Simulation(d, [spec(context=1000)] * 3, never_ending)
    for model in range(3):
        run(sim, request(f"warm{model}", prompt(120), 4, model=model))
    # a scan of model 0 while model 1 is used now and then and model 2 is not
    for i in range(30):
        run(sim, request(f"scan{i}", prompt(120, i + 1), 4, model=0))
        if i % 3 == 0:
            run(sim, request(f"use{i}", prompt(120), 4, model=1))
            assert cached(sim, f"use{i}") == 116
    evicted = [m["evicted_pages"] for m in sim.snapshot()["models"]]
    assert evicted[0] > 0 and evicted[1] == 0 and evicted[2] == 30
    run(sim, request("gone", prompt(120), 4, model=2))
    assert cached(sim, "gone") == 0
    sim.assert_empty()


def test_no_more_is_given_up_than_is_needed():
    sim = Simulation(deployment(1, kv_pool_bytes=8 * 4096), [spec(context=1000)], never_ending)
    for i in range(8):
        run(sim, request(f"{i}", prompt(61, i), 4))
    assert pool(sim)["free"] == 0
    sim.add(request("next", prompt(61, 8), 4))
    # 17 pages are needed; each of the 8 left 16 pages of 16 * 8, and nothing else is free
    assert sim.snapshot()["models"][0]["evicted_pages"] == 17
    sim.run()
    for i in range(7, 1, -1):
        run(sim, request(f"again{i}", prompt(61, i), 1))
        assert cached(sim, f"again{i}") == 60
    sim.assert_empty()


def test_flush_of_one_model():
    sim = Simulation(deployment(2), [spec(), spec()])
    run(sim, request("a", prompt(60), 2), request("b", prompt(60), 2, model=1))
    assert sim.core.flush(0)
    sim.schedule()
    assert [m["cached_chunks"] for m in sim.snapshot()["models"]] == [0, 1]
    assert not sim.ranks[0].mapped[0] and sim.ranks[0].mapped[1]
    sim.assert_empty()


# --- several attention ranks


def ranks_of(sim):
    return [rank["running"] for rank in sim.snapshot()["ranks"]]


def test_a_request_goes_where_its_prompt_is_cached():
    sim = Simulation(deployment(1, ranks=3), [spec()], never_ending)
    run(sim, *(request(f"{i}", prompt(100, i), 4) for i in range(3)))
    sim.add(*(request(f"other{i}", prompt(50, 9 + i), 20) for i in range(2)))
    assert sorted(ranks_of(sim)) == [0, 1, 1]
    for i in range(3):
        sim.add(request(f"again{i}", prompt(100, i), 4))
    assert sorted(ranks_of(sim)) == [1, 2, 2]
    sim.run()
    assert [cached(sim, f"again{i}") for i in range(3)] == [96] * 3
    sim.assert_empty()


def test_a_short_common_beginning_does_not_draw_everybody_to_one_rank():
    sim = Simulation(deployment(1, ranks=2), [spec()], never_ending)
    run(sim, request("first", prompt(100), 4))
    sim.add(*(request(f"{i}", prompt(20) + prompt(80, i + 1), 20) for i in range(6)))
    assert ranks_of(sim) == [3, 3]
    sim.run()
    sim.assert_empty()


def test_where_the_rank_with_the_match_is_full_another_computes_it():
    d = deployment(1, ranks=2, kv_pool_bytes=2 * 8 * 4096)
    sim = Simulation(d, [spec(context=1000)], never_ending)
    run(sim, request("first", prompt(100), 4))
    sim.add(*(request(f"{i}", prompt(100), 280) for i in range(2)))
    assert ranks_of(sim) == [1, 1]
    sim.run()
    assert sorted(cached(sim, f"{i}") for i in range(2)) == [0, 96]
    sim.assert_empty()
