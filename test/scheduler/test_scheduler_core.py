"""Requests through the core and simulated attention ranks, one behaviour each."""

import pytest
from crosspool.scheduler.request import Finish
from crosspool.transport.messages import Logprobs, RowResult, StepResult
from simulation import EOS, Simulation, deployment, expected_tokens, request, spec


def scripted(*script: int):
    """A rank that answers every sequence with ``script``, whatever its prompt of 3 tokens."""
    return lambda tokens: script[len(tokens) - 3]


def test_tokens_come_back_in_order_and_the_pool_is_empty_afterwards():
    sim = Simulation(deployment(1), [spec()])
    requests = [request(f"r{i}", 5 + 13 * i, 12, stream=i % 2 == 0) for i in range(5)]
    sim.add(*requests)
    sim.run()
    for r in requests:
        assert sim.tokens(r.rid) == expected_tokens(r, sim.specs[0])
        assert len(sim.outputs[r.rid]) == (len(sim.tokens(r.rid)) if r.stream else 1)
    sim.assert_empty()


def test_a_step_mixes_decode_rows_with_prompt_chunks_up_to_the_limit():
    sim = Simulation(deployment(1, chunked_prefill_size=32), [spec()], scripted(*range(50)))
    sim.add(request("short", 3, 10))
    sim.add(request("long", 70, 1), request("next", 10, 1))
    sim.answer()
    shapes = []
    while len(sim.ranks[0].tokens) != 1:
        shapes.append([len(row.tokens) for row in sim.ranks[0].steps[0].rows])
        sim.ranks[0].next_token = lambda tokens: 7
        sim.answer()
    assert shapes == [[1, 32], [1, 32], [1, 6, 10]]


def test_the_last_token_needs_no_step_of_its_own():
    sim = Simulation(deployment(1), [spec()], scripted(1, 2, 3))
    sim.add(request("r", 3, 3))
    sim.run()
    assert sim.tokens("r") == [1, 2, 3]
    assert len(sim.ranks[0].served) == 3


@pytest.mark.parametrize(
    ("rules", "tokens", "finish"),
    [
        ({}, [1, 2, EOS], Finish(kind="stop", matched=EOS)),
        ({"ignore_eos": True}, [1, 2, EOS, 4, 5, 6], Finish(kind="length")),
        ({"stop_token_ids": frozenset({2})}, [1, 2], Finish(kind="stop", matched=2)),
        (
            {"stop_token_ids": frozenset({4}), "ignore_eos": True},
            [1, 2, EOS, 4],
            Finish(kind="stop", matched=4),
        ),
        ({"stop_token_ids": frozenset({6}), "ignore_eos": True}, [1, 2, EOS, 4, 5, 6], 6),
        ({"min_new_tokens": 3}, [1, 2, EOS, 4, 5, 6], Finish(kind="length")),
        ({"min_new_tokens": 2}, [1, 2, EOS], Finish(kind="stop", matched=EOS)),
    ],
)
def test_tokens_that_end_a_request(rules, tokens, finish):
    sim = Simulation(deployment(1), [spec()], scripted(1, 2, EOS, 4, 5, 6, 7))
    sim.add(request("r", 3, 6, **rules))
    sim.run()
    assert sim.tokens("r") == tokens
    assert sim.finish("r") == (
        Finish(kind="stop", matched=finish) if isinstance(finish, int) else finish
    )


def test_the_rank_is_told_which_tokens_to_bar_until_min_new_tokens():
    sim = Simulation(deployment(1), [spec()])
    sim.add(request("r", 3, 6, min_new_tokens=4, stop_token_ids=frozenset({9, 5, 10**6})))
    (sampling,) = sim.ranks[0].sampling.values()
    assert sampling.min_new_tokens == 4
    assert sampling.stop_token_ids == (5, 9, EOS)


@pytest.mark.parametrize("max_new_tokens", [None, 1000])
def test_output_ends_at_the_context(max_new_tokens):
    sim = Simulation(deployment(1), [spec(context=40)], lambda tokens: 7)
    sim.add(request("r", 10, max_new_tokens))
    sim.run()
    assert sim.tokens("r") == [7] * 30
    assert sim.finish("r") == Finish(kind="length")


def test_without_max_new_tokens_a_small_pool_limits_instead_of_refusing():
    d = deployment(1, kv_pool_bytes=4 * 4096)
    sim = Simulation(d, [spec(context=100_000)], lambda tokens: 7)
    sim.add(request("r", 10, None))
    sim.run()
    assert len(sim.tokens("r")) == 4 * 4096 // 64 - 10
    assert sim.finish("r") == Finish(kind="length")
    sim.assert_empty()


