"""Models come to the core and leave it while others are served."""

import pytest
from crosspool.config.deployment import MAX_MODELS, ConfigError
from crosspool.scheduler.changes import ModelAdded, ModelRefused, ModelRemoved
from crosspool.transport.messages import AddModel, Release, RemoveModel, Sleep, Wake
from crosspool.weightpool.placement import place
from simulation import Simulation, deployment, expected_tokens, request, spec


def simulation(models=1, **fields):
    return Simulation(deployment(models, **fields), [spec()] * models)


def kinds(sim):
    return [(device, type(order)) for device, order in sim.devices.orders]


def never_ending(tokens):
    return 7


def test_a_model_is_served_once_every_device_has_made_ready_for_it():
    sim = simulation(ranks=2)
    number = sim.load(spec(head_dim=12))
    assert kinds(sim) == [(0, AddModel), (1, AddModel), (2, AddModel)]
    assert not sim.changes and number not in sim.core.deployment.models
    assert [m["model"] for m in sim.snapshot()["models"]] == [0]
    sim.follow()
    assert sim.changes == [ModelAdded(number)]
    assert sim.core.deployment.models[number].name == "further"
    assert sim.core.deployment.next_model == number + 1
    asked = request("a", 10, 8, model=number)
    sim.add(asked)
    assert {kind for _, kind in kinds(sim)} == {Wake}, "it is asleep until it is asked for"
    sim.follow()
    sim.run()
    assert sim.tokens("a") == expected_tokens(asked, sim.specs[number])
    status = sim.snapshot()["models"][1]
    assert (status["model"], status["name"], status["residency"]["state"]) == (
        number,
        "further",
        "resident",
    )


def test_a_pinned_model_that_comes_is_woken():
    sim = simulation()
    number = sim.load(spec(), keep="pinned")
    sim.follow()
    assert sim.snapshot()["models"][1]["residency"]["state"] == "resident"
    assert sim.devices.has[0] >= {number}


def test_models_are_pinned_only_where_they_fit_beside_those_that_come_pinned():
    """Else a later scheduler could not begin with the deployment."""
    of_one = place(deployment(1), {0: spec()}).pool_bytes
    sim = simulation(weight_pool_bytes=of_one)
    number = sim.load(spec(), keep="pinned")
    with pytest.raises(ValueError, match=r"pinned models model0 .*, further"):
        sim.core.pin(0, "pinned")
    sim.follow()
    assert [model.keep for model in sim.core.deployment.models.values()] == ["demand", "pinned"]
    sim.core.pin(number, "demand")
    sim.core.pin(0, "pinned")
    place(sim.core.deployment, sim.specs)


def test_others_go_on_while_a_model_comes_and_leaves():
    sim = simulation()
    first = request("first", 10, 30)
    sim.add(first)
    number = sim.load(spec())
    sim.answer()
    sim.follow()
    sim.answer()
    sim.unload(number)
    sim.follow()
    assert sim.changes == [ModelAdded(number), ModelRemoved(number)]
    sim.run()
    assert sim.tokens("first") == expected_tokens(first, sim.specs[0])
    sim.assert_empty()


def test_a_model_that_a_device_refuses_leaves_everything_as_it_was():
    sim = simulation(ranks=2)
    before = sim.snapshot()
    number = sim.load(spec())
    (device, order), *others = sim.devices.orders
    sim.devices.orders = []
    sim.core.on_added(device, order.model, "its folder is gone")
    sim.schedule()
    assert [kind for _, kind in kinds(sim)] == [RemoveModel] * 3, "the one that refuses it, too"
    assert others and not sim.changes
    sim.follow()
    assert sim.changes == [ModelRefused(number, "its folder is gone")]
    assert sim.snapshot() == before and sim.core.deployment.models.keys() == {0}
    assert sim.load(spec()) == number + 1, "a number is not used again"
    sim.follow()
    assert sim.changes[1:] == [ModelAdded(number + 1)]


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"name": "model0"}, "there is a model of this name"),
        ({"kv_floor_bytes": 62 * 4096}, "kv_floor_bytes: the floors of all models come to 66"),
        ({"kv_ceiling_bytes": 0}, "kv_pool_bytes.*hold no page"),
    ],
)
def test_a_model_that_does_not_fit_is_refused_at_once(options, problem):
    sim = simulation(bounds={0: {"kv_floor_bytes": 4 * 4096}})
    before = sim.snapshot()
    wide = spec(layers=20, head_dim=200)
    with pytest.raises(ConfigError, match=problem):
        sim.load(wide, **options)
    sim.schedule()
    assert not sim.devices.orders and sim.snapshot() == before
    sim.add(request("a", 10, 8))
    sim.run()
    sim.assert_empty()


