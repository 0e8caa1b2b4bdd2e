"""Compares groups of weight pool devices with the best of all arrangements, and by properties."""

import itertools
import math
import random
import time

import pytest
from crosspool.config.errors import ConfigError
from crosspool.planner.devices.groups import FFNLoad, cost, group


def some(random_: random.Random, models: int) -> list[FFNLoad]:
    return [
        FFNLoad(
            name=f"m{index}",
            bytes=random_.randint(10, 100),
            load=random_.random() ** 3,
            layer_bytes=random_.choice([1, 1.2, 3, 10, 30]),
        )
        for index in range(models)
    ]


def held(models: list[FFNLoad], places: tuple[tuple[int, ...], ...], devices: int) -> list[float]:
    found = [0.0] * devices
    for model, place in zip(models, places, strict=True):
        for device in place:
            found[device] += model.bytes / len(place)
    return found


def test_near_the_best_of_all_arrangements() -> None:
    random_ = random.Random(0)
    ratios = []
    for _ in range(60):
        devices, count = random_.choice([(2, 3), (2, 5), (3, 2), (3, 3), (3, 4)])
        models = some(random_, count)
        limit = math.ceil(sum(m.bytes for m in models) / devices * random_.choice([1.02, 1.2, 2]))
        places = [
            place
            for size in range(1, devices + 1)
            for place in itertools.combinations(range(devices), size)
        ]
        best = min(
            cost(models, arrangement, devices).total
            for arrangement in itertools.product(places, repeat=count)
            if max(held(models, arrangement, devices)) <= limit
        )
        found = group(models, devices, limit)
        assert max(held(models, found.devices, devices)) <= limit
        assert found.cost == cost(models, found.devices, devices)
        ratios.append(found.cost.total / best)
    assert min(ratios) > 1 - 1e-9
    assert max(ratios) < 1.05
    assert sum(ratio < 1 + 1e-9 for ratio in ratios) >= 0.9 * len(ratios)


def test_alike_models_share_all_devices() -> None:
    models = [FFNLoad(name=f"m{i}", bytes=10 + i, load=1, layer_bytes=5) for i in range(4)]
    found = group(models, 4, 1000)
    assert set(found.devices) == {(0, 1, 2, 3)}
    assert found.cost.bytes == found.cost.load == pytest.approx(1)
    assert found.cost.unlike == pytest.approx(0, abs=1e-6)


def test_unlike_layer_times_are_told_apart() -> None:
    short = [FFNLoad(name=f"s{i}", bytes=50, load=1, layer_bytes=1) for i in range(2)]
    long = [FFNLoad(name=f"l{i}", bytes=50, load=1, layer_bytes=100) for i in range(2)]
    found = group([short[0], long[0], short[1], long[1]], 2, 200)
    assert found.devices[0] == found.devices[2] != found.devices[1] == found.devices[3]
    assert found.cost.unlike == pytest.approx(0, abs=1e-6)


def test_what_does_not_fit_says_what_would() -> None:
    models = [FFNLoad(name="m", bytes=1000, load=0, layer_bytes=1)]
    with pytest.raises(ConfigError, match="give at least 4"):
        group(models, 3, 300)
    assert group(models, 4, 300).device_bytes == (250,) * 4


@pytest.mark.parametrize(("models", "devices"), [(40, 8), (300, 24)])
def test_many_models_take_seconds(models: int, devices: int) -> None:
    loads = some(random.Random(1), models)
    begun = time.process_time()
    found = group(loads, devices, 10**9)
    assert time.process_time() - begun < 20
    assert found.cost.total <= cost(loads, [range(devices)] * models, devices).total
