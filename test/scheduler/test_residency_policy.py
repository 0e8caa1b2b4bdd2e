"""The policy of which models are in memory, alone: turns, room, pins, failures, restarts."""

from __future__ import annotations

import math
from collections import defaultdict

import pytest
from crosspool.config.deployment import ModelConfig
from crosspool.scheduler.budgets import Budgets, WeightPlace
from crosspool.scheduler.residency import ResidencyPolicy
from crosspool.scheduler.worth import RecentRate
from crosspool.transport.messages import Sleep, Wake
from hypothesis import given, settings
from hypothesis import strategies as st

QUANTUM = 10.0


class Pool:
    """One FFN device with ``budget`` bytes beside an attention device without a bound, on a clock
    of its own. Reading takes ``seconds_per_byte``, sleeping ``sleep_seconds``; a model's work goes
    on while it has any."""

    def __init__(
        self,
        sizes: list[int],
        budget: int,
        resident: set[int] = frozenset(),
        seconds_per_byte: float = 0.0,
        sleep_seconds: float = 0.0,
        **options: dict[int, object],
    ) -> None:
        self.now = 0.0
        self.sizes, self.budget = sizes, budget
        self.speed, self.sleep_seconds = seconds_per_byte, sleep_seconds
        each = {
            n: ModelConfig(
                name=f"m{n}", path="/", **{name: of[n] for name, of in options.items() if n in of}
            )
            for n in range(len(sizes))
        }
        places = [
            WeightPlace(0, "attention", None, dict.fromkeys(each, 1)),
            WeightPlace(1, "ffn", budget, dict(enumerate(sizes))),
        ]
        self.held = {0: set(resident), 1: set(resident)}
        self.waking: set[tuple[int, int]] = set()
        self.residency = ResidencyPolicy(
            Budgets(places),
            each,
            resident,
            quantum=QUANTUM,
            worth=RecentRate(10 * len(sizes)),
            now=0.0,
        )
        self.work: set[int] = set()
        self.in_flight: set[int] = set()
        self.due: list[tuple[float, int, int, bool]] = []
        """Replies to come: (time, device, model, whether it is woken)."""
        self.broken: dict[int, str] = {}

    def ask(self, *models: int) -> None:
        for model in models:
            self.residency.used(model, self.now)
            self.work.add(model)
        self.turn()

    def done(self, *models: int) -> None:
        self.work.difference_update(models)
        self.turn()

    def turn(self) -> None:
        self.residency.decide(self.work, self.now)
        for device, message in self.residency.orders(self.in_flight):
            model = message.model
            if isinstance(message, Wake):
                assert model not in self.held[device]
                self.held[device].add(model)
                taken = sum(self.sizes[m] for m in self.held[1])
                assert taken <= self.budget, "more than there is room for"
                seconds = self.sizes[model] * self.speed
            else:
                assert model in self.held[device] and model not in self.in_flight
                seconds = self.sleep_seconds
            self.due.append((self.now + seconds, device, model, isinstance(message, Wake)))
        if not self.speed and not self.sleep_seconds:
            self.reply()

    def reply(self) -> None:
        """Gives the replies that are due."""
        due = sorted(entry for entry in self.due if entry[0] <= self.now)
        self.due = [entry for entry in self.due if entry[0] > self.now]
        for _, device, model, woken in due:
            if woken and model in self.broken:
                self.held[device].discard(model)
                self.residency.failed(device, model, self.broken[model], self.now)
            elif woken:
                self.residency.woken(device, model, self.now)
            else:
                self.held[device].discard(model)
                self.residency.slept(device, model)
        if due:
            self.turn()

    def pass_time(self, until: float) -> None:
        """Goes on to clock time ``until``, from one thing that happens to the next."""
        while True:
            deadline = self.residency.next_deadline()
            times = [at for at, *_ in self.due] + [max(deadline, self.now)]
            if min(times) > until:
                break
            self.now = min(times)
            self.turn()
            self.reply()
        self.now = until

    def awake(self) -> set[int]:
        return set(range(len(self.sizes))) - self.residency.barred(0)

    def state(self, model: int) -> str:
        return self.residency.state(model)


def test_what_fits_is_woken_at_once_and_stays():
    pool = Pool([4, 4, 4], budget=8)
    pool.ask(0)
    pool.done(0)
    pool.ask(1)
    pool.done(1)
    pool.pass_time(10_000.0)
    assert pool.awake() == {0, 1}
    assert pool.residency.status(0, pool.now).wakes == 1
    assert pool.residency.status(0, pool.now).idle_seconds == 10_000.0


