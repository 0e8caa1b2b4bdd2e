"""What is deployed: models, pools, devices, lanes. Validated, then frozen.

The launcher makes a :class:`Deployment` from flags or a YAML file and writes it as JSON into the
runtime directory; every process reads it from there. Models come and go while the server runs: the
scheduler writes the file anew each time, so that a process that starts later reads those of then.
"""

from __future__ import annotations

import os
from itertools import count
from pathlib import Path

import msgspec

from crosspool.config.device import Device
from crosspool.config.errors import ConfigError
from crosspool.config.hosts import HostAddress, NetworkLinks, host_address
from crosspool.config.options import ModelOptions, ServerOptions

__all__ = ["MAX_MODELS", "ConfigError", "Deployment", "ModelConfig", "load", "save"]

MAX_MODELS = 256
"""Most models at a time."""


class ModelConfig(ModelOptions, frozen=True, kw_only=True):
    """One model of the deployment: its options, with none left open that must be known."""

    name: str


class Deployment(ServerOptions, frozen=True, kw_only=True):
    """The options of a server, with none left open that must be known."""

    models: dict[int, ModelConfig]
    """Every model by its number, ascending. A number is never used again, and at no time have two
    models numbers that are equal modulo ``MAX_MODELS``: devices keep tables of so many places."""
    next_model: int
    """Every number that has been used is less."""
    kv_pool_bytes: int
    weight_pool_bytes: int
    expert_pool_bytes: int = 0
    network_links: NetworkLinks | None = None
    """How the hosts' devices are linked; None: no link leaves its host."""
    runtime_dir: str = ""
    """Folder of sockets and of this file; set by the launcher."""

    @property
    def devices(self) -> tuple[Device, ...]:
        """Every device once, KV pool first."""
        return tuple(dict.fromkeys((*self.kv_pool_devices, *self.weight_pool_devices)))

    @property
    def own_devices(self) -> tuple[Device, ...]:
        """The devices of this host, KV pool first."""
        return tuple(device for device in self.devices if device.node == self.node_rank)

    @property
    def other_nodes(self) -> tuple[int, ...]:
        """Numbers of the other hosts that have devices, ascending."""
        return tuple(sorted({device.node for device in self.devices} - {self.node_rank}))

    @property
    def names(self) -> dict[int, str]:
        """The models' names, by number."""
        return {number: model.name for number, model in self.models.items()}

    def attention_ranks(self, model: int) -> tuple[int, ...]:
        """Attention ranks that hold the attention part of a model and serve its requests,
        ascending."""
        own = self.models[model].kv_pool_devices
        return tuple(
            rank for rank, device in enumerate(self.kv_pool_devices) if own is None or device in own
        )

    def ffn_ranks(self, model: int) -> tuple[int, ...]:
        """FFN ranks that share the FFN weights of a model, ascending."""
        return self.ranks_of(self.models[model])

    def ranks_of(self, model: ModelConfig) -> tuple[int, ...]:
        """FFN ranks that share the FFN weights of a model of this configuration, ascending."""
        own = model.weight_pool_devices
        return tuple(
            rank
            for rank, device in enumerate(self.weight_pool_devices)
            if own is None or device in own
        )

    def free_number(self) -> int:
        """Returns the number for a further model.

        Raises ConfigError when there are ``MAX_MODELS`` models already."""
        places = {number % MAX_MODELS for number in self.models}
        if len(places) == MAX_MODELS:
            raise ConfigError(
                f"models: there are {MAX_MODELS}, and no more can be served at a time"
            )
        return next(n for n in count(self.next_model) if n % MAX_MODELS not in places)

    def with_model(self, number: int, model: ModelConfig) -> Deployment:
        """Returns the deployment with a further model."""
        models = {**self.models, number: model}
        after = max(self.next_model, number + 1)
        return msgspec.structs.replace(self, models=models, next_model=after)

    def without_model(self, number: int) -> Deployment:
        """Returns the deployment with one model less."""
        models = {other: model for other, model in self.models.items() if other != number}
        return msgspec.structs.replace(self, models=models)

    @property
    def max_step_tokens(self) -> int:
        """Most token rows of one step: a full prompt chunk beside every running request's row."""
        return self.chunked_prefill_size + self.max_running_requests

    @property
    def control_address(self) -> str:
        """ROUTER of the scheduler for the device processes of its host."""
        return f"ipc://{self.runtime_dir}/control"

    @property
    def host_address(self) -> HostAddress:
        """Where node 0 listens for other hosts. Raises ConfigError where there are none."""
        return host_address(self.dist_init_addr or "")

    @property
    def control_keys(self) -> Path:
        """File with the CURVE keys of the control path between hosts: on node 0 those of the
        scheduler, on the others what their device processes need."""
        return Path(self.runtime_dir) / "control.keys"

    @property
    def data_key(self) -> Path:
        """File with the key of the data path between hosts, which has as many bytes."""
        return Path(self.runtime_dir) / "data.key"

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
    def api_keys(self) -> tuple[str | None, str | None]:
        """The ordinary key and the admin key that clients must send, where they are set."""
        return self.sglang.get("api_key"), self.sglang.get("admin_api_key")

    @property
    def file(self) -> Path:
        return Path(self.runtime_dir) / "deployment.json"


def save(deployment: Deployment) -> None:
    """Writes the deployment where its processes read it, for nobody else: it has the keys. Who
    reads meanwhile gets the earlier one. The file's time stays that of the first writing, at which
    the server began. Raises OSError."""
    file = deployment.file
    new = file.with_suffix(".new")
    new.touch(mode=0o600)
    new.write_bytes(msgspec.json.encode(deployment))
    if file.exists():
        began_ns = file.stat().st_mtime_ns
        os.utime(new, ns=(began_ns, began_ns))
    new.replace(file)


def load(path: Path) -> Deployment:
    return msgspec.json.decode(path.read_bytes(), type=Deployment)
