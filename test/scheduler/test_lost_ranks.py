"""Ranks that are lost and come back: requests are computed again from their tokens, and end as if
nothing had happened."""

import pytest
from crosspool.scheduler.request import Grammar
from crosspool.transport.messages import Logprobs
from simulation import (
    Simulation,
    ToyMatcher,
    deployment,
    expected_tokens,
    mixed_requests,
    request,
    spec,
)

DIGITS = set(range(48, 58))


def never_ending(tokens):
    return 7


def rows(sim, rank=0):
    """(request, first position, tokens) of each row of the rank's oldest step."""
    return [(row.request, row.start, len(row.tokens)) for row in sim.ranks[rank].steps[0].rows]


def outcome(sim, r):
    outputs = sim.outputs[r.rid]
    return (
        sim.tokens(r.rid),
        sim.finish(r.rid),
        [p for output in outputs for p in output.output_logprobs],
        outputs[0].prompt_logprobs,
        outputs[-1].completion_tokens,
        outputs[-1].cached_tokens,
    )


@pytest.mark.parametrize("fields", [{}, {"promise": "growth", "growth_tokens": 4}, {"lanes": 1}])
@pytest.mark.parametrize("lease", [1, 5])
def test_a_loss_after_any_number_of_steps_changes_no_answer(fields, lease):
    d = deployment(
        2, loop="resident", lease_steps=lease, kv_pool_bytes=30 * 4096, chunked_prefill_size=16,
        **fields,
    )  # fmt: skip
    calm = Simulation(d, [spec()] * 2)
    requests = mixed_requests(10)
    calm.add(*requests)
    calm.run()
    steps, stride = 0, 3 if fields else 1
    while True:
        sim = Simulation(d, [spec()] * 2)
        sim.add(*requests)
        for _ in range(steps):
            if sim.ranks[0].steps:
                sim.answer()
        if all(sim.finished(r.rid) for r in requests):
            break
        dead = sim.lose()
        assert sim.snapshot()["ranks"][0]["away"]
        assert not sim.ranks[0].steps
        if dead.steps:
            sim.core.on_result(0, dead.answer())
        sim.restore()
        sim.run()
        for r in requests:
            assert outcome(sim, r) == outcome(calm, r), (steps, r.rid)
        sim.assert_empty()
        steps += stride
    assert steps > 15


def test_a_request_is_computed_again_in_chunks_and_goes_on_with_the_next_token():
    sim = Simulation(deployment(1, chunked_prefill_size=8), [spec()])
    one = request("r", 6, 20, ignore_eos=True, stream=True)
    sim.add(one)
    for _ in range(7):
        sim.answer()
    had = len(sim.tokens("r"))
    sim.lose()
    assert (sim.snapshot()["models"][0]["waiting"], len(sim.tokens("r"))) == (1, had)
    sim.restore()
    assert rows(sim) == [(1, 0, 8)]
    sim.answer()
    assert rows(sim) == [(1, 8, 6 + had - 8)]
    assert len(sim.tokens("r")) == had
    sim.answer()
    assert len(sim.tokens("r")) == had + 1
    sim.run()
    assert sim.tokens("r") == expected_tokens(one, spec())
    counts = sim.snapshot()["models"][0]
    assert (counts["replayed_requests"], counts["replayed_tokens"]) == (1, 6 + had)
    assert (counts["prompt_tokens"], counts["output_tokens"], counts["admitted"]) == (6, 20, 1)
    sim.assert_empty()


def test_another_rank_takes_the_requests_at_once():
    sim = Simulation(deployment(1, ranks=2), [spec()])
    requests = [request(f"{i}", 10, 12) for i in range(8)]
    sim.add(*requests)
    for _ in range(3):
        sim.answer_all()
    lost = set(sim.ranks[1].tokens)
    assert lost
    sim.lose(1)
    sim.answer(0)
    assert lost <= set(sim.ranks[0].tokens)
    sim.run()
    for r in requests:
        assert sim.tokens(r.rid) == expected_tokens(r, spec())
    assert not sim.ranks[1].served
    sim.restore(1)
    sim.add(request("later", 10, 4), request("more", 10, 4))
    assert sim.ranks[1].served
    sim.run()
    sim.assert_empty()


