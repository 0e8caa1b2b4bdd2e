"""The process of an FFN device for test_gpu_processes: its ranks, whose links lie in memory that it
exports.

Arguments: deployment file, device, descriptor of the lanes' segment, those that keep the memory of
links, "fake" (CPU tensors, Triton's interpreter, a fake driver) or "real" (GPU 0, whatever the
device's number). It says "ready", serves until its standard input ends, and says what it served."""

from __future__ import annotations

import contextlib
import json
import select
import sys
from pathlib import Path
from typing import Any

import msgspec
import torch
from crosspool.config.deployment import load
from crosspool.config.device import Device
from crosspool.models.registry import specs_of
from crosspool.ranks.gpu.host_side import HostSide
from crosspool.ranks.gpu.join import join_lanes
from crosspool.ranks.gpu.load import load_parts
from crosspool.transport.kept_descriptors import KeptDescriptors
from crosspool.transport.links import join_gpus
from crosspool.weightpool.placement import place


def driver_of(device: Device, real: bool) -> tuple[Any, torch.device]:
    """The driver, and where tensors lie."""
    if real:
        from crosspool.kernels.cuda_driver import CudaBindings

        torch.cuda.set_device(0)
        torch.zeros(1, device="cuda")
        return CudaBindings(0), torch.device("cuda", 0)
    from support.fake_cuda_memory import FakeCuda

    return FakeCuda(total=64 << 20, name=device.name), torch.device("cpu")


def main() -> None:
    deployment, device = load(Path(sys.argv[1])), Device(sys.argv[2])
    kept = KeptDescriptors([int(number) for number in sys.argv[4].split(",")])
    real = sys.argv[5] == "real"
    if not real:
        from support.few_programs import use_few_programs
        from support.triton_interpreter import repair

        repair()
        use_few_programs(setattr)
    torch.set_num_threads(1)
    specs = specs_of(deployment.models)
    driver, on = driver_of(device, real)
    with contextlib.ExitStack() as resources:
        peers = join_gpus(
            deployment,
            device,
            int(sys.argv[3]),
            kept,
            specs=specs,
            driver=driver,
            resources=resources,
        )
        parts = load_parts(deployment, device, specs, place(deployment, specs), {}, on=on)
        lanes = resources.enter_context(contextlib.ExitStack())
        ranks, executor = join_lanes(
            deployment, device, parts, peers, virtualizer=None, host=HostSide(on), resources=lanes
        )
        print("ready", flush=True)
        while not select.select([sys.stdin], [], [], 0.0)[0]:
            executor.run(0.01)
        print(json.dumps(msgspec.to_builtins(ranks.counters().served)), flush=True)
    if not real:
        assert driver.is_clean


if __name__ == "__main__":
    main()