def test_weights_that_never_fit_are_refused_at_once():
    sim = simulation(weight_pool_bytes=4000)
    with pytest.raises(ConfigError, match="weight_pool_bytes is too small"):
        sim.load(spec(layers=8))


@pytest.mark.parametrize("promise", ["worst_case", "growth"])
def test_a_floor_for_which_running_requests_leave_no_room_is_refused_for_now(promise):
    sim = Simulation(
        deployment(1, kv_pool_bytes=20 * 4096, promise=promise), [spec(context=1000)], never_ending
    )
    sim.add(request("long", 10, 900))
    with pytest.raises(ConfigError, match=r"kv_floor_bytes.*try again later"):
        sim.load(spec(), kv_floor_bytes=12 * 4096)
    sim.core.abort("long")
    sim.schedule()
    sim.run()
    assert sim.load(spec(), kv_floor_bytes=12 * 4096)
    sim.follow()
    assert sim.core.max_tokens(0) < 900, "the floor counts from now on"


def test_a_floor_that_leaves_too_little_for_a_request_that_waits_is_refused_for_now():
    sim = Simulation(deployment(1, kv_pool_bytes=20 * 4096), [spec(context=1000)], never_ending)
    sim.lose()
    sim.add(request("long", 10, 900))
    before = sim.snapshot()
    with pytest.raises(ConfigError, match=r"requests that wait for model model0; try again later"):
        sim.load(spec(), kv_floor_bytes=12 * 4096)
    assert sim.snapshot() == before
    sim.core.abort("long")
    sim.schedule()
    assert sim.load(spec(), kv_floor_bytes=12 * 4096)


def test_a_model_leaves_when_its_requests_have_ended():
    sim = simulation(2)
    asked = request("a", 10, 8, model=1)
    sim.add(asked)
    sim.unload(1)
    assert sim.snapshot()["models"][1]["residency"]["state"] == "leaving"
    sim.add(request("late", 10, 8, model=1))
    assert sim.finish("late").status == 404 and "unloaded" in sim.finish("late").message
    sim.run()
    assert sim.tokens("a") == expected_tokens(asked, sim.specs[1])
    assert {kind for _, kind in kinds(sim)} == {Sleep}
    sim.follow()
    assert sim.changes == [ModelRemoved(1)]
    assert sim.core.deployment.models.keys() == {0}
    assert [m["model"] for m in sim.snapshot()["models"]] == [0]
    assert all(1 not in rank.layouts for rank in sim.ranks), "its cached pages were given up"
    sim.assert_empty()


def test_requests_of_a_model_that_leaves_end_after_its_time():
    sim = Simulation(deployment(1), [spec()], never_ending)
    sim.add(request("endless", 10, 200), request("waits", 10, 200))
    sim.unload(0, timeout=5.0)
    sim.answer()
    assert not sim.finished("endless")
    assert sim.core.next_deadline() == sim.now + 5.0
    sim.now += 5.0
    sim.schedule()
    assert {sim.finish(rid).status for rid in ("endless", "waits")} == {503}
    assert "unloaded before the request ended" in sim.finish("endless").message
    sim.run()
    sim.follow()
    assert sim.changes == [ModelRemoved(0)]


def test_chunks_go_before_the_model():
    """Messages to devices go before those to ranks, but a rank is told of chunks to unmap first."""
    sim = simulation()
    sim.add(request("a", 20, 2))
    sim.run()
    sim.core.remove_model(0, 1.0)
    sim.core.schedule()
    assert [type(m) for _, m in sim.core.drain_device_messages()] == [Sleep, Sleep]
    messages = sim.core.drain_messages()
    assert [type(m) for _, m in messages] == [Release] and messages[0][1].unmap_chunks
    for device in (0, 1):
        sim.core.on_slept(device, 0)
    sim.core.schedule()
    assert [type(m) for _, m in sim.core.drain_device_messages()] == [RemoveModel, RemoveModel]


