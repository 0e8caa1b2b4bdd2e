"""Devices in processes of their own, which meet, map each other's memory and exchange rows: with
Triton's interpreter and a fake driver whose memory processes can share, or all on one GPU, as a
test bed (on GPUs of their own: test_gpu_device_process.py)."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from support.packages import installed

if not installed("triton"):
    pytest.skip("triton is not installed", allow_module_level=True)
pytest.importorskip("msgspec", reason="msgspec is not installed (the messages of a step)")

import msgspec
import torch
from crosspool.config.deployment import Deployment, save
from crosspool.config.device import Device
from crosspool.kvpool.cuda_virtualizer import CudaVirtualizer
from crosspool.models.spec import ModelSpec
from crosspool.ranks.device import DeviceRanks
from crosspool.ranks.gpu.host_side import HostSide
from crosspool.ranks.gpu.join import join_lanes
from crosspool.ranks.gpu.load import load_parts
from crosspool.ranks.kv_memory import kv_pool, kv_pool_by
from crosspool.transport.links import join_gpus, keep_memory
from crosspool.transport.messages import Sampling
from crosspool.weightpool.placement import Placement
from make_random_checkpoint import make_random_checkpoint
from ranks.gpu.ffn_peer import driver_of
from support.few_programs import use_few_programs
from support.machine import Machine, Stream
from support.poisoned import poison_lanes

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
PEER = Path(__file__).with_name("ffn_peer.py")
VOCAB = 64
LIMITS: dict[str, Any] = {
    "max_running_requests": 3,
    "chunked_prefill_size": 5,
    "lease_steps": 8,
    "random_seed": 1,
}


class _Process:
    """An FFN device's process, in the place of its ranks."""

    def __init__(self, command: Sequence[str], fds: Sequence[int], kill_after: int) -> None:
        """``kill_after``: how often it is let run before it is killed; another takes its place."""
        self._command, self._fds, self._left = command, fds, kill_after
        self.restarts = 0
        self.served: list[dict[str, int]] = []
        self._start()

    def _start(self) -> None:
        self.process = subprocess.Popen(
            [*self._command],
            pass_fds=[*self._fds],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def wait_ready(self) -> None:
        assert self.process.stdout is not None and self.process.stdout.readline() == "ready\n"

    @property
    def executor(self) -> _Process:
        return self

    def run(self, _timeout: float) -> list[Any]:
        assert self.process.poll() is None, "the FFN device's process has ended"
        self._left -= 1
        if self._left == 0:
            self.process.kill()
            self.process.communicate()
            self.restarts += 1
            self._start()
            self.wait_ready()
        return []

    def close(self) -> None:
        said, _ = self.process.communicate("\n", timeout=60)
        assert self.process.returncode == 0
        self.served = json.loads(said.splitlines()[-1])
        for fd in self._fds:
            os.close(fd)


class Processes:
    """Loads the attention device here, and starts a process for each other one."""

    def __init__(self, kill_after: int = 0) -> None:
        """``kill_after``: as for :class:`_Process`; 0: none is killed."""
        self.started: dict[str, _Process] = {}
        self._kill_after = kill_after

    def load(
        self,
        deployment: Deployment,
        device: Device,
        specs: Sequence[ModelSpec],
        placement: Placement,
        lanes_fd: int,
    ) -> DeviceRanks | _Process:
        if device in deployment.weight_pool_devices:
            os.close(lanes_fd)
            self.started[device.name].wait_ready()
            return self.started[device.name]
        save(deployment)
        kind = "fake" if INTERPRETED else "real"
        kept = keep_memory(deployment)
        for peer in deployment.weight_pool_devices:
            fds = [os.dup(fd) for fd in (lanes_fd, *kept.fds)]
            numbers = [str(fds[0]), ",".join(map(str, fds[1:]))]
            command = [sys.executable, str(PEER), str(deployment.file), peer.name, *numbers, kind]
            self.started[peer.name] = _Process(command, fds, self._kill_after)
        driver, on = driver_of(device, real=not INTERPRETED)
        resources = contextlib.ExitStack()
        peers = join_gpus(
            deployment,
            device,
            lanes_fd,
            kept,
            specs=specs,
            driver=driver,
            resources=resources,
        )
        make = functools.partial(kv_pool_by, functools.partial(CudaVirtualizer, driver))
        virtualizer, kv = (kv_pool if INTERPRETED else make)(deployment, device, specs)
        resources.callback(virtualizer.close)
        parts = load_parts(deployment, device, specs, placement, kv, on=on)
        ranks, _ = join_lanes(
            deployment,
            device,
            parts,
            peers,
            virtualizer=virtualizer,
            host=HostSide(on),
            resources=resources,
        )
        return ranks


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("models")
    families = ("glm4_moe_lite",) if INTERPRETED else ("qwen3_moe", "glm4_moe_lite")
    return [
        make_random_checkpoint(family, folder / family, {"vocab_size": VOCAB}, "float32", seed=5)
        for family in families
    ]


def streams(models: int) -> list[dict[str, Any]]:
    drawn = Sampling(temperature=0.9, top_k=40, top_p=0.9, seed=7)
    new = 2 if INTERPRETED else 40
    generator = torch.Generator().manual_seed(1)
    return [
        {"model": model, "prompt": prompt, "new_tokens": new} | more
        for model in range(models)
        for length, more in ((3, {}), (2, {"sampling": drawn}))
        if (prompt := torch.randint(2, VOCAB, (length,), generator=generator).tolist())
    ]


def outputs(machine: Machine, lease: int) -> list[list[int]]:
    own = [Stream(**stream) for stream in streams(len(machine.specs))]
    machine.generate(own, lease)
    return [stream.output for stream in own]


@pytest.mark.parametrize("loop", ["host"] if INTERPRETED else ["host", "resident"])
def test_processes_exchange_rows(
    models: list[Path], loop: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An attention device and two FFN devices; both on GPU 0, if there is one."""
    poison_lanes(monkeypatch)
    if INTERPRETED:
        use_few_programs(monkeypatch.setattr)
    with Machine(models, loop="host", **LIMITS) as cpu:
        expected = outputs(cpu, 1)
    processes = Processes()
    load: Any = processes.load
    with Machine(
        models,
        loop=loop,
        kv="cuda:0",
        weights=("cuda:1", "cuda:2"),
        load=load,
        runtime_dir=str(tmp_path),
        **LIMITS,
    ) as machine:
        assert outputs(machine, 8) == expected
        sent = msgspec.to_builtins(machine.first.counters().links)
    served = [link for process in processes.started.values() for link in process.served]
    key = ("ffn_rank", "lane")
    assert sorted(served, key=lambda link: [link[k] for k in key]) == sorted(
        sent, key=lambda link: [link[k] for k in key]
    )


@pytest.mark.parametrize("loop", ["host"] if INTERPRETED else ["host", "resident"])
def test_an_ffn_process_that_is_killed_is_replaced_within_a_step(
    models: list[Path], loop: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The attention device and its steps know nothing of it: the memory of the links is kept, and
    the next process finds the dispatch to which the first did not reply."""
    if INTERPRETED:
        use_few_programs(monkeypatch.setattr)
    with Machine(models, loop="host", **LIMITS) as cpu:
        expected = outputs(cpu, 1)
    processes = Processes(kill_after=5)
    load: Any = processes.load
    with Machine(
        models,
        loop=loop,
        kv="cuda:0",
        weights=("cuda:1",),
        load=load,
        runtime_dir=str(tmp_path),
        **LIMITS,
    ) as machine:
        assert outputs(machine, 8) == expected
    assert processes.started["cuda:1"].restarts == 1