def test_who_has_no_requests_makes_room():
    pool = Pool([4, 4, 4], budget=8, resident={0, 1})
    pool.ask(0)
    pool.ask(2)
    assert pool.awake() == {0, 2} and pool.state(1) == "asleep"


def test_nobody_sleeps_in_vain():
    """Room for a large model is made by one large model rather than by that and a small one."""
    pool = Pool([2, 6, 6], budget=8, resident={0, 1})
    pool.ask(2)
    assert pool.awake() == {0, 2}


def test_lower_priority_sleeps_first_then_what_was_asked_for_less():
    pool = Pool([4, 4, 4, 4], budget=12, resident={0, 1, 2}, priority={0: 1})
    for model in (0, 1, 2, 2):
        pool.ask(model)
        pool.done(model)
    pool.ask(3)
    assert pool.awake() == {0, 2, 3}
    pool.done(3)
    pool.ask(1)
    pool.ask(3)
    assert 0 in pool.awake()


def test_what_has_not_been_asked_for_for_long_gives_way_at_last():
    pool = Pool([4] * 4, budget=8)
    for _ in range(5):
        pool.ask(0)
        pool.done(0)
    for _ in range(6):
        for model in (1, 2, 3):
            pool.ask(model)
            pool.done(model)
    assert 0 not in pool.awake()


def test_a_pinned_model_never_sleeps():
    pool = Pool([4, 4, 4], budget=8, resident={0}, keep={0: "pinned"})
    for _ in range(20):
        pool.ask(1, 2)
        pool.pass_time(pool.now + 7.0)
        assert 0 in pool.awake()
    with pytest.raises(ValueError, match="m0 is pinned"):
        pool.residency.sleep(0, pool.now)


def test_what_does_not_fit_beside_the_pinned_models_is_refused_at_once():
    pool = Pool([6, 4, 2], budget=8, resident={0}, keep={0: "pinned"})
    refusal = pool.residency.refusal(1, 0.0)
    assert refusal is not None and refusal.retry_after is None
    assert "m1 cannot be woken: of 8 bytes" in refusal.message
    assert "it needs 4, and models that are pinned (m0) take 6" in refusal.message
    with pytest.raises(ValueError, match="m1 cannot be woken"):
        pool.residency.wake(1, 0.0)
    with pytest.raises(ValueError, match="m1 cannot be woken"):
        pool.residency.pin(1, "pinned", 0.0)
    assert pool.residency.refusal(2, 0.0) is None
    pool.residency.pin(0, "demand", 0.0)
    assert pool.residency.refusal(1, 0.0) is None


def test_two_models_that_do_not_fit_together_take_turns():
    pool = Pool([6, 6], budget=8, seconds_per_byte=0.5, sleep_seconds=0.1)
    pool.ask(0, 1)
    awake = defaultdict(float)
    changes = []
    while pool.now < 400:
        pool.pass_time(pool.now + 0.05)
        for model in pool.awake():
            awake[model] += 0.05
            if not changes or changes[-1] != model:
                changes.append(model)
    assert changes == [n % 2 for n in range(len(changes))]
    assert len(changes) == pytest.approx(400 / (QUANTUM + 3.1), abs=2)
    assert awake[0] == pytest.approx(awake[1], rel=0.1)
    assert awake[0] + awake[1] > 400 * 0.7


def test_it_keeps_its_room_for_the_quantum_only_while_it_has_requests():
    pool = Pool([6, 6], budget=8)
    pool.ask(0, 1)
    pool.pass_time(QUANTUM - 0.1)
    assert pool.awake() == {0}
    pool.done(0)
    assert pool.awake() == {1}


def test_steps_in_flight_end_before_the_weights_go():
    pool = Pool([6, 6], budget=8)
    pool.ask(0)
    pool.in_flight = {0}
    pool.ask(1)
    pool.pass_time(3 * QUANTUM)
    assert pool.awake() == set() and pool.state(0) == "falling_asleep"
    assert pool.held[1] == {0}
    pool.in_flight = set()
    pool.turn()
    assert pool.awake() == {1}


def test_a_small_model_does_not_take_the_room_for_which_a_large_one_waits():
    """Small ones come again and again; together they would never leave the large one room."""
    pool = Pool([8, 4, 4, 4, 4], budget=8)
    pool.ask(1)
    pool.pass_time(5.0)
    pool.ask(2)
    pool.ask(0)
    since = pool.now
    pool.ask(3, 4)
    while 0 not in pool.awake():
        pool.pass_time(pool.now + 0.1)
        assert pool.now <= since + QUANTUM + 0.2
    assert pool.awake() == {0}