def test_lost_requests_go_before_all_that_wait_in_the_order_in_which_they_came():
    d = deployment(2, kv_pool_bytes=4 * 4096, max_running_requests=2, page_size=16)
    sim = Simulation(d, [spec()] * 2, never_ending)
    sim.add(*(request(f"{m}-{i}", 10, 40, model=m) for i in range(4) for m in (0, 1)))
    sim.answer_all()
    ran = list(sim.started)
    assert len(ran) == 4
    sim.lose()
    sim.restore()
    sim.lose()
    sim.restore()
    sim.run()
    assert set(sim.started[4:8]) == set(sim.started[8:12]) == set(ran)
    assert all(sim.finished(f"{m}-{i}") for i in range(4) for m in (0, 1))
    sim.assert_empty()


def test_who_only_waits_is_refused_in_time_and_who_was_admitted_is_not():
    d = deployment(1, queue_timeout=10.0, max_running_requests=1, max_queued_requests=2)
    sim = Simulation(d, [spec()], never_ending)
    sim.add(request("runs", 6, 9))
    sim.answer()
    sim.now += 5
    sim.add(
        request("waits", 6, 9), request("slow", 6, 9, grammar=Grammar(kind="regex", source="a"))
    )
    sim.lose()
    sim.add(request("too many", 6, 9))
    assert sim.finish("too many").status == 429
    assert sim.core.next_deadline() == sim.now + 10
    sim.now += 10
    sim.schedule()
    assert sim.finish("waits").status == sim.finish("slow").status == 429
    assert "restarting" in sim.finish("waits").message
    assert sim.core.next_deadline() is None
    sim.now += 1000
    sim.schedule()
    assert sim.core.overdue(sim.now) is None
    sim.restore()
    sim.run()
    assert sim.tokens("runs") == [7] * 9
    sim.assert_empty()


def test_nothing_of_a_dead_rank_counts_as_cached():
    sim = Simulation(deployment(1), [spec()], never_ending)
    prompt = list(range(40))
    sim.add(request("first", prompt, 4))
    sim.run()
    sim.lose()
    sim.restore()
    sim.add(request("again", prompt, 4))
    sim.run()
    assert sim.outputs["again"][-1].cached_tokens == 0
    sim.add(request("third", prompt, 4))
    sim.run()
    assert sim.outputs["third"][-1].cached_tokens == 36
    sim.assert_empty()


def test_usage_tells_the_cached_tokens_of_the_first_admission():
    sim = Simulation(deployment(1, ranks=2, kv_pool_bytes=2 * 64 * 4096), [spec()], never_ending)
    prompt = list(range(41))
    sim.add(request("first", prompt, 4))
    sim.run()
    sim.add(request("second", prompt, 9))
    (rank,) = (i for i in (0, 1) if sim.ranks[i].steps)
    sim.answer(rank)
    sim.lose(rank)
    sim.run()
    assert sim.outputs["second"][-1].cached_tokens == 40
    counts = sim.snapshot()["models"][0]
    assert (counts["cached_tokens"], counts["prefix_hits"], counts["replayed_requests"]) == (
        40,
        1,
        1,
    )


def test_a_request_that_was_over_ends_with_its_rank():
    sim = Simulation(deployment(1), [spec()], never_ending)
    sim.add(request("r", 6, 9), request("other", 6, 9))
    sim.answer()
    sim.core.abort("r")
    sim.lose()
    assert sim.finish("r").status == 499
    sim.restore()
    sim.run()
    assert len(sim.tokens("other")) == 9
    sim.assert_empty()


def test_a_request_that_waits_again_can_be_aborted():
    sim = Simulation(deployment(1), [spec()], never_ending)
    sim.add(request("r", 6, 9, stream=True))
    for _ in range(3):
        sim.answer()
    sim.lose()
    sim.core.abort("r")
    assert sim.snapshot()["models"][0]["waiting"] == 0
    sim.restore()
    assert sim.finish("r").status == 499
    assert sim.tokens("r") == [7] * 3
    sim.assert_empty()


