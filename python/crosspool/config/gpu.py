"""GPUs as the processes that are going to be started will see them, asked of ``nvidia-smi``: the
launcher needs neither torch nor a CUDA context for that."""

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
"""Of every device process of a GPU: ``cuda:N`` is the N-th GPU as ``nvidia-smi`` counts them; no
kernel is loaded later, behind a resident loop that it might have to wait for; and streams share a
connection with a loop's only when there are more than 32, not eight, since what shares one may wait
for the loop's end."""
_TIMEOUT = 30.0
_QUERY = "--query-gpu=index,uuid,name,memory.free"


@dataclass(frozen=True)
class GPU:
    """One GPU of this machine."""

    index: str
    """As ``nvidia-smi`` counts."""
    uuid: str
    name: str
    free_bytes: int


def visible_gpus(environment: Mapping[str, str] = os.environ) -> list[GPU]:
    """The GPUs that a process may use, ``cuda:0`` first: all, or those of CUDA_VISIBLE_DEVICES.

    Raises ConfigError where ``nvidia-smi`` is missing or does not answer."""
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
        raise ConfigError(f"nvidia-smi did not answer in {_TIMEOUT:.0f} s") from None
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
    """The GPU that ``device`` (``cuda:N``) names; raises ConfigError that says what there is."""
    number = device.gpu
    if number < len(gpus):
        return gpus[number]
    names = ", ".join(f"cuda:{i} {gpu.name}" for i, gpu in enumerate(gpus)) or "none"
    limit = os.environ.get("CUDA_VISIBLE_DEVICES")
    hidden = "" if limit is None else f" (CUDA_VISIBLE_DEVICES={limit})"
    raise ConfigError(f"{device.name}: {len(gpus)} GPU(s) are visible here{hidden}: {names}")


def check_alike(devices: Sequence[Device]) -> None:
    """Raises ConfigError for a CPU beside a GPU, which no data path joins."""
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
        raise ConfigError(f"nvidia-smi {_QUERY} answered {line!r}") from None


def _is_uuid(name: str, uuid: str) -> bool:
    """CUDA takes any unambiguous beginning of a UUID."""
    return name.startswith("GPU-") and uuid.startswith(name)