def test_max_new_tokens_0_computes_the_prompt_only():
    sim = Simulation(deployment(1), [spec()])
    sim.add(request("r", 70, 0, logprobs=Logprobs(prompt_start=60), stream=True))
    assert [row.sample for row in sim.ranks[0].steps[0].rows] == [False]
    sim.run()
    (output,) = sim.outputs["r"]
    assert output.finish == Finish(kind="length")
    assert output.token_ids == [] and output.completion_tokens == 0
    assert [p.logprob for p in output.prompt_logprobs] == [-float(p) for p in range(60, 70)]
    sim.assert_empty()


def test_a_prompt_as_long_as_the_context_is_welcome_if_nothing_follows():
    sim = Simulation(deployment(1), [spec(context=40)])
    sim.add(request("prefill", 40, 0), request("more", 40, 1))
    sim.run()
    assert sim.finish("prefill") == Finish(kind="length")
    assert sim.finish("more").status == 400


@pytest.mark.parametrize("start", [0, 1, 31, 32, 33, 69, 70])
@pytest.mark.parametrize("stream", [True, False])
def test_prompt_logprobs_cover_every_chunk_in_order(start, stream):
    sim = Simulation(deployment(1, chunked_prefill_size=32), [spec()])
    r = request("r", 70, 4, stream=stream, logprobs=Logprobs(output=True, prompt_start=start))
    sim.add(r)
    sim.run()
    first, *later = sim.outputs["r"]
    assert [p.token for p in first.prompt_logprobs] == r.input_ids[start:]
    assert [p.logprob for p in first.prompt_logprobs] == [
        -float(p) if p else None for p in range(start, 70)
    ]
    assert bool(later) == stream
    for output in sim.outputs["r"]:
        assert [p.token for p in output.output_logprobs] == output.token_ids


def test_abort_waiting_running_and_in_flight():
    sim = Simulation(deployment(1, max_running_requests=2), [spec()], lambda tokens: 7)
    sim.add(*(request(f"{name}", 8, 20) for name in ("a1", "a2", "b1", "b2")))
    sim.answer()
    sim.answer()
    assert sim.ranks[0].steps and not sim.outputs
    for rid in ("a1", "a2", "b2"):
        sim.core.abort(rid)
    sim.schedule()
    for rid, tokens in (("a1", 2), ("a2", 2), ("b2", 0)):
        assert sim.finish(rid).kind == "abort" and sim.finish(rid).status == 499
        assert sim.tokens(rid) == [7] * tokens
    assert len(sim.ranks[0].model) == 2, "released before the step in flight was answered"
    sim.run()
    assert sim.finish("b1").kind == "length"
    sim.assert_empty()


def test_a_request_aborted_before_its_first_step_is_unknown_to_the_rank():
    sim = Simulation(deployment(1), [spec()])
    sim.add(request("running", 8, 20))
    sim.add(request("admitted", 200, 20))
    promised = sim.snapshot()["ranks"][0]["promised_chunks"]
    sim.core.abort("admitted")
    sim.schedule()
    assert sim.snapshot()["ranks"][0]["promised_chunks"] < promised
    assert len(sim.ranks[0].ever_opened) == 1
    sim.run()
    sim.assert_empty()


def test_an_abort_ends_the_request_of_that_id_and_of_that_model_alone():
    sim = Simulation(deployment(2), [spec(), spec()])
    sim.add(*(request(rid, 8, 20, model=i % 2) for i, rid in enumerate(("a", "ab", "a_0", "aa"))))
    for rid in ("", "A", "a_"):
        sim.core.abort(rid)
    sim.core.abort("a", model=1)
    sim.schedule()
    assert not any(sim.finished(rid) for rid in sim.outputs)
    sim.core.abort("a", message="gone")
    sim.core.abort("ab", model=1)
    sim.schedule()
    assert sim.finish("a").message == "gone" and sim.finish("ab").status == 499
    sim.run()
    for rid in ("a_0", "aa"):
        assert sim.finish(rid).kind == "length" and len(sim.tokens(rid)) == 20
    sim.assert_empty()


def test_full_queue_is_refused_at_once():
    d = deployment(2, max_running_requests=1, max_queued_requests=2)
    sim = Simulation(d, [spec(), spec()], lambda tokens: 7)
    sim.add(*(request(f"r{i}", 8, 20) for i in range(4)), request("other", 8, 20, model=1))
    finish = sim.finish("r3")
    assert finish.kind == "abort" and finish.status == 429
    assert finish.message == "the queue of model model0 is full (2 waiting); retry later"
    sim.run()
    assert all(sim.finish(rid).kind == "length" for rid in ("r0", "r1", "r2", "other"))
    assert sim.snapshot()["models"][0]["aborted"] == {"429": 1}


def test_a_request_that_waited_too_long_is_refused():
    d = deployment(1, max_running_requests=1, queue_timeout=10.0, watchdog_timeout=1e6)
    sim = Simulation(d, [spec()], lambda tokens: 7)
    sim.add(request("running", 8, 20))
    sim.now += 4
    sim.add(request("waiting", 8, 20))
    assert sim.core.next_deadline() == sim.now + 10
    sim.now += 9.5
    sim.schedule()
    assert not sim.finished("waiting")
    sim.now += 0.5
    sim.schedule()
    assert sim.finish("waiting").status == 429 and "10 s" in sim.finish("waiting").message
    sim.run()
    assert sim.finish("running").kind == "length"
    sim.assert_empty()


