"""GPUs as the device processes will see them. The launcher asks ``nvidia-smi``, and so needs
neither torch nor a CUDA context."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from crosspool.config.device import Device
from crosspool.config.errors import ConfigError

if TYPE_CHECKING:
    from crosspool.config.deployment import Deployment

ENVIRONMENT = {
    "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
    "CUDA_MODULE_LOADING": "EAGER",
    "CUDA_DEVICE_MAX_CONNECTIONS": "32",
}
"""Environment of every device process of a GPU. ``cuda:N`` is the N-th GPU as ``nvidia-smi`` counts
them. Kernels are loaded at the start, since later they might wait for a resident loop. Streams get
32 connections to the device instead of eight, since a stream that shares one with a resident loop
may wait for the loop's end."""
_TIMEOUT = 30.0
_QUERY = "--query-gpu=index,uuid,name,memory.free"


@dataclass(frozen=True)
class GPU:
    """One GPU of this machine."""

    index: str
    """Number that ``nvidia-smi`` gives it."""
    uuid: str
    name: str
    free_bytes: int


def visible_gpus(environment: Mapping[str, str] = os.environ) -> list[GPU]:
    """Returns the GPUs that a process may use, ``cuda:0`` first: all, or those of
    CUDA_VISIBLE_DEVICES.

    Raises ConfigError where ``nvidia-smi`` is missing, fails or does not end."""
    command = ["nvidia-smi", _QUERY, "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(
            command, check=False, capture_output=True, text=True, timeout=_TIMEOUT
        )
    except FileNotFoundError:
        raise ConfigError(
            "nvidia-smi is not found: there is no NVIDIA driver here, or it is not on the PATH"
        ) from None
    except subprocess.TimeoutExpired:
        raise ConfigError(f"nvidia-smi did not end within {_TIMEOUT:.0f} s") from None
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip()
        raise ConfigError(f"nvidia-smi failed with {done.returncode}: {said}")
    gpus = [_parsed(line) for line in done.stdout.splitlines() if line.strip()]
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return gpus
    chosen: list[GPU] = []
    for name in (part.strip() for part in visible.split(",")):
        gpu = next((g for g in gpus if name == g.index or _is_uuid(name, g.uuid)), None)
        if gpu is None:  # CUDA, too, ignores what follows a name that it does not know
            break
        chosen.append(gpu)
    return chosen


def gpu_of(device: Device, gpus: list[GPU]) -> GPU:
    """Returns the GPU that ``device`` (``cuda:N``) names. Raises ConfigError, which lists the GPUs,
    when there is no such."""
    number = device.gpu
    if number < len(gpus):
        return gpus[number]
    names = ", ".join(f"cuda:{i} {gpu.name}" for i, gpu in enumerate(gpus)) or "none"
    limit = os.environ.get("CUDA_VISIBLE_DEVICES")
    hidden = "" if limit is None else f" (CUDA_VISIBLE_DEVICES={limit})"
    raise ConfigError(f"{device.name}: {len(gpus)} GPU(s) are visible here{hidden}: {names}")


def check_alike(devices: Sequence[Device]) -> None:
    """Raises ConfigError for CPUs together with GPUs, which no data path joins."""
    gpus = [device.name for device in devices if not device.is_cpu]
    cpus = [device.name for device in devices if device.is_cpu]
    if gpus and cpus:
        raise ConfigError(
            f"kv_pool_devices, weight_pool_devices: {', '.join((*gpus, *cpus))}: a CPU cannot "
            "serve beside a GPU; name GPUs alone, or CPUs alone"
        )


def check_loop(deployment: Deployment) -> None:
    """Raises ConfigError for links that the loop cannot use."""
    if deployment.gpu_links == "nvshmem" and deployment.loop == "host":
        raise ConfigError(
            "gpu_links: nvshmem needs the resident loop: a host cannot see when NVSHMEM has carried"
            " a payload; write gpu_links: peer, or loop: resident"
        )


def _parsed(line: str) -> GPU:
    fields = [field.strip() for field in line.split(",")]
    try:
        index, uuid, name, free = fields
        return GPU(index, uuid, name, int(free) << 20)
    except ValueError:
        raise ConfigError(f"nvidia-smi {_QUERY} printed {line!r}, not four fields") from None


def _is_uuid(name: str, uuid: str) -> bool:
    """Whether CUDA takes ``name`` for the GPU: any unambiguous beginning of the UUID will do."""
    return name.startswith("GPU-") and uuid.startswith(name)
