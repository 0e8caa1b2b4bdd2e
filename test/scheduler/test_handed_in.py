"""Requests that an earlier scheduler had taken: another one goes on with them, behind the tokens
that the client has, and they end as if nothing had happened."""

from __future__ import annotations

import dataclasses

import pytest
from crosspool.scheduler.request import Grammar
from simulation import (
    EOS,
    Simulation,
    ToyMatcher,
    deployment,
    hashed_token,
    mixed_requests,
    request,
    spec,
)

DIGITS = set(range(48, 58))


class Client:
    """What a client gathers of one request, over all schedulers."""

    def __init__(self, r):
        self.request = r
        self.tokens, self.logprobs, self.prompt = [], [], []
        self.finish = None

    def take(self, outputs):
        for output in outputs:
            if output.first:
                assert output.token_ids[: len(self.tokens)] == self.tokens
                if self.tokens:
                    assert not output.prompt_logprobs
                self.tokens.clear()
            self.tokens += output.token_ids
            self.logprobs += output.output_logprobs
            self.prompt += output.prompt_logprobs
            self.finish = output.finish
            assert output.completion_tokens == len(self.tokens)

    def again(self):
        return dataclasses.replace(self.request, delivered=tuple(self.tokens))

    @property
    def answer(self):
        return self.tokens, self.finish, self.logprobs, self.prompt


def serve(d, requests, steps, schedulers, next_token=hashed_token):
    """Each scheduler but the last makes ``steps`` steps; returns the clients."""
    clients = [Client(r) for r in requests]
    for number in range(schedulers):
        sim = Simulation(d, [spec()] * 2, next_token)
        left = [client for client in clients if client.finish is None]
        sim.add(*(client.again() if number else client.request for client in left))
        for _ in range(steps):
            sim.answer_all()
        if number == schedulers - 1:
            sim.run()
            sim.assert_empty()
        for client in left:
            client.take(sim.outputs[client.request.rid])
    return clients


@pytest.mark.parametrize("fields", [{}, {"promise": "growth", "growth_tokens": 4}])
@pytest.mark.parametrize("lease", [1, 5])
def test_other_schedulers_after_any_number_of_steps_change_no_answer(fields, lease):
    d = deployment(
        2, loop="resident", lease_steps=lease, kv_pool_bytes=30 * 4096, chunked_prefill_size=16,
        **fields,
    )  # fmt: skip
    requests = mixed_requests(12)
    expected = [client.answer for client in serve(d, requests, 0, 1)]
    for steps in range(0, 40, 3):
        clients = serve(d, requests, steps, schedulers=2 + steps % 2)
        assert [client.answer for client in clients] == expected, steps


def test_tokens_that_were_held_back_are_drawn_again():
    """They may be the beginning of a stop string, or turn out not to be."""

    def words(tokens):
        return (97, 304, 98, 304, 99, 304, 305)[len(tokens) % 7]  # a xST b xST c xST OPy

    d = deployment(2)
    requests = [
        request(f"{i}", 5 + i, 40, model=i % 2, stream=True, stop_strings=("STOP", "TcxS"))
        for i in range(7)
    ]
    expected = [client.answer for client in serve(d, requests, 0, 1, words)]
    assert {answer[1].matched for answer in expected} == {"STOP", "TcxS"}
    for steps in range(16):
        clients = serve(d, requests, steps, 3, words)
        assert [client.answer for client in clients] == expected, steps


def test_they_are_never_refused_and_come_before_new_ones():
    d = deployment(1, max_queued_requests=2, max_running_requests=1, queue_timeout=5.0)
    sim = Simulation(d, [spec()], lambda tokens: 7)
    old = [request(f"old{i}", 6, 4) for i in range(5)]
    new = [request(f"new{i}", 6, 4) for i in range(2)]
    sim.add(*new, *(dataclasses.replace(r, delivered=()) for r in old))
    sim.now += 6.0
    sim.schedule()
    assert [sim.finish(r.rid).status for r in new] == [429, 429]
    assert not any(sim.finished(r.rid) for r in old)
    sim.run()
    assert sim.started == [r.rid for r in old]
    assert {sim.finish(r.rid).kind for r in old} == {"length"}


