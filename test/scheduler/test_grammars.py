"""Requests under a grammar; the toy grammar is one set of allowed tokens after another."""

from crosspool.scheduler.request import Finish, Grammar
from simulation import EOS, Simulation, ToyMatcher, bitmask_of, deployment, request, spec

GRAMMAR = Grammar(kind="regex", source="[0-9]{3}")
DIGITS = set(range(48, 58))


def start(*allowed: set[int], next_token=lambda tokens: 50, error=None, **fields) -> Simulation:
    """A running request whose grammar allows these sets one after another."""
    sim = Simulation(deployment(1), [spec()], next_token)
    sim.add(request("r", 3, 8, grammar=GRAMMAR, **fields))
    assert not sim.ranks[0].steps
    matcher = ToyMatcher(list(allowed))
    matcher.error = error
    sim.grammars[0].futures[0].set_result(matcher)
    sim.schedule()
    return sim


def test_every_sampled_token_has_its_bitmask_and_the_complete_grammar_ends_it():
    sim = start(DIGITS, {65}, DIGITS)
    (row,) = sim.ranks[0].steps[0].rows
    assert row.bitmask == bitmask_of(DIGITS)
    sim.run()
    assert sim.tokens("r") == [50, 65, 50]
    assert sim.finish("r") == Finish(kind="stop", matched=None)
    sim.assert_empty()


def test_prompt_chunks_that_do_not_sample_have_no_bitmask():
    sim = Simulation(deployment(1, chunked_prefill_size=4), [spec()])
    sim.add(request("r", 6, 8, grammar=GRAMMAR))
    sim.grammars[0].futures[0].set_result(ToyMatcher([{65}]))
    sim.schedule()
    assert [row.bitmask for row in sim.ranks[0].steps[0].rows] == [None]
    sim.run()
    assert sim.tokens("r") == [65]


def test_an_end_of_sequence_that_the_grammar_takes_is_the_match():
    sim = start(DIGITS, {EOS}, ignore_eos=True)
    sim.run()
    assert sim.tokens("r") == [50, EOS]
    assert sim.finish("r") == Finish(kind="stop", matched=EOS)


def test_length_and_stop_tokens_hold_under_a_grammar():
    sim = start(*[DIGITS] * 20)
    sim.run()
    assert len(sim.tokens("r")) == 8 and sim.finish("r") == Finish(kind="length")
    sim = start(*[DIGITS] * 20, stop_token_ids=frozenset({50}))
    sim.run()
    assert sim.tokens("r") == [50] and sim.finish("r").matched == 50


def test_min_new_tokens_takes_stop_tokens_out_of_the_bitmask_unless_nothing_is_left():
    sim = start({49, EOS}, {EOS, 50}, {EOS, 51}, next_token=lambda tokens: EOS, min_new_tokens=2)
    assert sim.ranks[0].sampling[1].min_new_tokens == 0
    sim.run()
    assert sim.tokens("r") == [49, 50, EOS]
    sim = start({EOS}, next_token=lambda tokens: EOS, min_new_tokens=2)
    sim.run()
    assert sim.tokens("r") == [EOS] and sim.finish("r").matched == EOS


def test_a_compiling_request_keeps_its_place_but_holds_nobody_up():
    sim = Simulation(deployment(1, max_running_requests=1), [spec()], lambda tokens: 50)
    sim.add(request("g", 3, 2, grammar=GRAMMAR))
    sim.add(request("a", 3, 2), request("b", 3, 2))
    snapshot = sim.snapshot()["models"][0]
    assert (snapshot["running"], snapshot["waiting"], snapshot["compiling"]) == (1, 2, 1)
    sim.grammars[0].futures[0].set_result(ToyMatcher([DIGITS] * 3))
    sim.run()
    order = [rid for rid in sim.outputs if sim.finished(rid)]
    assert order == ["a", "g", "b"]
    sim.assert_empty()


def test_a_wrong_grammar_is_refused_with_its_reason():
    sim = Simulation(deployment(1), [spec()])
    sim.add(request("r", 3, 8, grammar=GRAMMAR))
    sim.grammars[0].futures[0].set_exception(ValueError("unbalanced bracket"))
    sim.schedule()
    finish = sim.finish("r")
    assert finish.status == 400
    assert "regex '[0-9]{3}'" in finish.message and "unbalanced bracket" in finish.message
    sim.assert_empty()


def test_a_token_against_the_grammar_ends_the_request_not_the_server():
    sim = start(DIGITS)
    matcher = ToyMatcher([set()])
    matcher.bitmask = lambda: bitmask_of({65})
    sim.add(request("broken", 3, 8, grammar=GRAMMAR))
    sim.grammars[0].futures[1].set_result(matcher)
    sim.schedule()
    sim.run()
    assert sim.finish("broken").status == 500 and "65" in sim.finish("broken").message
    assert sim.finish("r").kind == "stop"


