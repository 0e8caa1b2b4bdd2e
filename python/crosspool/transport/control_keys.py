"""The CURVE keys of the control path between hosts. The launcher of node 0 makes a pair for every
scheduler, and each host keeps what its processes need in its runtime folder."""

from __future__ import annotations

from pathlib import Path

import msgspec

from crosspool.transport.deployment_keys import CurveKeys, DeploymentKeys


class SchedulerKeys(msgspec.Struct, frozen=True, kw_only=True):
    """What a scheduler needs."""

    own: CurveKeys
    devices: str
    """Public key of the device processes of other hosts."""


class DeviceKeys(msgspec.Struct, frozen=True, kw_only=True):
    """What a device process needs that is not on node 0."""

    own: CurveKeys
    scheduler: str
    """Public key of the scheduler."""


def save_keys(file: Path, keys: SchedulerKeys | DeviceKeys) -> None:
    """Writes the file anew, for its owner alone. Raises OSError."""
    new = file.with_suffix(".new")
    new.touch(mode=0o600)
    new.write_bytes(msgspec.json.encode(keys))
    new.replace(file)


def save_data_key(file: Path, keys: DeploymentKeys) -> None:
    """Writes the key of the data path, for its owner alone. Raises OSError."""
    new = file.with_suffix(".new")
    new.touch(mode=0o600)
    new.write_bytes(keys.data_key)
    new.replace(file)


def load_scheduler_keys(file: Path) -> SchedulerKeys:
    return msgspec.json.decode(file.read_bytes(), type=SchedulerKeys)


def load_device_keys(file: Path) -> DeviceKeys:
    return msgspec.json.decode(file.read_bytes(), type=DeviceKeys)