def test_ttl():
    pool = Pool([4, 4], budget=8, ttl={0: 60.0}, keep={1: "pinned"}, resident={1})
    pool.ask(0)
    pool.pass_time(100.0)
    assert pool.awake() == {0, 1}
    pool.done(0)
    pool.pass_time(159.0)
    assert pool.awake() == {0, 1}
    pool.pass_time(160.0)
    assert pool.awake() == {1}
    assert pool.residency.next_deadline() == math.inf


def test_an_operator_s_words():
    pool = Pool([4, 4, 4], budget=8, resident={0, 1})
    pool.ask(0)
    pool.residency.sleep(0, pool.now)
    pool.residency.sleep(1, pool.now)
    pool.turn()
    assert pool.awake() == {0}, "a model sleeps once it has no requests"
    pool.done(0)
    assert pool.awake() == set()
    pool.residency.wake(2, pool.now)
    pool.turn()
    assert pool.awake() == {2}
    pool.residency.pin(1, "pinned", pool.now)
    pool.turn()
    assert pool.awake() == {1, 2}
    with pytest.raises(ValueError, match="m1 is pinned"):
        pool.residency.sleep(1, pool.now)
    pool.residency.pin(1, "asleep", pool.now)
    pool.turn()
    assert pool.awake() == {2}
    pool.ask(1)
    assert pool.awake() == {1, 2}
    assert pool.residency.status(1, pool.now).keep == "asleep"


def test_a_failed_wake_is_not_tried_again_for_a_while_and_longer_each_time():
    pool = Pool([4, 4], budget=4, resident={0})
    pool.broken[1] = "its file is gone"
    pool.ask(1)
    refusal = pool.residency.refusal(1, pool.now)
    assert refusal is not None and "m1 could not be woken: its file is gone" in refusal.message
    assert refusal.retry_after == QUANTUM
    pool.done(1)
    pool.ask(0)
    assert pool.awake() == {0}, "the others never notice"
    pool.done(0)
    pool.pass_time(QUANTUM)
    assert pool.residency.refusal(1, pool.now) is None
    pool.ask(1)
    refusal = pool.residency.refusal(1, pool.now)
    assert refusal is not None and refusal.retry_after == 2 * QUANTUM
    pool.done(1)
    del pool.broken[1]
    pool.residency.wake(1, pool.now)
    pool.turn()
    status = pool.residency.status(1, pool.now)
    assert (status.state, status.wakes, status.failed_wakes) == ("resident", 1, 2)
    assert status.last_error is None


def test_a_model_that_a_device_has_given_up_is_as_if_its_wake_had_failed():
    """A device could not read experts of a resident model, and has nothing of it any more."""
    pool = Pool([4, 4], budget=8, resident={0, 1})
    pool.ask(0, 1)
    pool.held[1].discard(0)
    assert pool.residency.failed(1, 0, "its file is damaged", pool.now)
    pool.turn()
    assert pool.awake() == {1}
    refusal = pool.residency.refusal(0, pool.now)
    assert refusal is not None and "its file is damaged" in refusal.message
    pool.done(0)
    pool.pass_time(QUANTUM)
    pool.ask(0)
    assert pool.awake() == {0, 1}


def test_a_pinned_model_whose_wake_failed_is_tried_again_without_requests():
    pool = Pool([4], budget=4, keep={0: "pinned"})
    pool.broken[0] = "its file is gone"
    pool.turn()
    assert pool.residency.status(0, pool.now).failed_wakes == 1
    del pool.broken[0]
    pool.pass_time(QUANTUM)
    assert pool.awake() == {0}


def test_a_device_that_is_back_gets_what_it_lacks():
    pool = Pool([4, 4], budget=8)
    pool.ask(0)
    pool.residency.lose(1)
    assert pool.awake() == {0}, "steps stand still, but are not lost"
    pool.held[1] = set()
    pool.residency.restore(1, pool.residency._models, [], pool.now)
    assert pool.awake() == set() and pool.state(0) == "waking"
    assert pool.residency.stand_still(0, [0])
    pool.turn()
    assert pool.awake() == {0} and not pool.residency.stand_still(0, [0])
    assert pool.residency.status(0, pool.now).wakes == 2


