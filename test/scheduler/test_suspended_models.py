"""A model that is suspended makes no steps; the others go on as if it were not there."""

from simulation import Simulation, deployment, expected_tokens, request, spec


def never_ending(tokens):
    return 7


def test_its_requests_stand_still_and_then_go_on():
    sim = Simulation(deployment(2), [spec()] * 2)
    requests = [request(f"{m}-{i}", 6, 40, model=m) for m in (0, 1) for i in range(3)]
    sim.add(*requests)
    for _ in range(6):
        sim.answer()
    sim.core.suspend(0)
    sim.schedule()
    sim.run()
    assert [sim.finished(r.rid) for r in requests] == [False] * 3 + [True] * 3
    served = sim.ranks[0].served.count(0)
    sim.add(request("late", 6, 4))
    sim.run()
    assert sim.ranks[0].served.count(0) == served
    assert sim.snapshot()["models"][0]["waiting"] == 1
    sim.core.resume(0)
    sim.schedule()
    sim.run()
    for one in requests:
        assert sim.tokens(one.rid) == expected_tokens(one, spec())
    assert sim.finished("late")
    sim.assert_empty()


def test_a_lease_of_it_is_recalled():
    d = deployment(1, loop="resident", lease_steps=100)
    sim = Simulation(d, [spec()], never_ending)
    sim.add(request("a", 5, 90))
    sim.answer()
    sim.core.suspend(0)
    sim.schedule()
    sim.run()
    assert not sim.finished("a")
    assert sim.ranks[0].leased_steps <= 2
    sim.core.resume(0)
    sim.schedule()
    sim.run()
    assert len(sim.tokens("a")) == 90
    sim.assert_empty()


def test_prompts_that_it_has_not_read_keep_nobody_from_reading():
    """While a request generates, one model at a time reads prompts."""
    d = deployment(3, chunked_prefill_size=8)
    sim = Simulation(d, [spec()] * 3, never_ending)
    sim.add(request("answering", 4, 60, model=1), request("long", 200, 4))
    for _ in range(6):
        sim.answer()
    sim.core.suspend(0)
    sim.schedule()
    sim.add(request("other", 40, 4, model=2))
    sim.run()
    assert sim.finished("answering") and sim.finished("other")
    assert not sim.finished("long")


def test_its_requests_can_be_aborted_and_wait_no_longer_than_ever():
    sim = Simulation(deployment(1, queue_timeout=5.0), [spec()], never_ending)
    sim.add(request("running", 6, 40))
    sim.answer()
    sim.core.suspend(0)
    sim.add(request("waiting", 6, 40))
    sim.run()
    sim.core.abort("running")
    sim.now += 5.0
    sim.schedule()
    assert sim.finish("running").status == 499
    assert sim.finish("waiting").status == 429
    assert "paused" in sim.finish("waiting").message
    sim.assert_empty()
