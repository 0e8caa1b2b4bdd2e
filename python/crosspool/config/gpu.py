"""GPUs as the device processes will see them. The launcher asks ``nvidia-smi``, and so needs
neither torch nor a CUDA context."""

from __future__ import annotations

import logging
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from crosspool.config.device import Device
from crosspool.config.errors import ConfigError

if TYPE_CHECKING:
    from crosspool.config.deployment import Deployment

log = logging.getLogger(__name__)

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
_QUERY = "--query-gpu=index,uuid,name,memory.free,compute_cap"
RESIDENT_FROM = (9, 0)
"""Compute capability from which a device launches graphs itself. Older ones are documented to do so
too, but NVIDIA's own projects do not rely on it."""
_LINKS_OF_A_LANE = 8
"""Links that one lane of an FFN rank serves."""
_OTHER_STREAMS = 2
"""Streams of a device process beside the lanes': the host's, and CUDA's default stream."""


@dataclass(frozen=True)
class GPU:
    """One GPU of this machine."""

    index: str
    """Number that ``nvidia-smi`` gives it."""
    uuid: str
    name: str
    free_bytes: int
    compute: tuple[int, int]
    """Compute capability."""


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


def check_kv_cache_dtype(deployment: Deployment) -> None:
    """Raises ConfigError for a KV cache in floats of 8 bits on GPUs, whose kernels read the model's
    dtype alone."""
    gpus = [device.name for device in deployment.kv_pool_devices if not device.is_cpu]
    for model in deployment.models.values() if gpus else ():
        if model.kv_cache_dtype != "auto":
            raise ConfigError(
                f"kv_cache_dtype: {model.kv_cache_dtype}, which {model.name} is given, is for KV "
                f"pools on CPUs, and this one is on {', '.join(gpus)}, where KV cache has the "
                "model's dtype: write auto, or leave it out"
            )


def gpus_of(devices: Sequence[Device]) -> dict[Device, GPU]:
    """Returns the GPU of each device that is none of the CPU's. Raises ConfigError for one that is
    not there."""
    named = [device for device in devices if not device.is_cpu]
    if far := [device.name for device in named if device.node]:
        raise ConfigError(
            f"{', '.join(far)}: GPUs of other hosts than node 0 are not supported yet: name CPUs "
            "there, or GPUs of node 0"
        )
    try:
        gpus = visible_gpus() if named else []
    except ConfigError as error:
        raise ConfigError(f"{', '.join(device.name for device in named)}: {error}") from None
    return {device: gpu_of(device, gpus) for device in named}


def loop_of(deployment: Deployment, gpus: Mapping[Device, GPU]) -> Literal["resident", "host"]:
    """Returns the loop that all devices of the deployment run: the one that was asked for, but the
    host's where one of its GPUs is older than RESIDENT_FROM, which a line in the log says.

    ``gpus``: by device. Raises ConfigError where that cannot be."""
    old = [
        f"{device.name} ({gpu.name}, compute capability {gpu.compute[0]}.{gpu.compute[1]})"
        for device, gpu in gpus.items()
        if gpu.compute < RESIDENT_FROM
    ]
    if not old or deployment.loop == "host":
        return deployment.loop
    least, named = ".".join(map(str, RESIDENT_FROM)), ", ".join(old)
    if deployment.gpu_links == "nvshmem":
        raise ConfigError(
            "gpu_links: nvshmem needs the resident loop, and that a GPU of compute capability "
            f"{least} or newer, unlike {named}: write gpu_links: peer"
        )
    log.warning(
        "loop: host is used on all devices, since the resident loop needs GPUs of compute "
        "capability %s or newer, unlike %s",
        least,
        named,
    )
    return "host"


def check_loop(deployment: Deployment) -> None:
    """Raises ConfigError for links that the loop cannot use, and for more lanes than the loop can
    have on a GPU."""
    if deployment.gpu_links == "nvshmem" and deployment.loop == "host":
        raise ConfigError(
            "gpu_links: nvshmem needs the resident loop: a host cannot see when NVSHMEM has carried"
            " a payload; write gpu_links: peer, or loop: resident"
        )
    if deployment.loop == "host":
        return
    connections = int(ENVIRONMENT["CUDA_DEVICE_MAX_CONNECTIONS"])
    for device in deployment.devices:
        needed = 0 if device.is_cpu else _lanes_on(deployment, device) + _OTHER_STREAMS
        if needed > connections:
            raise ConfigError(
                f"lanes: {deployment.lanes} lanes of each attention rank make {needed} streams on "
                f"{device.name}, which has {connections} connections; behind a resident loop each "
                "stream needs one of its own: ask for fewer lanes, or write loop: host"
            )


def _lanes_on(deployment: Deployment, device: Device) -> int:
    """Returns the number of lanes of the device's ranks."""
    kv, lanes = deployment.kv_pool_devices, 0
    if device in kv:
        lanes += deployment.lanes
    if device in deployment.weight_pool_devices:
        links = sum(other != device for other in kv) * deployment.lanes
        lanes += -(-links // _LINKS_OF_A_LANE)
    return lanes


def _parsed(line: str) -> GPU:
    fields = [field.strip() for field in line.split(",")]
    try:
        index, uuid, name, free, compute = fields
        major, minor = compute.split(".")
        return GPU(index, uuid, name, int(free) << 20, (int(major), int(minor)))
    except ValueError:
        raise ConfigError(f"nvidia-smi {_QUERY} printed {line!r}, not these five fields") from None


def _is_uuid(name: str, uuid: str) -> bool:
    """Whether CUDA takes ``name`` for the GPU: any unambiguous beginning of the UUID will do."""
    return name.startswith("GPU-") and uuid.startswith(name)