def test_a_device_that_is_back_with_too_much_gives_it_up_first():
    pool = Pool([6, 6], budget=8, resident={0})
    pool.residency.lose(1)
    pool.held[1] = {0}
    pool.ask(1)
    assert pool.held[0] == {1}
    pool.residency.restore(1, pool.residency._models, [0], pool.now)
    pool.turn()
    assert pool.held[1] == {1} and pool.awake() == {1}


def test_steps_in_flight_get_weights_back_that_nobody_wants_any_more():
    """Model 0 has to give way while a device is away that its steps in flight need. The device
    comes back without the weights: they are read again, the steps end, and model 1 is woken."""
    pool = Pool([6, 6], budget=8, resident={0})
    pool.ask(0, 1)
    pool.in_flight = {0}
    pool.pass_time(QUANTUM - 1)
    pool.residency.lose(1)
    pool.pass_time(QUANTUM + 1)
    pool.held[1] = set()
    pool.residency.restore(1, pool.residency._models, [], pool.now)
    assert pool.residency.stand_still(0, pool.in_flight)
    pool.turn()
    assert pool.held[1] == {0} and not pool.residency.stand_still(0, pool.in_flight)
    pool.in_flight = set()
    pool.turn()
    assert pool.awake() == {1}


def test_steps_in_flight_get_weights_back_before_models_that_come_instead():
    """A step of model 1 waits for one of model 0, and both wait for a device that comes back
    without weights, in which model 2 has been promised the room of model 1. Model 0 is wanted again
    since then, but gets its turn after model 2."""
    pool = Pool([4, 4, 4], budget=8, resident={0, 1})
    pool.in_flight = {0, 1}
    pool.ask(0, 1, 2)
    pool.residency.lose(1)
    pool.pass_time(QUANTUM + 1)
    assert [pool.residency._models[n].wanted for n in range(3)] == [True, False, True]
    pool.held[1] = set()
    pool.residency.restore(1, pool.residency._models, [], pool.now)
    pool.turn()
    assert pool.held[1] == {0, 1}
    pool.in_flight = set()
    pool.turn()
    assert pool.awake() == {0, 2}


def test_a_device_that_is_back_with_what_is_gone_gives_it_up_first():
    pool = Pool([6], budget=8)
    pool.ask(0)
    pool.residency.lose(1)
    pool.residency.restore(1, pool.residency._models, [7], pool.now)
    orders = list(pool.residency.orders(set()))
    assert orders == [(1, Sleep(model=7))], "its bytes are not known"
    pool.residency.slept(1, 7)
    assert list(pool.residency.orders(set())) == [(1, Wake(model=0))]


# --- no starvation, no livelock

models = st.lists(
    st.tuples(st.integers(1, 8), st.integers(0, 2), st.sampled_from(["demand", "asleep"])),
    min_size=2,
    max_size=6,
)


@settings(max_examples=300, deadline=None)
@given(models, st.sampled_from([0.0, 0.01, 0.4]), st.sampled_from([0.0, 0.3]), st.data())
def test_whoever_waits_is_woken_within_a_bound(given_models, speed, sleep_seconds, data):
    """All models are asked all the time, or come and go, in a pool that holds the largest. Whoever
    waits is awake after at most a quantum and a change for each other model, and everybody
    progresses."""
    sizes = [size for size, _, _ in given_models]
    budget = max(sizes) + data.draw(st.integers(0, 4))
    pool = Pool(
        sizes,
        budget,
        seconds_per_byte=speed,
        sleep_seconds=sleep_seconds,
        priority={n: priority for n, (_, priority, _) in enumerate(given_models)},
        keep={n: keep for n, (_, _, keep) in enumerate(given_models)},
    )
    number = len(sizes)
    change = sum(sizes) * speed + number * sleep_seconds
    bound = (number - 1) * QUANTUM + number * change + 1.0
    constant = data.draw(st.booleans())
    waits: dict[int, float] = {}
    awake_for = defaultdict(float)
    pool.ask(*range(number)) if constant else None
    while pool.now < 3 * bound + 60:
        if not constant:
            for model in range(number):
                toggled = data.draw(st.integers(0, 9)) == 0
                if toggled and model in pool.work:
                    pool.done(model)
                elif toggled:
                    pool.ask(model)
        pool.pass_time(pool.now + 2.5)
        awake = pool.awake()
        for model in range(number):
            if model in awake and model in pool.work:
                awake_for[model] += 2.5
            if model in awake or model not in pool.work:
                waits.pop(model, None)
            else:
                waited = pool.now - waits.setdefault(model, pool.now)
                assert waited <= bound, (model, waited, bound)
    if constant:
        assert all(awake_for[model] >= QUANTUM / 2 for model in range(number))