def test_compiling_requests_count_for_the_bound_the_deadline_and_aborts():
    d = deployment(1, max_queued_requests=2, queue_timeout=10.0)
    sim = Simulation(d, [spec()])
    sim.add(*(request(f"g{i}", 3, 2, grammar=GRAMMAR) for i in range(3)))
    assert sim.finish("g2").status == 429
    sim.core.abort("g1")
    sim.schedule()
    assert sim.finish("g1").status == 499 and sim.grammars[0].futures[1].cancelled()
    assert sim.core.next_deadline() == sim.now + 10
    sim.now += 10
    sim.schedule()
    assert sim.finish("g0").status == 429
    sim.assert_empty()


def slow_beside_another() -> tuple[Simulation, ToyMatcher]:
    """Two running requests of one model. The grammar of ``slow`` is still at its second token."""
    sim = Simulation(deployment(1, grammar_timeout=1.5), [spec()], lambda tokens: 50)
    matcher = ToyMatcher([DIGITS] * 4, slow_at=2)
    sim.add(request("slow", 3, 8, stream=True, grammar=GRAMMAR), request("other", 3, 40))
    sim.grammars[0].futures[0].set_result(matcher)
    sim.schedule()
    while not matcher.pending:
        sim.answer()
    return sim, matcher


def test_a_slow_grammar_keeps_its_own_request_out_of_steps_and_no_other():
    sim, matcher = slow_beside_another()
    for _ in range(10):
        (step,) = sim.ranks[0].steps
        assert len(step.rows) == 1 and step.rows[0].bitmask is None
        sim.answer()
    assert sim.tokens("slow") == [50], "the token that is not decided yet must not be shown"
    matcher.pending = False
    sim.run()
    assert sim.tokens("slow") == [50] * 4 and sim.finish("slow").kind == "stop"
    assert len(sim.tokens("other")) == 40
    sim.assert_empty()


def test_a_slow_grammar_does_not_hold_up_prompts():
    sim, matcher = slow_beside_another()
    sim.core.abort("other")
    sim.run()
    sim.add(request("late", 3, 2))
    sim.run()
    assert sim.finish("late").kind == "length"
    matcher.pending = False
    sim.schedule()
    sim.run()
    assert sim.finish("slow").kind == "stop"


def test_a_grammar_that_is_slow_for_too_long_ends_its_request():
    sim, _ = slow_beside_another()
    assert sim.core.next_deadline() == sim.now + 1.5
    sim.now += 1.5
    sim.schedule()
    finish = sim.finish("slow")
    assert finish.status == 400 and "grammar_timeout" in finish.message
    sim.run()
    assert len(sim.tokens("other")) == 40
    sim.assert_empty()


def test_a_request_may_be_aborted_while_its_grammar_is_slow():
    sim, matcher = slow_beside_another()
    sim.core.abort("slow")
    matcher.pending = False
    sim.run()
    assert sim.finish("slow").status == 499 and sim.tokens("slow") == [50]
    assert len(sim.tokens("other")) == 40
    sim.assert_empty()


def test_a_grammar_that_cannot_be_followed_ends_its_request():
    sim = start(DIGITS, DIGITS, DIGITS, error="it took 9.0 s")
    sim.run()
    assert sim.finish("r").status == 400 and "9.0 s" in sim.finish("r").message
    sim.assert_empty()


THINK_END = (60, 61)


def thinking(script: list[int], *allowed: set[int], grammar: Grammar | None = GRAMMAR, **fields):
    """Runs a request that thinks first and samples ``script``; the model ends its thinking with
    THINK_END."""
    sim = Simulation(
        deployment(1), [spec()], lambda tokens: script[len(tokens) - 3], think_ends=[THINK_END]
    )
    sim.add(request("r", 3, 12, grammar=grammar, thinks_first=True, **fields))
    if grammar is not None:
        sim.grammars[0].futures[0].set_result(ToyMatcher(list(allowed)))
        sim.schedule()
    masks = []
    while sim.ranks[0].steps:
        masks.append(sim.ranks[0].steps[0].rows[0].bitmask)
        sim.answer()
    return sim, masks


def test_a_grammar_binds_what_comes_after_thinking():
    script = [70, 60, 60, 61, 50, 51]
    sim, masks = thinking(script, DIGITS, DIGITS)
    assert masks == [None] * 4 + [bitmask_of(DIGITS)] * 2
    assert sim.tokens("r") == script
    assert sim.finish("r") == Finish(kind="stop", matched=None)
    assert sim.outputs["r"][-1].reasoning_tokens == 4
    sim.assert_empty()


def test_thinking_may_be_all_there_is():
    sim, masks = thinking([70, EOS], DIGITS)
    assert masks == [None] * 2 and sim.finish("r").matched == EOS
    assert sim.outputs["r"][-1].reasoning_tokens == 2


def test_thinking_before_min_new_tokens_does_not_end():
    _, masks = thinking([70, 71, EOS], DIGITS, min_new_tokens=2)
    everything_else = set(range(320)) - {EOS}
    assert masks == [bitmask_of(everything_else)] * 2 + [None]


def test_thinking_is_counted_without_a_grammar():
    sim, _ = thinking([70, 60, 61, 50, EOS], grammar=None)
    assert sim.outputs["r"][-1].reasoning_tokens == 3


def test_a_request_that_does_not_think_is_bound_from_its_first_token():
    sim = start(DIGITS)
    sim.run()
    assert sim.outputs["r"][-1].reasoning_tokens == 0
