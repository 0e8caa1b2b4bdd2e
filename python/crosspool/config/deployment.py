"""What is deployed: models, pools, devices, lanes. Validated once, then frozen.

The launcher makes a :class:`Deployment` from flags or a YAML file and writes it as JSON into the
runtime directory; every process reads it from there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import msgspec

from crosspool.config.device import Device
from crosspool.config.errors import ConfigError

__all__ = ["ConfigError", "Deployment", "ModelConfig", "load", "save"]


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True):
    """One model of the deployment."""

    name: str
    """The ``model`` that clients ask for."""
    path: str
    """Local folder with config.json, safetensors and tokenizer."""
    kv_floor_bytes: int = 0
    """KV memory that the promises of other models never take, over the whole pool."""
    kv_ceiling_bytes: int | None = None
    """Most KV memory that this model's requests are promised, over the whole pool; None: all."""
    sglang: dict[str, Any] = {}
    """SGLang server arguments of this model alone (``chat_template``, ``tool_call_parser``, ...),
    keyed by ServerArgs field."""
    context_length: int | None = None
    """Longest sequence in tokens; None: the config's."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    weight_pool_devices: tuple[Device, ...] | None = None
    """Devices of the weight pool that share the FFN weights; None: all of them."""


class Deployment(msgspec.Struct, frozen=True, kw_only=True):
    models: tuple[ModelConfig, ...]
    kv_pool_devices: tuple[Device, ...]
    weight_pool_devices: tuple[Device, ...]
    kv_pool_bytes: int
    """KV cache budget of the whole pool, shared evenly by its devices."""
    weight_pool_bytes: int
    """FFN weight budget of the whole pool, shared evenly by its devices."""
    ffn_parallel: Literal["tp", "ep"] = "tp"
    loop: Literal["host", "resident"] = "resident"
    """What drives the layers: Python, or native threads (on a GPU, the GPU itself)."""
    gpu_links: Literal["peer", "nvshmem"] = "peer"
    """How GPUs exchange hidden states: by loads and stores into each other's memory, or by
    NVSHMEM."""
    lanes: int = 2
    """Batches in flight per attention rank."""
    lease_steps: int = 32
    """Decode steps at most that the resident loop makes of one batch without being told to."""
    page_size: int = 16
    """Tokens per KV page."""
    chunk_bytes: int = 2 << 20
    """Unit of physical KV memory that the virtualizer maps; a multiple of 2 MiB."""
    chunked_prefill_size: int = 512
    """Prompt tokens of one step at most."""
    tbt_target_ms: float = 50.0
    """Time between two tokens of a request, over which prompt chunks beside it should not push it,
    if pages of prompt can be small enough; 0: prompt chunks have their full size."""
    max_running_requests: int = 64
    """Requests of one model that run at once, per attention rank."""
    max_queued_requests: int = 1024
    """Requests of one model that wait at most; more are refused with 429."""
    queue_timeout: float = 600.0
    """Seconds that a request may wait for admission before it is refused with 429."""
    promise: Literal["worst_case", "growth"] = "worst_case"
    """What a request is promised at admission: pages for the longest that it can become, or for
    its prompt and some tokens, and more as it grows."""
    growth_tokens: int = 256
    """With ``growth``, tokens that are promised at a time."""
    prefix_cache: bool = True
    """Whether computed KV is kept for later requests that begin alike."""
    watchdog_timeout: float = 300.0
    """Seconds after which a step without result counts as a dead rank."""
    failure_grace: float = 5.0
    """Seconds for which the server goes on to answer 503 after one of its processes died."""
    drain_timeout: float = 60.0
    """Seconds that requests in flight may take to end after SIGTERM."""
    random_seed: int | None = None
    host: str = "127.0.0.1"
    port: int = 30000
    sglang: dict[str, Any] = {}
    """SGLang server arguments that hold for every model."""
    runtime_dir: str = ""
    """Folder of sockets and of this file; set by the launcher."""

    @property
    def devices(self) -> tuple[Device, ...]:
        """Every device once, KV pool first."""
        return tuple(dict.fromkeys((*self.kv_pool_devices, *self.weight_pool_devices)))

    def ffn_ranks(self, model: int) -> tuple[int, ...]:
        """FFN ranks that share the model's FFN weights, ascending; ``model``: index."""
        own = self.models[model].weight_pool_devices
        return tuple(
            rank
            for rank, device in enumerate(self.weight_pool_devices)
            if own is None or device in own
        )

    @property
    def max_step_tokens(self) -> int:
        """Most token rows of one step: a full prompt chunk beside every running request's row."""
        return self.chunked_prefill_size + self.max_running_requests

    @property
    def control_address(self) -> str:
        """ROUTER of the scheduler for the device processes."""
        return f"ipc://{self.runtime_dir}/control"

    @property
    def admin_address(self) -> str:
        """ROUTER of the scheduler for the front end's questions and for attached front ends."""
        return f"ipc://{self.runtime_dir}/admin"

    @property
    def file(self) -> Path:
        return Path(self.runtime_dir) / "deployment.json"


def save(deployment: Deployment) -> None:
    deployment.file.write_bytes(msgspec.json.encode(deployment))


def load(path: Path) -> Deployment:
    return msgspec.json.decode(path.read_bytes(), type=Deployment)
