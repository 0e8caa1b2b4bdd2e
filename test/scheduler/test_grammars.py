"""Requests under a grammar; the toy grammar is one set of allowed tokens after another."""

from crosspool.scheduler.request import Finish, Grammar
from simulation import EOS, Simulation, ToyMatcher, bitmask_of, deployment, request, spec

GRAMMAR = Grammar(kind="regex", source="[0-9]{3}")
DIGITS = set(range(48, 58))


def start(*allowed: set[int], next_token=lambda tokens: 50, **fields) -> Simulation:
    """A running request whose grammar allows these sets one after another."""
    sim = Simulation(deployment(1), [spec()], next_token)
    sim.add(request("r", 3, 8, grammar=GRAMMAR, **fields))
    assert not sim.ranks[0].steps
    sim.grammars[0].futures[0].set_result(ToyMatcher(list(allowed)))
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
    matcher.fill_bitmask = lambda: bitmask_of({65})
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
