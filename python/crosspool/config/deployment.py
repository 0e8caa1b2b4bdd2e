"""What is deployed: models, pools, devices, lanes. Validated once, then frozen.

The launcher makes a :class:`Deployment` from flags or a YAML file and writes it as JSON into the
runtime directory; every process reads it from there.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from crosspool.config.device import Device
from crosspool.config.errors import ConfigError
from crosspool.config.options import ModelOptions, Options

__all__ = ["ConfigError", "Deployment", "ModelConfig", "load", "save"]


class ModelConfig(ModelOptions, frozen=True, kw_only=True):
    """One model of the deployment: its options, with none left open that must be known."""

    name: str


class Deployment(Options, frozen=True, kw_only=True):
    """The options of a server, with none left open that must be known."""

    models: tuple[ModelConfig, ...]
    kv_pool_bytes: int
    weight_pool_bytes: int
    expert_pool_bytes: int = 0
    runtime_dir: str = ""
    """Folder of sockets and of this file; set by the launcher."""

    @property
    def devices(self) -> tuple[Device, ...]:
        """Every device once, KV pool first."""
        return tuple(dict.fromkeys((*self.kv_pool_devices, *self.weight_pool_devices)))

    def ffn_ranks(self, model: int) -> tuple[int, ...]:
        """FFN ranks that share the FFN weights of the model at index ``model``, ascending."""
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
    def admin_socket(self) -> Path:
        """Unix socket of the HTTP server on which every caller is the admin."""
        return Path(self.runtime_dir) / "http-admin"

    @property
    def notice_address(self) -> str:
        """PULL of the HTTP process for what the launcher tells it of the other processes."""
        return f"ipc://{self.runtime_dir}/notices"

    @property
    def keys(self) -> tuple[str | None, str | None]:
        """The ordinary key and the admin key that clients must send, where they are set."""
        return self.sglang.get("api_key"), self.sglang.get("admin_api_key")

    @property
    def file(self) -> Path:
        return Path(self.runtime_dir) / "deployment.json"


def save(deployment: Deployment) -> None:
    """Writes the deployment where its processes read it, for nobody else: it has the keys."""
    deployment.file.touch(mode=0o600)
    deployment.file.write_bytes(msgspec.json.encode(deployment))


def load(path: Path) -> Deployment:
    return msgspec.json.decode(path.read_bytes(), type=Deployment)
