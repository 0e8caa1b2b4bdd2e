"""The memory of a model that sleeps is the system's: the device and the process that holds the
weights give it up, and a device that is replaced has what its holder still has."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import msgspec
import psutil
import pytest
from crosspool.config import deployment as deployment_module
from crosspool.config.device import Device
from crosspool.config.process import adopt_orphans, die_with_parent
from crosspool.transport.forks import Fork, Forked
from crosspool.transport.messages import Wake, Waking, Woken

from benchmark.checkpoint import Shape, write
from benchmark.device_driver import DeviceDriver, Generation

SHAPE = Shape("moe-70m", 512, 4, 16, 2, 256, 8, 2, 64, 8000, context=512)
MODELS = 2


class Held(subprocess.Popen[bytes]):
    """A process that a holder has forked, of which this one has become the parent."""

    def __init__(self, pid: int) -> None:
        self.pid, self.returncode = pid, None
        self.args: list[str] = []

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.returncode

    def send_signal(self, sig: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, sig)

    def __del__(self) -> None:
        """Nothing is left to be waited for."""


class HeldDriver(DeviceDriver):
    """Devices whose weights a process of their own holds, as under the launcher."""

    holders: dict[str, tuple[subprocess.Popen[bytes], socket.socket]]

    def _spawn_device(self, device: Device) -> None:
        if not hasattr(self, "holders"):
            self.holders = {}
        if device.name not in self.holders:
            self.holders[device.name] = self._hold(device)
        _, asked = self.holders[device.name]
        fork = Fork(name=device.process_name, incarnation=self._incarnations[device.name])
        asked.send(msgspec.json.encode(fork))
        pid = msgspec.json.decode(asked.recv(4096), type=Forked).pid
        self.processes[device.name] = Held(pid)

    def _hold(self, device: Device) -> tuple[subprocess.Popen[bytes], socket.socket]:
        adopt_orphans()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs, self.logs[device.name].open("ab") as out:
            command = [sys.executable, "-m", "crosspool.ranks.weight_holder"]
            command += ["--deployment", str(self._file_of(device)), "--device", device.name]
            command += ["--launcher-fd", str(theirs.fileno())]
            fds = [theirs.fileno()]
            if self._lanes_fd is not None:
                command += ["--lanes-fd", str(self._lanes_fd)]
                fds.append(self._lanes_fd)
            holder = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                pass_fds=fds,
                preexec_fn=die_with_parent,  # noqa: PLW1509
            )
        return holder, ours

    def close(self) -> None:
        super().close()
        for holder, asked in self.holders.values():
            asked.close()
            holder.kill()
            holder.wait()

    def memory(self, device: str) -> tuple[int, int]:
        """Resident bytes of the device's process and of its holder, without pages of files, which
        come as a library's code is first run; each counts what they share."""
        return _held(self.processes[device].pid), _held(self.holders[device][0].pid)


