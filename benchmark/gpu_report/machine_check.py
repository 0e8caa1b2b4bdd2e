"""What the machine is: GPU, driver, packages, libraries."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess

from crosspool.kernels import cuda_loop

from benchmark import machine as host
from benchmark.gpu_report.notes import Gravity, Notes
from benchmark.gpu_report.platform import Platform

_PACKAGES = (
    "torch", "triton", "cuda-bindings", "numpy", "transformers", "safetensors", "pytest",
    "pytest-timeout", "pytest-xdist", "nvidia-nvshmem-cu12", "nvidia-nvshmem-cu13", "msgspec",
    "pyzmq", "setproctitle", "sglang", "flashinfer-python",
)  # fmt: skip
_QUERY = (
    "name,uuid,driver_version,memory.total,memory.free,compute_cap,pcie.link.gen.current,"
    "pcie.link.width.current,clocks.max.sm,clocks.max.mem,power.limit,ecc.mode.current,mig.mode.current,"
    "persistence_mode,temperature.gpu"
)
_ATTRIBUTES = (
    "MULTIPROCESSOR_COUNT", "COMPUTE_CAPABILITY_MAJOR", "COMPUTE_CAPABILITY_MINOR", "CLOCK_RATE",
    "MEMORY_CLOCK_RATE", "GLOBAL_MEMORY_BUS_WIDTH", "L2_CACHE_SIZE",
    "MAX_SHARED_MEMORY_PER_BLOCK_OPTIN", "MAX_SHARED_MEMORY_PER_MULTIPROCESSOR",
    "VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED", "HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED",
    "HANDLE_TYPE_FABRIC_SUPPORTED", "GPU_DIRECT_RDMA_SUPPORTED", "HOST_NATIVE_ATOMIC_SUPPORTED",
    "CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM", "UNIFIED_ADDRESSING", "COMPUTE_PREEMPTION_SUPPORTED",
    "STREAM_PRIORITIES_SUPPORTED", "CONCURRENT_KERNELS", "ASYNC_ENGINE_COUNT",
)  # fmt: skip


def machine(notes: Notes) -> None:
    """What can be told without PyTorch and CUDA, and so where these do not work."""
    for name, value in host.describe().items():
        notes.fact(name, value)
    for package in _PACKAGES:
        try:
            notes.fact(package, importlib.metadata.version(package))
        except importlib.metadata.PackageNotFoundError:
            notes.fact(package, "not installed")
    for tool in ("nvidia-smi", "nvcc", "cmake", "ninja", "ncu", "compute-sanitizer"):
        notes.fact(tool, shutil.which(tool) or "not on PATH")
    for variable in sorted(os.environ):
        if variable.startswith(("CUDA_", "NVIDIA_VISIBLE", "TRITON_", "CROSSPOOL_", "NVSHMEM_")):
            notes.fact(variable, os.environ[variable])
    path = cuda_loop.library_path()
    notes.fact(cuda_loop.LIBRARY, path or "not built")
    if shutil.which("nvidia-smi"):
        _nvidia_smi(notes)


def device(platform: Platform, notes: Notes) -> None:
    """The GPU's attributes and memory."""
    import torch
    from cuda.bindings import driver as cuda

    notes.fact("CUDA of torch", torch.version.cuda)
    notes.fact("architectures of torch", torch.cuda.get_arch_list())
    notes.fact("CUDA of the driver", cuda.cuDriverGetVersion()[1])
    _, device = cuda.cuDeviceGet(0)
    for name in _ATTRIBUTES:
        attribute = getattr(cuda.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}", None)
        if attribute is not None:
            notes.fact(name.lower(), cuda.cuDeviceGetAttribute(attribute, device)[1])
    driver = platform.driver()
    notes.fact("bytes mapped at a time", driver.granularity)
    free, total = driver.memory()
    notes.fact("device memory", total, free=free)
    capability = torch.cuda.get_device_capability(0)
    if capability < (9, 0):
        words = ".".join(map(str, capability))
        notes.finding(
            Gravity.NOTE, f"compute capability {words}: launches from the device are doubtful"
        )


def _nvidia_smi(notes: Notes) -> None:
    command = ["nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        notes.finding(Gravity.NOTE, f"nvidia-smi cannot be asked: {error}")
        return
    for number, line in enumerate(done.stdout.splitlines()):
        for name, value in zip(_QUERY.split(","), line.split(","), strict=False):
            notes.fact(f"nvidia-smi, GPU {number}: {name}", value.strip())
