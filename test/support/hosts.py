"""Devices of several hosts on one machine: what each of them needs to find the others over
loopback."""

from __future__ import annotations

import dataclasses
import secrets
import socket
from typing import Any

from crosspool.config.deployment import Deployment
from crosspool.config.device import Device
from crosspool.transport.connector import Address, Peers
from crosspool.transport.handshake import ID_BYTES, KEY_BYTES, Credentials


class Hosts:
    """The listeners of the devices of a deployment, and the key that they share."""

    def __init__(self, deployment: Deployment, max_row_bytes: int) -> None:
        self.credentials = Credentials(
            key=secrets.token_bytes(KEY_BYTES),
            deployment=secrets.token_bytes(ID_BYTES),
            max_rows=deployment.max_step_tokens,
            max_row_bytes=max_row_bytes,
            incarnation=0,
        )
        self.listeners = {
            device.name: socket.create_server(("127.0.0.1", 0))
            for device in deployment.weight_pool_devices
        }
        self.addresses: dict[str, Address] = {
            name: listener.getsockname()[:2] for name, listener in self.listeners.items()
        }
        self._incarnations: dict[str, int] = {}

    def peers(self, device: Device, **changed: Any) -> Peers:
        """What the next process of a device needs."""
        incarnation = self._incarnations.get(device.name, 0) + 1
        self._incarnations[device.name] = incarnation
        own = dataclasses.replace(self.credentials, incarnation=incarnation)
        return Peers(
            dataclasses.replace(own, **changed), self.listeners.get(device.name), self.addresses
        )

    def close(self) -> None:
        for listener in self.listeners.values():
            listener.close()