@pytest.mark.parametrize("when", ["away", "admitted", "lost again"])
def test_a_token_that_its_grammar_has_not_followed_yet_is_kept(when):
    sim = Simulation(deployment(1, grammar_timeout=50.0), [spec()], lambda tokens: 50)
    sim.add(request("g", 6, 9, grammar=Grammar(kind="regex", source="[0-9]*")), request("p", 6, 9))
    matcher = ToyMatcher([DIGITS] * 5, slow_at=3)
    sim.grammars[0].futures[0].set_result(matcher)
    sim.schedule()
    for _ in range(5):
        sim.answer()
    sim.lose()
    if when == "away":
        matcher.pending = False
        sim.schedule()
    sim.restore()
    sim.run()
    assert sim.finished("p")
    if when == "lost again":
        sim.lose()
        sim.restore()
    matcher.pending = False
    sim.schedule()
    sim.run()
    assert sim.tokens("g") == [50] * 5
    assert sim.snapshot()["models"][0]["output_tokens"] == 14
    sim.assert_empty()


def test_a_grammar_that_never_follows_is_refused_while_the_rank_is_away():
    sim = Simulation(deployment(1, grammar_timeout=50.0), [spec()], lambda tokens: 50)
    sim.add(request("g", 6, 9, grammar=Grammar(kind="regex", source="[0-9]*")))
    sim.grammars[0].futures[0].set_result(ToyMatcher([DIGITS] * 5, slow_at=1))
    sim.schedule()
    sim.answer()
    sim.lose()
    sim.now += 50
    sim.schedule()
    assert sim.finish("g").status == 400
    sim.restore()
    sim.assert_empty()


def test_only_a_row_that_samples_has_a_bitmask():
    sim = Simulation(deployment(1, chunked_prefill_size=4), [spec()], lambda tokens: 50)
    sim.add(request("g", 6, 9, grammar=Grammar(kind="regex", source="[0-9]*")))
    sim.grammars[0].futures[0].set_result(ToyMatcher([DIGITS] * 9))
    sim.schedule()
    for _ in range(5):
        sim.answer()
    sim.lose()
    sim.restore()
    asked = []
    while sim.ranks[0].steps:
        asked += [row.bitmask is not None for row in sim.ranks[0].steps[0].rows]
        sim.answer()
    assert asked[:4] == [False, False, True, True]
    assert sim.tokens("g") == [50] * 9


@pytest.mark.parametrize("steps", range(6))
def test_prompt_log_probabilities_are_asked_for_once(steps):
    """A prompt of 20 tokens in chunks of 4."""
    sim = Simulation(deployment(1, chunked_prefill_size=4), [spec()], never_ending)
    sim.add(request("r", 20, 3, logprobs=Logprobs(prompt_start=6)))
    for _ in range(steps):
        sim.answer()
    sim.lose()
    sim.restore()
    (logprobs,) = sim.ranks[0].logprobs.values()
    assert logprobs.prompt_start == (max(6, 4 * steps) if steps < 5 else -1)
    sim.run()
    (output,) = sim.outputs["r"]
    assert [p.logprob for p in output.prompt_logprobs] == [-float(p) for p in range(6, 20)]


def test_a_suspended_model_waits_with_its_tokens():
    sim = Simulation(deployment(2, queue_timeout=5.0), [spec()] * 2, never_ending)
    sim.add(*(request(f"{m}", 6, 9, model=m) for m in (0, 1)))
    for _ in range(6):
        sim.answer()
    sim.core.suspend(0)
    sim.lose()
    sim.restore()
    sim.run()
    assert (sim.finished("0"), sim.finished("1")) == (False, True)
    sim.now += 100
    sim.core.resume(0)
    sim.schedule()
    sim.run()
    assert sim.tokens("0") == [7] * 9
    sim.assert_empty()