def test_new_requests_are_refused_while_old_ones_have_their_grammars_compiled():
    d = deployment(1, max_queued_requests=1, queue_timeout=5.0)
    sim = Simulation(d, [spec()])
    g = Grammar(kind="regex", source="x")
    old = [request(f"old{i}", 6, 4, grammar=g) for i in range(3)]
    sim.add(*(dataclasses.replace(r, delivered=()) for r in old))
    sim.add(request("new", 6, 4, grammar=g))
    sim.add(request("one too many", 6, 4, grammar=g))
    assert sim.finish("one too many").status == 429
    sim.now += 6.0
    sim.schedule()
    assert sim.finish("new").status == 429
    assert not any(sim.finished(r.rid) for r in old)


def test_a_grammar_goes_on_behind_what_was_delivered():
    sim = Simulation(deployment(1), [spec()], lambda tokens: 48)
    g = Grammar(kind="regex", source="[0-9]{4}")
    r = request("a", 6, 10, grammar=g, stream=True)
    sim.add(dataclasses.replace(r, delivered=(49, 50)))
    assert sim.grammars[0].outputs == [[49, 50]]
    matcher = ToyMatcher([DIGITS] * 4)
    matcher.position = 2
    sim.grammars[0].futures[0].set_result(matcher)
    sim.schedule()
    sim.run()
    assert sim.tokens("a") == [49, 50, 48, 48]
    assert sim.finish("a").kind == "stop"
    sim.assert_empty()


def test_what_was_thought_is_no_part_of_the_grammar():
    sim = Simulation(deployment(1), [spec()], lambda tokens: 48, think_ends=[(9,)])
    g = Grammar(kind="regex", source="[0-9]{4}")
    for rid, delivered in [("thinks", (5, 6)), ("has thought", (5, 9, 49))]:
        r = request(rid, 6, 10, grammar=g, thinks_first=True)
        sim.add(dataclasses.replace(r, delivered=delivered))
    assert sim.grammars[0].outputs == [[], [49]]


def test_a_grammar_that_cannot_be_followed_any_more_ends_the_request():
    sim = Simulation(deployment(1), [spec()])
    g = Grammar(kind="regex", source="[0-9]{4}")
    for rid in ("slow", "wrong"):
        sim.add(dataclasses.replace(request(rid, 6, 10, grammar=g), delivered=(49,)))
    slow, wrong = ToyMatcher([DIGITS] * 4), ToyMatcher([DIGITS] * 4)
    slow.error = "it takes too long"
    wrong.accepted = False
    sim.grammars[0].futures[0].set_result(slow)
    sim.grammars[0].futures[1].set_result(wrong)
    sim.schedule()
    assert (sim.finish("slow").status, sim.finish("slow").message) == (400, "it takes too long")
    assert sim.finish("wrong").status == 500
    assert sim.tokens("slow") == [49]
    sim.assert_empty()


def test_what_was_delivered_may_end_the_request():
    sim = Simulation(deployment(1), [spec()])
    sim.add(dataclasses.replace(request("a", 6, 10), delivered=(1, EOS)))
    sim.add(dataclasses.replace(request("b", 6, 3), delivered=(1, 2, 3)))
    assert (sim.finish("a").kind, sim.tokens("a")) == ("stop", [1, EOS])
    assert (sim.finish("b").kind, sim.tokens("b")) == ("length", [1, 2, 3])
    sim.assert_empty()


def test_what_is_computed_again_is_counted():
    sim = Simulation(deployment(1), [spec()], lambda tokens: 7)
    sim.add(dataclasses.replace(request("a", 20, 10), delivered=(7, 7, 7)))
    sim.add(dataclasses.replace(request("b", 20, 10), delivered=()))
    sim.run()
    model = sim.snapshot()["models"][0]
    assert (model["replayed_requests"], model["replayed_tokens"]) == (2, 23)
    assert (model["prompt_tokens"], model["output_tokens"]) == (20, 17)
