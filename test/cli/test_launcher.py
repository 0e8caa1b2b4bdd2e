import os
import sys

from crosspool.cli.launcher import device_processes, front_end
from crosspool.config.deployment import Deployment, ModelConfig
from crosspool.config.device import Device

CORES = sorted(os.sched_getaffinity(0))


def deployment(kv: str, weights: str) -> Deployment:
    return Deployment(
        models=(ModelConfig(name="a", path="/a"),),
        kv_pool_devices=(Device(kv),),
        weight_pool_devices=(Device(weights),),
        kv_pool_bytes=1 << 30,
        weight_pool_bytes=1 << 30,
        runtime_dir="/run/somewhere",
    )


def test_one_device_process_for_a_device_of_both_pools() -> None:
    both = deployment("cpu", "cpu")
    front, (device,) = front_end(both, []), device_processes(both, None, 5)
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
    devices = device_processes(deployment("cpu", first), 7, 5)
    assert [spec.device for spec in devices] == ["cpu", first]
    for spec in devices:
        assert spec.argv[-4:] == ["--heartbeats-fd", "5", "--lanes-fd", "7"]
        assert spec.argv[-6:-4] == ["--device", spec.device]
        assert list(spec.pass_fds) == [5, 7]
    assert devices[1].env["OMP_NUM_THREADS"] == "1"