def test_models_that_are_all_computed_again_do_not_wait_for_each_other():
    """Prompts take turns beside requests that generate; a replayed one does not, until it has had
    its next token."""
    d = deployment(3, chunked_prefill_size=8)
    sim = Simulation(d, [spec()] * 3, never_ending)
    sim.add(*(request(f"{m}", 30, 9, model=m) for m in range(3)))
    while not all(sim.snapshot()["models"][m]["output_tokens"] > 3 for m in range(3)):
        sim.answer()
    sim.lose()
    sim.restore()
    sim.run()
    assert all(len(sim.tokens(f"{m}")) == 9 for m in range(3))
    sim.assert_empty()


def test_a_promise_covers_what_a_request_has_reached():
    d = deployment(1, promise="growth", growth_tokens=4, kv_pool_bytes=12 * 4096)
    sim = Simulation(d, [spec(layers=8)], never_ending)
    requests = [request(f"{i}", 8, 60) for i in range(3)]
    sim.add(*requests)
    for _ in range(30):
        sim.answer()
    assert not any(sim.finished(r.rid) for r in requests)
    sim.lose()
    sim.restore()
    for seq in sim.core._ranks[0].running[0].values():
        assert len(seq.pages) * 4 >= len(seq.tokens) + 4
    sim.run()
    assert all(len(sim.tokens(r.rid)) == 60 for r in requests)
    sim.assert_empty()


def test_messages_that_were_not_sent_yet_are_not_sent_to_the_next_incarnation():
    sim = Simulation(deployment(1), [spec()], never_ending)
    sim.core.add(request("r", 6, 3))
    sim.core.schedule()
    sim.core.lose_attention_rank(0)
    assert sim.core.drain_messages() == []
    sim.core.restore_attention_rank(0)
    sim._rid_of_seed = {r.request.sampling.seed: r.request.rid for r in sim.core._requests()}
    sim.schedule()
    sim.run()
    assert sim.tokens("r") == [7] * 3
    sim.assert_empty()


def test_no_step_is_overdue_while_an_ffn_rank_is_away():
    d = deployment(1, watchdog_timeout=30.0)
    sim = Simulation(d, [spec()], never_ending)
    sim.add(request("r", 6, 3))
    sim.core.lose_ffn_rank(0)
    sim.core.lose_ffn_rank(0)
    sim.now += 1000
    sim.schedule()
    assert sim.core.overdue(sim.now) is None and sim.core.next_deadline() is None
    sim.core.restore_ffn_rank(0)
    sim.schedule()
    assert sim.core.overdue(sim.now + 29) is None
    assert sim.core.next_deadline() == sim.now + 30
    assert "has not finished step" in sim.core.overdue(sim.now + 30)
    sim.run()
    assert sim.tokens("r") == [7] * 3


def test_chunk_sizes_do_not_follow_the_time_for_which_a_rank_was_away():
    d = deployment(1, tbt_target_ms=50.0, chunked_prefill_size=64, watchdog_timeout=1e6)

    def chunk(pause):
        """Tokens of a prompt's chunk after steps of 10 ms, one of them ``pause`` longer."""
        sim = Simulation(d, [spec()], never_ending)
        sim.add(request("generates", 64, 150))
        for i in range(60):
            sim.now += 0.01
            if i == 30:
                sim.core.lose_ffn_rank(0)
                sim.now += pause
                sim.core.restore_ffn_rank(0)
            if i == 40 and pause:
                sim.core.lose_attention_rank(0)
                sim.ranks[0] = type(sim.ranks[0])(d, sim.specs, never_ending)
                sim.now += pause
                sim.core.restore_attention_rank(0)
                sim.schedule()
            else:
                sim.answer()
        sim.core.add(request("reads", 150, 4))
        sim._rid_of_seed = {r.request.sampling.seed: r.request.rid for r in sim.core._requests()}
        sim.schedule()
        sim.answer()
        return [tokens for number, start, tokens in rows(sim) if number == 2]

    assert chunk(0.0) == chunk(500.0) != []


def test_nothing_comes_back_once_the_server_has_failed():
    sim = Simulation(deployment(1), [spec()], never_ending)
    sim.add(request("r", 6, 3))
    sim.core.fail_all("it is over")
    sim.lose()
    sim.restore()
    assert sim.finish("r").status == 503
    assert not sim.ranks[0].steps