def test_a_model_without_weights_and_pages_goes_at_the_next_deadline():
    sim = simulation()
    number = sim.load(spec())
    sim.follow()
    sim.core.remove_model(number, 60.0)
    assert sim.core.next_deadline() == sim.now
    sim.schedule()
    sim.follow()
    assert sim.changes[-1] == ModelRemoved(number)
    assert sim.core.next_deadline() is None


def test_what_leaves_takes_no_orders():
    sim = simulation(2)
    sim.add(request("a", 10, 30, model=1))
    sim.unload(1)
    for order in (
        lambda: sim.core.wake(1),
        lambda: sim.core.sleep(1),
        lambda: sim.core.pin(1, "pinned"),
    ):
        with pytest.raises(ValueError, match="model model1 is being unloaded"):
            order()
    with pytest.raises(ValueError, match="being loaded or unloaded"):
        sim.core.remove_model(1, 1.0)
    with pytest.raises(ValueError, match="no such model"):
        sim.core.remove_model(7, 1.0)
    number = sim.load(spec())
    with pytest.raises(ValueError, match="being loaded or unloaded"):
        sim.core.remove_model(number, 1.0)


def test_a_device_that_starts_again_during_a_load_is_told_again():
    sim = simulation()
    number = sim.load(spec())
    sim.core.lose_device(1)
    sim.devices.orders = [(d, o) for d, o in sim.devices.orders if d != 1]
    sim.schedule()
    sim.follow()
    assert not sim.changes, "the other device has not answered"
    sim.core.restore_device(1, [0], [0])
    sim.schedule()
    assert kinds(sim) == [(1, AddModel)]
    sim.follow()
    assert sim.changes == [ModelAdded(number)]


def test_a_device_that_has_read_an_older_file_lets_go_of_what_has_left():
    sim = simulation()
    number = sim.load(spec())
    sim.follow()
    sim.unload(number)
    sim.core.lose_device(1)
    sim.devices.orders = [(d, o) for d, o in sim.devices.orders if d != 1]
    sim.follow()
    assert sim.changes[1:] == []
    sim.core.restore_device(1, [0, number], [0, number])
    sim.devices.has[1] |= {number}
    sim.devices.takes[1] |= {number}
    sim.schedule()
    assert kinds(sim) == [(1, Sleep)], "it has read the weights, too"
    sim.follow()
    assert sim.changes[1:] == [ModelRemoved(number)]


def test_a_device_that_has_read_an_older_file_lets_go_of_what_is_gone():
    """Nobody else knows the model any more."""
    sim = simulation()
    number = sim.load(spec())
    sim.follow()
    sim.unload(number)
    sim.follow()
    assert sim.changes[1:] == [ModelRemoved(number)]
    sim.core.lose_device(1)
    sim.core.restore_device(1, [0, number], [0, number])
    sim.core.on_woken(1, number, "an expert cannot be read")
    sim.devices.has[1] |= {number}
    sim.devices.takes[1] |= {number}
    sim.schedule()
    assert kinds(sim) == [(1, Sleep)], "a device lets go of models without weights alone"
    sim.core.lose_device(1)
    sim.core.restore_device(1, [0, number], [0, number])
    sim.devices.has[1] |= {number}
    sim.devices.orders.clear()
    sim.schedule()
    assert kinds(sim) == [(1, Sleep)], "its next process as well"
    device, order = sim.devices.orders.pop()
    assert sim.devices.carry_out(device, order)
    sim.core.on_slept(device, order.model)
    sim.schedule()
    assert kinds(sim) == [(1, RemoveModel)]
    sim.follow()
    assert sim.changes[2:] == []


