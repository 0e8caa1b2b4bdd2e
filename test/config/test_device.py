import os

import pytest
from crosspool.config.device import Device, parse_devices

CORES = sorted(os.sched_getaffinity(0))


def test_cpu_is_every_core() -> None:
    (device,) = parse_devices("cpu")
    assert device.name == "cpu"
    assert device.cores == tuple(CORES)
    assert device.named_cores is None


def test_a_list_keeps_its_order() -> None:
    first = CORES[0]
    devices = parse_devices(f"cpu:{first}, cuda:1,cuda:0")
    assert [device.name for device in devices] == [f"cpu:{first}", "cuda:1", "cuda:0"]
    assert devices[0].cores == (first,)
    assert [device.is_cpu for device in devices] == [True, False, False]
    assert [device.node for device in devices] == [0, 0, 0]


def test_spans() -> None:
    assert parse_devices("cpu:0-1")[0].cores == (0, 1)
    assert parse_devices("cpu:1+0")[0].cores == (0, 1)


def test_devices_of_other_hosts() -> None:
    devices = parse_devices("node1/cpu:0-15,node2/cuda:0,node12/cpu")
    assert [device.node for device in devices] == [1, 2, 12]
    assert [device.name_on_host for device in devices] == ["cpu:0-15", "cuda:0", "cpu"]
    assert [device.is_cpu for device in devices] == [True, False, True]
    assert devices[0].cores == tuple(range(16)) and devices[1].gpu == 0
    assert devices[0].process_name == "device process node1/cpu:0-15"


def test_devices_of_equal_number_on_different_hosts_are_different() -> None:
    devices = parse_devices("cpu:0,node1/cpu:0,node2/cpu:0")
    assert len(set(devices)) == 3


def test_node_0_is_the_host_without_a_name() -> None:
    assert parse_devices("node0/cpu:0,node0/cuda:1") == (Device("cpu:0"), Device("cuda:1"))
    with pytest.raises(ValueError, match="cpu:0 is named twice"):
        parse_devices("cpu:0,node0/cpu:0")


def test_a_span_of_gpus_names_each_of_them() -> None:
    names = [device.name for device in parse_devices("node2/cuda:0-3,cuda:1-1")]
    assert names == ["node2/cuda:0", "node2/cuda:1", "node2/cuda:2", "node2/cuda:3", "cuda:1"]
    with pytest.raises(ValueError, match="cuda:2 is named twice"):
        parse_devices("cuda:0-3,cuda:2")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("gpu:0", "'gpu:0' is no device"),
        ("", "'' is no device"),
        ("cpu,", "'' is no device"),
        ("cuda", "'cuda' is no device"),
        ("cpu:a", "is no device"),
        ("cpu:5-4", "cpu:5-4 names no core"),
        ("cuda:3-1", "cuda:3-1 names no GPU"),
        ("cpu:0-999999999", "is no device"),
        ("cpu,cpu", "cpu is named twice"),
        ("node1/cpu,node1/cpu", "node1/cpu is named twice"),
        ("node1", "'node1' is no device.*node1/cpu:0-7"),
        ("node1/", "'node1/' is no device"),
        ("node01/cpu", "'node01/cpu' is no device"),
        ("nodeX/cpu", "'nodeX/cpu' is no device"),
        ("host1/cpu", "'host1/cpu' is no device"),
        ("node1/node2/cpu", "'node1/node2/cpu' is no device"),
        ("node12345/cpu", "'node12345/cpu' is no device"),
    ],
)
def test_mistakes_name_the_entry(text: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        parse_devices(text)
