"""The core with more models than fit: requests wait while a model is woken, its weights go and come
back, its KV stays."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import pytest
from crosspool.transport.messages import Sleep
from crosspool.weightpool.placement import place
from simulation import Simulation, deployment, expected_tokens, request, spec


def never_ending(tokens):
    return 7


def bytes_of_one(specs):
    return place(deployment(len(specs)), specs).weight_bytes[0][0]


def simulation(models=2, room=1, keep=None, next_token=None, **fields):
    """A weight pool for ``room`` of ``models``."""
    specs = [spec()] * models
    d = deployment(models, weight_pool_bytes=room * bytes_of_one(specs), **fields)
    d = msgspec.structs.replace(
        d,
        models={
            number: msgspec.structs.replace(model, keep=(keep or {}).get(number, "demand"))
            for number, model in d.models.items()
        },
    )
    return Simulation(d, specs, *([next_token] if next_token else []))


def state(sim, model):
    return sim.snapshot()["models"][model]["residency"]["state"]


def test_a_request_waits_while_its_model_is_woken():
    sim = simulation()
    assert [state(sim, model) for model in (0, 1)] == ["resident", "asleep"]
    sim.add(asked := request("a", 5, 6, model=1))
    assert [state(sim, model) for model in (0, 1)] == ["falling_asleep", "waking"]
    assert not sim.ranks[0].steps and sim.snapshot()["models"][1]["waiting"] == 1
    sim.core.on_waking(0, 1, 5, 10)
    sim.follow()
    sim.run()
    assert sim.tokens("a") == expected_tokens(asked, spec())
    told = sim.snapshot()["models"][1]["residency"]
    assert told["state"] == "resident" and told["wakes"] == 1 and told["idle_seconds"] == 0.0
    assert sim.snapshot()["models"][0]["residency"]["sleeps"] == 1
    sim.assert_empty()


def test_a_model_with_requests_gives_way_after_the_quantum_and_keeps_its_kv():
    sim = simulation(next_token=never_ending, loop="resident", lease_steps=50)
    sim.add(request("first", 9, 60))
    sim.answer()
    sim.add(request("second", 9, 60, model=1))
    sim.now += 9.9
    sim.schedule()
    assert not sim.devices.orders
    sim.now += 0.1
    assert sim.core.next_deadline() == sim.now
    sim.schedule()
    assert not sim.devices.orders or state(sim, 0) == "falling_asleep"
    sim.run()
    done = len(sim.tokens("first"))
    sim.follow()
    sim.run()
    assert sim.finished("second") and not sim.finished("first")
    assert sim.snapshot()["ranks"][0]["running"] == 1
    sim.now += 10.0
    sim.schedule()
    sim.follow()
    sim.run()
    assert len(sim.tokens("first")) == 60 > done
    assert sim.snapshot()["models"][0]["replayed_tokens"] == 0
    assert sim.snapshot()["models"][0]["prompt_tokens"] == 9
    sim.assert_empty()


def test_cached_prefixes_survive_sleep():
    sim = simulation()
    prompt = list(range(40, 60))
    for rid, model in (("a", 0), ("b", 1), ("c", 0)):
        sim.add(request(rid, [*prompt, ord(rid)], 4, model=model))
        sim.follow()
        sim.run()
        assert sim.finished(rid)
    assert sim.snapshot()["models"][0]["residency"]["wakes"] == 1
    assert sim.snapshot()["models"][0]["cached_tokens"] == 20


def test_a_failed_wake_ends_the_requests_that_wait_for_it():
    sim = simulation()
    sim.add(request("a", 5, 6, model=1), request("b", 5, 6, model=1), request("c", 5, 6))
    sim.now += 11
    sim.schedule()
    sim.run()
    sim.follow(error="model.safetensors is gone")
    for rid in ("a", "b"):
        assert sim.finish(rid).status == 503 and sim.finish(rid).retry_after == 10
        assert "model.safetensors is gone" in sim.finish(rid).message
    sim.add(request("d", 5, 6, model=1))
    assert sim.finish("d").status == 503
    sim.now += 10
    sim.add(request("e", 5, 6, model=1))
    sim.follow()
    sim.run()
    assert sim.finished("c") and sim.finish("e").kind != "abort"
    sim.assert_empty()


def test_a_model_that_does_not_fit_beside_pinned_ones_is_refused_at_once():
    sim = simulation(keep={0: "pinned"})
    sim.add(request("a", 5, 6, model=1))
    assert sim.finish("a").status == 503
    assert "models that are pinned (model0) take" in sim.finish("a").message
    sim.core.pin(0, "demand")
    assert [model.keep for model in sim.core.deployment.models.values()] == ["demand"] * 2
    sim.add(request("b", 5, 6, model=1))
    assert not sim.finished("b")
    sim.follow()
    sim.run()
    sim.core.sleep(1)
    sim.schedule()
    sim.core.pin(0, "pinned")
    sim.schedule()
    sim.follow()
    assert state(sim, 0) == "resident"
    sim.add(request("c", 5, 6))
    sim.run()
    assert sim.finished("c")


def test_requests_that_wait_for_a_model_end_when_another_is_pinned_in_its_place():
    sim = simulation(next_token=never_ending)
    sim.add(request("runs", 5, 60))
    sim.answer()
    sim.add(request("waits", 5, 6, model=1))
    sim.core.pin(0, "pinned")
    sim.schedule()
    assert sim.finish("waits").status == 503
    sim.run()
    assert sim.finished("runs")
    with pytest.raises(ValueError, match="model1 cannot be woken"):
        sim.core.pin(1, "pinned")


def test_a_request_that_waits_too_long_is_told_that_the_model_sleeps():
    sim = simulation(queue_timeout=5.0)
    sim.add(request("a", 5, 6, model=1))
    sim.now += 5.0
    sim.schedule()
    assert sim.finish("a").status == 429
    assert "the model sleeps, and could not be woken in 5 s" in sim.finish("a").message
    sim.follow()
    sim.assert_empty()


def test_health_checks_are_no_use_of_a_model():
    sim = simulation(2, room=2)
    sim.add(replace(request("probe", 5, 2), is_probe=True))
    sim.run()
    sim.now += 60
    assert sim.snapshot()["models"][0]["residency"]["idle_seconds"] is None


def test_a_restarted_ffn_device_is_told_what_it_lacks_and_steps_in_flight_wait():
    sim = simulation(watchdog_timeout=20.0)
    sim.add(asked := request("a", 5, 6))
    sim.core.lose_ffn_rank(0)
    sim.core.lose_device(1)
    sim.devices.has[1].clear(), sim.devices.takes[1].clear()
    sim.schedule()
    sim.core.restore_ffn_rank(0)
    sim.core.restore_device(1, range(2), [])
    sim.schedule()
    assert state(sim, 0) == "waking"
    sim.now += 30.0
    assert sim.core.overdue(sim.now) is None
    sim.follow()
    assert state(sim, 0) == "resident"
    sim.now += 19.0
    assert sim.core.overdue(sim.now) is None
    sim.now += 1.0
    assert sim.core.overdue(sim.now) is not None
    sim.run()
    assert sim.tokens("a") == expected_tokens(asked, spec())


def test_one_attention_rank_that_lacks_a_model_leaves_the_others_going():
    sim = simulation(1, ranks=2, next_token=never_ending)
    sim.add(*(request(f"{n}", 8, 30) for n in range(4)))
    sim.answer_all()
    sim.lose(0)
    sim.core.lose_device(0)
    sim.devices.has[0].clear(), sim.devices.takes[0].clear()
    sim.restore(0)
    sim.core.restore_device(0, range(1), [])
    sim.schedule()
    assert not sim.ranks[0].steps
    while sim.ranks[1].steps:
        sim.answer(1)
    assert all(sim.finished(str(n)) for n in range(4))
    sim.follow()
    sim.add(request("later", 8, 3))
    assert sim.ranks[0].steps or sim.ranks[1].steps


def waking(sim, share=0.75):
    """Model 1 is asked for, and of its weights so much is read."""
    sim.add(asked := request("asleep", 5, 6, model=1))
    while sim.devices.orders and isinstance(sim.devices.orders[0][1], Sleep):
        device, order = sim.devices.orders.pop(0)
        sim.devices.carry_out(device, order)
        sim.core.on_slept(device, order.model)
        sim.schedule()
    for device in (0, 1):
        sim.core.on_waking(device, 1, int(1000 * share), 1000)
    sim.schedule()
    return asked


def test_the_first_step_begins_before_the_last_weights_are_read():
    sim = simulation(watchdog_timeout=20.0)
    asked = waking(sim, 0.7)
    assert not sim.ranks[0].steps
    for device in (0, 1):
        sim.core.on_waking(device, 1, 750, 1000)
    sim.schedule()
    assert [step.model for step in sim.ranks[0].steps] == [1]
    assert state(sim, 1) == "waking"
    sim.now += 60.0
    assert sim.core.overdue(sim.now) is None
    sim.follow()
    sim.run()
    assert sim.tokens("asleep") == expected_tokens(asked, spec())


def test_it_does_not_begin_on_the_only_lane():
    sim = simulation(lanes=1)
    waking(sim)
    assert not sim.ranks[0].steps
    sim.follow()
    assert sim.ranks[0].steps


def test_it_does_not_begin_while_another_model_makes_steps():
    sim = simulation(3, room=2, next_token=never_ending)
    sim.add(request("busy", 5, 40, model=0))
    sim.core.sleep(1)
    sim.schedule()
    sim.follow()
    waking(sim)
    assert [step.model for step in sim.ranks[0].steps] == [0]
    sim.run()
    assert sim.finished("busy")
    assert [step.model for step in sim.ranks[0].steps] == [1] or sim.devices.orders


def test_others_read_prompts_and_generate_while_it_waits_for_its_weights():
    sim = simulation(3, room=2, next_token=never_ending)
    sim.core.sleep(1)
    sim.schedule()
    sim.follow()
    waking(sim)
    assert [step.model for step in sim.ranks[0].steps] == [1]
    sim.add(*(request(f"other{n}", 40, 9) for n in range(3)))
    while not all(sim.finished(f"other{n}") for n in range(3)):
        (place,) = [i for i, step in enumerate(sim.ranks[0].steps) if step.model != 1]
        sim.answer(0, place)
    assert not sim.finished("asleep")


def test_a_step_that_began_early_is_refused_when_the_wake_fails():
    sim = simulation()
    waking(sim)
    sim.core.on_result(0, sim.ranks[0].refuse())
    sim.schedule()
    sim.devices.orders.sort(key=lambda entry: -entry[0])
    sim.follow(error="disk error")
    if sim.ranks[0].steps:
        sim.core.on_result(0, sim.ranks[0].refuse())
        sim.schedule()
        sim.follow()
    assert sim.finish("asleep").status == 503
    assert "disk error" in sim.finish("asleep").message
    assert state(sim, 1) == "asleep"
    sim.assert_empty()


def test_requests_of_a_refused_step_are_computed_again():
    sim = simulation(1)
    asked = [request("a", 9, 8), request("b", 7, 8)]
    sim.add(*asked)
    sim.answer(), sim.answer()
    sim.core.on_result(0, sim.ranks[0].refuse())
    sim.schedule()
    sim.run()
    for one in asked:
        assert sim.tokens(one.rid) == expected_tokens(one, spec())
    assert sim.snapshot()["models"][0]["replayed_requests"] == 2
    sim.assert_empty()
