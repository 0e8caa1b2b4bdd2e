"""Leases: several decode steps of one message, which end when a request could join or must go."""

import pytest
from crosspool.transport.messages import Recall, Step, StepResult
from simulation import EOS, Simulation, deployment, expected_tokens, request, spec


def never_ending(tokens):
    return len(tokens) % 256


class Recorder(Simulation):
    """Records the messages to rank 0."""

    def __init__(self, models=1, next_token=never_ending, **fields):
        d = deployment(models, **({"loop": "resident", "lease_steps": 6} | fields))
        super().__init__(d, [spec()] * models, next_token)
        self.sent = []
        receive = self.ranks[0].receive

        def record(message):
            self.sent.append(message)
            receive(message)

        self.ranks[0].receive = record

    @property
    def steps(self):
        return [message for message in self.sent if isinstance(message, Step)]

    @property
    def recalls(self):
        return [message.step for message in self.sent if isinstance(message, Recall)]


def test_one_message_carries_several_steps():
    sim = Recorder()
    sim.add(request("a", 5, 14, stream=True))
    sim.run()
    # 14 tokens: the first step reads the prompt
    assert [step.lease for step in sim.steps] == [6, 6, 2]
    assert sim.tokens("a") == [n % 256 for n in range(5, 19)]
    assert len(sim.outputs["a"]) == 14  # streamed one by one
    assert not sim.recalls
    model = sim.snapshot()["models"][0]
    assert (model["steps"], model["decode_rows"], model["prompt_tokens"]) == (14, 13, 5)
    sim.assert_empty()


def test_pages_and_chunks_for_all_of_it_come_first():
    sim = Recorder(prefix_cache=False)
    sim.add(request("a", 5, 40))
    first = sim.steps[0]
    assert len(first.rows[0].pages) == 3  # 5 + 5 tokens in pages of 4
    sim.run()
    assert [len(s.rows[0].pages) for s in sim.steps] == [3, 1, 2, 1, 2, 1, 1]
    sim.assert_empty()


def test_the_host_loop_gets_no_leases():
    sim = Recorder(loop="host")
    sim.add(request("a", 5, 14))
    sim.run()
    assert {step.lease for step in sim.steps} == {1}


def test_a_newcomer_joins_at_the_next_step():
    sim = Recorder(lease_steps=100)
    sim.add(request("a", 5, 90, stream=True))
    for _ in range(3):
        sim.answer()
    sim.add(request("b", 7, 90, stream=True))
    assert sim.recalls == [sim.steps[0].step]
    sim.answer()  # the step that was under way
    assert len(sim.steps) == 2
    assert [len(row.tokens) for row in sim.steps[1].rows] == [1, 7]
    assert sim.steps[1].lease > 50
    sim.run()
    assert sim.tokens("a") == [n % 256 for n in range(5, 95)]
    assert sim.tokens("b") == [n % 256 for n in range(7, 97)]
    assert len(sim.recalls) == 1
    sim.assert_empty()


def test_an_abort_ends_it():
    sim = Recorder(lease_steps=100)
    sim.add(request("a", 5, 90), request("b", 5, 90))
    sim.answer()
    sim.answer()
    sim.core.abort("a")
    sim.schedule()
    assert sim.finish("a").status == 499
    assert sim.recalls == [sim.steps[-1].step]
    sim.answer()
    assert [row.request for row in sim.steps[-1].rows] == [2]
    sim.run()
    assert len(sim.tokens("b")) == 90
    sim.assert_empty()


def test_what_the_scheduler_must_see_is_not_leased():
    sim = Recorder()
    sim.add(request("a", 5, 9, stop_strings=("zzz",)))
    sim.run()
    assert {step.lease for step in sim.steps} == {1}


def test_a_stop_token_ends_it():
    sim = Recorder(next_token=lambda tokens: EOS if len(tokens) == 8 else 7)
    r = request("a", 5, 90)
    sim.add(r)
    sim.run()
    assert sim.tokens("a") == [7, 7, 7, EOS]
    assert len(sim.steps) == 1
    sim.assert_empty()


def test_more_models_than_lanes_take_turns():
    """Up to lanes + 1 models hold leases. A further model gets its turn within a step of each, and
    from then on there are no leases."""
    sim = Recorder(models=4, lanes=2, lease_steps=100)
    for model in range(3):
        sim.add(request(f"r{model}", 5, 90, model=model, stream=True))
    assert [step.lease for step in sim.steps] == [90] * 3
    for _ in range(5):
        sim.answer()
    sim.add(request("r3", 5, 90, model=3, stream=True))
    assert sorted(sim.recalls) == [0, 1, 2]
    for _ in range(8):
        sim.answer()
    assert len(sim.tokens("r3")) >= 1
    assert {step.lease for step in sim.steps[3:]} == {1}
    sim.run()
    for model in range(4):
        assert len(sim.tokens(f"r{model}")) == 90
    sim.assert_empty()


def test_a_device_may_end_a_lease_at_any_step():
    sim = Recorder()
    sim.ranks[0].goes_on = lambda step, rows: False
    sim.add(request("a", 5, 14))
    sim.run()
    assert len(sim.steps) == 14
    assert [len(s.rows[0].pages) for s in sim.steps[:4]] == [3, 0, 0, 1]
    assert sim.tokens("a") == [n % 256 for n in range(5, 19)]
    sim.assert_empty()


def test_the_same_tokens_as_without():
    requests = [request(f"r{i}", 3 + 5 * i, 40 + i) for i in range(6)]
    tokens = {}
    for lease_steps in (1, 5):
        sim = Simulation(deployment(1, loop="resident", lease_steps=lease_steps), [spec()])
        sim.add(*requests)
        sim.run()
        tokens[lease_steps] = [sim.tokens(r.rid) for r in requests]
        sim.assert_empty()
    assert tokens[1] == tokens[5] == [expected_tokens(r, spec()) for r in requests]


def test_more_steps_than_were_leased_are_an_error():
    sim = Recorder(lease_steps=1)
    sim.add(request("a", 5, 14))
    answer = sim.ranks[0].answer()
    with pytest.raises(ValueError, match="goes on with step 0, whose lease is over"):
        sim.core.on_result(0, StepResult(step=answer.step, rows=answer.rows, more=True))


@pytest.mark.parametrize("at_once", [2, 3, 4])
def test_steps_that_are_taken_at_once_are_those_taken_singly(at_once):
    """The steps of a lease behind its first, of which the last ends it, or does not."""
    singly, together = (Recorder(next_token=lambda tokens: 7) for _ in range(2))
    for sim in (singly, together):
        for rid in "ab":
            sim.add(request(rid, 5, 14))
        sim.answer()  # the prompt of the first one
        sim.answer()
        assert sim.steps[-1].lease == 6
    for _ in range(at_once):
        singly.now += 0.25
        result = singly.ranks[0].answer()
        assert result.more
        singly.core.on_result(0, result)
    results = [together.ranks[0].answer() for _ in range(at_once)]
    together.now += 0.25 * at_once
    together.core.on_result(0, results[-1], at_once)
    assert together.core.snapshot() == singly.core.snapshot()
    assert together.core.histograms() == singly.core.histograms()
    for sim in (singly, together):
        sim.schedule()
        sim.run()
        sim.assert_empty()
    assert together.outputs == singly.outputs
    assert together.core.snapshot() == singly.core.snapshot()
    with pytest.raises(ValueError, match="goes on with step"):
        together.add(request("c", 5, 14))
        together.core.on_result(0, together.ranks[0].answer(), 6)
