import os

import pytest
from crosspool.config.device import parse_devices

CORES = sorted(os.sched_getaffinity(0))


def test_cpu_is_every_core() -> None:
    (device,) = parse_devices("cpu")
    assert device.name == "cpu"
    assert device.cores == tuple(CORES)


def test_a_list_keeps_its_order() -> None:
    first = CORES[0]
    devices = parse_devices(f"cpu:{first}, cuda:1,cuda:0")
    assert [device.name for device in devices] == [f"cpu:{first}", "cuda:1", "cuda:0"]
    assert devices[0].cores == (first,)
    assert [device.is_cpu for device in devices] == [True, False, False]


@pytest.mark.skipif(CORES[:2] != [0, 1], reason="needs cores 0 and 1")
def test_spans() -> None:
    assert parse_devices("cpu:0-1")[0].cores == (0, 1)
    assert parse_devices("cpu:1+0")[0].cores == (0, 1)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("gpu:0", "'gpu:0' is no device"),
        ("", "'' is no device"),
        ("cpu,", "'' is no device"),
        ("cuda", "'cuda' is no device"),
        ("cpu:a", "is no device"),
        ("cpu:99999", r"cores \[99999\] are not available"),
        ("cpu:5-4", "not available"),
        ("cpu,cpu", "cpu is named twice"),
    ],
)
def test_mistakes_name_the_entry(text: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        parse_devices(text)