def _held(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return sum(1024 * int(fields[name].split()[0]) for name in ("RssAnon", "RssShmem"))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folders = [tmp_path_factory.mktemp("models") / f"m{seed}" for seed in range(MODELS)]
    for seed, folder in enumerate(folders):
        write(folder, SHAPE, seed)
    return folders


def outputs(on: DeviceDriver, models: Iterable[int] = range(MODELS)) -> list[list[int]]:
    asked = [Generation(model, [5, 6, 7, 8, 9, 10], 6) for model in models]
    on.generate(asked)
    return [one.output for one in asked]


def test_memory_and_restarts(tmp_path: Path, models: list[Path]) -> None:
    attention, ffn = "cpu:0", "cpu:1"
    with HeldDriver(
        models,
        [attention],
        [ffn],
        packed_cache_dir=str(tmp_path / "cache"),
        packed_cache_bytes=1 << 30,
        kv_pool_bytes=32 << 20,
    ) as on:
        right = outputs(on)  # all pages are there
        keepers = [c for h, _ in on.holders.values() for c in psutil.Process(h.pid).children()]
        psutil.wait_procs(keepers, 60)  # who writes the packed weights shares them
        parts = {
            device: next((tmp_path / "cache").glob(f"m0-{role}.*.packed")).stat().st_size
            for device, role in ((attention, "attention"), (ffn, "ffn"))
        }
        before = {device: on.memory(device) for device in parts}
        on.sleep(0)
        for device, nbytes in parts.items():
            for was, now in zip(before[device], on.memory(device), strict=True):
                assert was - now > 0.95 * nbytes, (device, was, now)
        assert on.wake(0) == {0: None}
        for device, nbytes in parts.items():
            asleep = before[device][1] - nbytes
            ours, theirs = on.memory(device)
            assert theirs < asleep + 0.1 * nbytes, "the holder has none of what was read again"
            assert abs(ours - before[device][0]) < 0.1 * nbytes + (4 << 20)
        assert outputs(on) == right

        # a new process has what the holder has: model 1 alone
        on.replace(ffn)
        assert on.ready[ffn].resident == [1]
        on.send(ffn, Wake(model=0))
        while isinstance(message := on.receive()[1], Waking):
            pass
        assert message == Woken(model=0)
        assert outputs(on) == right

        # killed while it reads
        on.sleep(0)
        for device in parts:
            on.send(device, Wake(model=0))
        os.kill(on.processes[ffn].pid, signal.SIGKILL)
        on.replace(ffn)
        assert on.ready[ffn].resident == [1]
        on.send(ffn, Wake(model=0))
        for _ in parts:
            while isinstance(message := on.receive()[1], Waking):
                pass
            assert message == Woken(model=0)
        assert outputs(on) == right


def test_a_later_process_knows_the_models_of_its_time(tmp_path: Path, models: list[Path]) -> None:
    """The holder was started with others, whose memory is the system's when they have left."""
    device = "cpu:0"
    with HeldDriver(
        models,
        [device],
        [device],
        packed_cache_dir=str(tmp_path / "cache"),
        packed_cache_bytes=1 << 30,
        kv_pool_bytes=32 << 20,
    ) as on:
        right = outputs(on)
        keepers = [c for h, _ in on.holders.values() for c in psutil.Process(h.pid).children()]
        psutil.wait_procs(keepers, 60)
        packed = sum(file.stat().st_size for file in (tmp_path / "cache").glob("m1-*.packed"))
        before = on.memory(device)
        on.sleep(1)
        on.remove(1)
        for was, now in zip(before, on.memory(device), strict=True):
            assert was - now > 0.95 * packed, (was, now)
        number, errors = on.add(models[1])
        assert errors == {device: None}
        deployment_module.save(on.deployment)
        on.replace(device)
        assert on.ready[device].models == [0, number]
        assert on.ready[device].resident == [0], "the holder has it no more"
        assert on.wake(number) == {number: None}
        asked = [Generation(model, [5, 6, 7, 8, 9, 10], 6) for model in (0, number)]
        on.generate(asked)
        assert [one.output for one in asked] == right


def test_a_later_process_begins_without_a_model_whose_experts_are_gone(
    tmp_path: Path, models: list[Path]
) -> None:
    """Nor can they be packed again, since the checkpoint is another one now."""
    device, own = "cpu:0", Path(shutil.copytree(models[0], tmp_path / "m0"))
    with HeldDriver(
        [own, models[1]],
        [device],
        [device],
        packed_cache_dir=str(tmp_path / "cache"),
        packed_cache_bytes=1 << 30,
        weight_pool_bytes=1 << 30,
        kv_pool_bytes=32 << 20,
        expert_pool_bytes=64 << 20,
        experts="demand",
    ) as on:
        right = outputs(on)
        for file in (tmp_path / "cache").glob("m0-ffn.*.packed"):
            file.unlink()
        for file in own.glob("*.safetensors"):
            file.touch()
        on.replace(device)
        assert on.ready[device].models == [0, 1] and on.ready[device].resident == [1]
        assert outputs(on, [1]) == right[1:]
        error = on.wake(0)[0]
        assert error is not None and "has changed since the server began" in error
        assert outputs(on, [1]) == right[1:]
