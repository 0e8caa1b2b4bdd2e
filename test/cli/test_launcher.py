import contextlib
import os
import sys

import msgspec
from crosspool.cli.launcher import device_processes, front_end
from crosspool.config.deployment import Deployment, ModelConfig
from crosspool.config.device import Device
from crosspool.transport import links

CORES = sorted(os.sched_getaffinity(0))


def deployment(kv: str, weights: str) -> Deployment:
    return Deployment(
        models={0: ModelConfig(name="a", path="/a")},
        next_model=1,
        kv_pool_devices=(Device(kv),),
        weight_pool_devices=(Device(weights),),
        kv_pool_bytes=1 << 30,
        weight_pool_bytes=1 << 30,
        runtime_dir="/run/somewhere",
    )


def test_one_device_process_for_a_device_of_both_pools() -> None:
    both = deployment("cpu", "cpu")
    front, (device,) = front_end(both, []), device_processes(both, None, 5, [], {})
    assert [spec.name for spec in front] == ["http", "scheduler", "detokenizer"]
    assert device.name == "device process cpu"
    forking = {spec.forked_by.name: spec.forked_by for spec in (*front, device) if spec.forked_by}
    assert list(forking) == ["front end", "weights of cpu"]
    for spec in (*front, *forking.values(), device):
        assert spec.argv[:2] == [sys.executable, "-m"]
        assert spec.argv[3:5] == ["--deployment", "/run/somewhere/deployment.json"]
        assert spec.env["HF_HUB_OFFLINE"] == "1"
        assert list(spec.pass_fds) == ([5] if spec.name.endswith("of cpu") or spec.device else [])
    assert {spec.env["OMP_NUM_THREADS"] for spec in front} == {"1"}
    assert all(spec.env == front[0].env for spec in (*front, *forking.values()))
    assert device.env["OMP_NUM_THREADS"] == str(len(CORES))
    assert device.device == "cpu" and front[0].device is None
    assert "--lanes-fd" not in device.argv


def test_device_processes_share_the_lanes() -> None:
    first = f"cpu:{CORES[0]}"
    devices = device_processes(deployment("cpu", first), 7, 5, [], {})
    assert [spec.device for spec in devices] == ["cpu", first]
    for spec in devices:
        assert spec.argv[-4:] == ["--heartbeats-fd", "5", "--lanes-fd", "7"]
        assert spec.argv[-6:-4] == ["--device", spec.device]
        assert list(spec.pass_fds) == [5, 7]
    assert devices[1].env["OMP_NUM_THREADS"] == "1"


def test_gpus_that_map_each_others_memory_are_replaced_one_by_one() -> None:
    both = deployment("cuda:0", "cuda:1")
    with contextlib.closing(links.keep_memory(both)) as kept:
        specs = device_processes(both, 7, 5, kept.fds, {})
        assert len(kept.fds) == 2 * len(specs) == 4
        for spec in specs:
            assert spec.restartable and spec.group is None
            fds = ",".join(map(str, kept.fds))
            assert spec.argv[-6:-2] == ["--heartbeats-fd", "5", "--link-memory-fds", fds]
            assert set(spec.pass_fds) == {5, 7, *kept.fds}


def test_gpus_that_nvshmem_joins_are_replaced_together() -> None:
    carried = msgspec.structs.replace(deployment("cuda:0", "cuda:1"), gpu_links="nvshmem")
    assert links.keep_memory(carried).fds == []
    specs = device_processes(carried, 7, 5, [], {})
    assert [(spec.restartable, spec.group) for spec in specs] == [(True, "NVSHMEM")] * 2
    (alone,) = device_processes(deployment("cuda:0", "cuda:0"), None, 5, [], {})
    assert alone.restartable and alone.group is None


def test_nothing_keeps_memory_where_nothing_crosses() -> None:
    for both in (deployment("cuda:0", "cuda:0"), deployment("cpu", f"cpu:{CORES[0]}")):
        assert links.keep_memory(both).fds == []