def test_a_served_model_that_a_later_device_cannot_take_leaves_by_itself():
    sim = Simulation(deployment(2), [spec()] * 2, never_ending)
    sim.add(request("a", 10, 100, model=1))
    sim.core.lose_device(1)
    sim.core.lose_ffn_rank(0)
    sim.schedule()
    sim.core.restore_ffn_rank(0)
    sim.core.restore_device(1, [0], [0])
    sim.devices.has[1].discard(1)
    sim.devices.takes[1].discard(1)
    sim.schedule()
    assert kinds(sim) == [(1, AddModel)], "it cannot wake what it does not know"
    (device, order) = next(o for o in sim.devices.orders if isinstance(o[1], AddModel))
    sim.devices.orders = [o for o in sim.devices.orders if o[1] is not order]
    sim.core.on_added(device, order.model, "its folder is gone")
    sim.schedule()
    assert sim.finish("a").status == 503


def test_a_later_device_wakes_a_served_model_once_it_knows_it():
    sim = Simulation(deployment(2), [spec()] * 2, never_ending)
    sim.core.lose_device(1)
    sim.core.restore_device(1, [0], [0])
    sim.devices.has[1].discard(1)
    sim.devices.takes[1].discard(1)
    sim.schedule()
    assert kinds(sim) == [(1, AddModel)]
    sim.core.on_added(1, 1, None)
    sim.schedule()
    assert kinds(sim) == [(1, AddModel), (1, Wake)]


def test_numbers_are_never_equal_modulo_the_devices_places():
    d = deployment(3)
    for _ in range(3 * MAX_MODELS):
        number = d.free_number()
        assert number >= d.next_model
        assert number % MAX_MODELS not in {n % MAX_MODELS for n in d.models}
        d = d.with_model(number, d.models[0])
        if len(d.models) > 10:
            d = d.without_model(sorted(d.models)[5])
    assert {0, 1, 2} <= d.models.keys(), "some stay for good"
    full = deployment(MAX_MODELS)
    with pytest.raises(ConfigError, match=f"models: there are {MAX_MODELS}"):
        full.free_number()


def test_a_thousand_models_come_and_leave_and_leave_nothing():
    sim = simulation()
    for cycle in range(1000):
        number = sim.load(spec(), name=f"cycle {cycle}")
        sim.follow()
        if cycle % 100 == 0:
            sim.add(request(f"r{cycle}", 10, 3, model=number))
            sim.follow()
            sim.run()
        sim.unload(number)
        sim.follow()
    assert len(sim.changes) == 2000 and number >= 1000
    roster = sim.core._roster
    kept = (
        *(roster.models, roster.queues, roster._layouts, roster.bounds.floors),
        *(roster.residency._models, roster._worth._sums, roster.order._last_turn),
        *(roster.devices._models, roster.ranks[0].running, roster.ranks[0].budget._step),
        roster.ranks[0].promises.evicted_pages,
    )
    assert max(map(len, kept)) <= 1
    assert roster.residency._held._failed == set()
    sim.assert_empty()


@pytest.mark.parametrize("error", [None, "its folder is gone"])
def test_another_model_of_the_name_takes_the_room_of_one_that_is_pinned(error):
    """Nobody else is refused the name, and where it cannot be woken, all is as before."""
    of_one = place(deployment(1), {0: spec()}).pool_bytes
    sim = simulation(weight_pool_bytes=of_one)
    sim.core.pin(0, "pinned")
    number = sim.load(spec(), name="model0", replaces=0)
    with pytest.raises(ConfigError, match="there is a model of this name"):
        sim.load(spec(), name="model0")
    sim.follow()
    assert not sim.core.is_resident(number)
    sim.core.begin_replacing(0, number)
    sim.schedule()
    sim.follow(error)
    asked = request("a", 10, 8)
    if error is None:
        assert sim.core.is_resident(number) and not sim.core.is_resident(0)
    else:
        with pytest.raises(ValueError, match="cannot be read: its folder is gone"):
            sim.core.is_resident(number)
        sim.core.end_replacing(0)
        sim.schedule()
        sim.follow()
        assert sim.core.is_resident(0)
        with pytest.raises(ValueError, match="is pinned"):
            sim.core.sleep(0)
    sim.add(asked)  # the one that is there already goes on until it is unloaded
    sim.follow()
    sim.run()
    assert sim.tokens("a") == expected_tokens(asked, sim.specs[0])
    sim.unload(0)
    sim.follow()
    assert ModelRemoved(0) in sim.changes
