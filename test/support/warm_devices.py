"""Device processes that are forked with torch imported."""

from __future__ import annotations

from collections.abc import Sequence

from crosspool.config.device import Device
from support import warm

from benchmark.device_driver import DeviceDriver


def _run(words: Sequence[str], lanes: int | None) -> int:
    from crosspool.ranks.device_process import main

    return main([*words, *([] if lanes is None else ["--lanes-fd", str(lanes)])])


class WarmDriver(DeviceDriver):
    """Drives forked processes of CPU devices. CUDA does not survive a fork, so that processes of
    GPUs are programs of their own."""

    def _spawn_device(self, device: Device) -> None:
        if not device.is_cpu:
            super()._spawn_device(device)
            return
        words = ["--deployment", str(self._file_of(device)), "--device", device.name]
        words += ["--incarnation", str(self._incarnations[device.name])]
        lanes = None if self._lanes_fd is None else warm.Descriptor(self._lanes_fd)
        log = self.logs[device.name]
        self.processes[device.name] = warm.start([warm.TORCH], _run, log, words, lanes)