def test_a_request_larger_than_the_pool_is_refused_and_the_largest_is_not():
    d = deployment(1, kv_pool_bytes=16 * 4096)
    sim = Simulation(d, [spec(context=100_000)], lambda tokens: 7)
    most = 16 * 4096 // 64
    sim.add(request("small", 30, 5))
    sim.add(request("fits", 24, most - 24), request("too large", 24, most - 23))
    finish = sim.finish("too large")
    assert finish.status == 400
    assert "65536 bytes" in finish.message and f"{65536 + 256} bytes" in finish.message
    sim.run()
    assert len(sim.tokens("fits")) == most - 24


def test_a_lost_rank_ends_everything():
    sim = Simulation(deployment(2, ranks=2), [spec(), spec()], lambda tokens: 7)
    sim.add(*(request(f"r{i}", 8, 20, model=i % 2) for i in range(40)))
    sim.answer_all()
    result = sim.ranks[1].answer()
    sim.core.fail_all("attention rank 0 is gone")
    sim.core.on_result(1, result)
    sim.schedule()
    sim.add(request("late", 8, 20))
    for rid in [*(f"r{i}" for i in range(40)), "late"]:
        assert sim.finish(rid) == Finish(
            kind="abort", message="attention rank 0 is gone", status=503
        )
    assert sim.idle and sim.core.next_deadline() is None
    assert sim.snapshot()["failure"] == "attention rank 0 is gone"


def test_a_step_without_result_is_overdue():
    sim = Simulation(deployment(1, watchdog_timeout=30.0), [spec()])
    sim.add(request("r", 8, 20))
    assert sim.core.next_deadline() == sim.now + 30
    assert sim.core.overdue(sim.now + 29) is None
    assert sim.core.overdue(sim.now + 30) == (
        "attention rank 0 (cuda:0) has not finished step 0 of model model0 for 30 s"
    )
    sim.run()
    assert sim.core.overdue(sim.now + 1000) is None


def test_results_that_answer_no_step_are_an_error():
    sim = Simulation(deployment(1), [spec()])
    sim.add(request("r", 8, 20))
    with pytest.raises(ValueError, match="unknown step 5"):
        sim.core.on_result(0, StepResult(step=5, rows=[]))
    with pytest.raises(ValueError, match="step 0"):
        sim.core.on_result(0, StepResult(step=0, rows=[RowResult(request=1)]))


def test_snapshot_counts():
    sim = Simulation(deployment(2, max_running_requests=1), [spec(), spec()], lambda tokens: 7)
    sim.add(request("a", 40, 3), request("b", 8, 3), request("bad", [], 3))
    before = sim.snapshot()
    assert before["models"][0]["running"] == 1 and before["models"][0]["waiting"] == 1
    assert before["models"][0]["promised_bytes"] == 4096 == before["ranks"][0]["mapped_bytes"]
    assert before["ranks"][0]["free_bytes"] == 63 * 4096
    sim.run()
    model = sim.snapshot()["models"][0]
    assert model["requests"] == 3 and model["admitted"] == 2
    assert model["finished"] == {"stop": 0, "length": 2} and model["aborted"] == {"400": 1}
    assert model["prompt_tokens"] == 48 and model["output_tokens"] == 6
    assert model["steps"] == 2 + 2 + 1 + 2 and model["decode_rows"] == 4
    assert model["largest_batch"] == 1


@pytest.mark.parametrize("wanted", [{"top": 2}, {"token_ids": (4, 5)}])
def test_a_request_that_generates_nothing_is_told_what_could_come_next(wanted):
    sim = Simulation(deployment(1, chunked_prefill_size=32), [spec()])
    logprobs = Logprobs(output=True, prompt_start=0, **wanted)
    sim.add(request("scored", 70, 0, logprobs=logprobs), request("beside", 9, 5))
    sim.run()
    (output,) = sim.outputs["scored"]
    assert (output.token_ids, output.completion_tokens) == ([], 0)
    assert output.finish == Finish(kind="length")
    assert len(output.prompt_logprobs) == 70
    (position,) = output.output_logprobs
    assert (position.token, position.logprob) == (-1, None)
    assert sim.tokens("beside") == expected_tokens(request("beside", 9, 5), sim.specs[0])
    assert sim.core.snapshot().models[0].output_tokens == len(sim.tokens("beside"))
    sim.assert_empty()


def test_a_request_that_generates_nothing_and_asks_for_nothing_is_not_sampled():
    sim = Simulation(deployment(1), [spec()])
    sim.add(request("r", 5, 0, logprobs=Logprobs(output=True)))
    assert not any(row.sample for row in sim.ranks[0].steps[0].rows)
    sim.run()
    assert sim.outputs["r"][0].output_logprobs == []
