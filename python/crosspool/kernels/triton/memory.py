"""Memory for the kernels' workspaces."""

from __future__ import annotations

from typing import Protocol

import torch


class Memory(Protocol):
    """Gives out tensors, uninitialised."""

    @property
    def device(self) -> torch.device: ...

    def take(self, dtype: torch.dtype, *shape: int) -> torch.Tensor: ...


class DeviceMemory:
    """Allocates every tensor by itself."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def take(self, dtype: torch.dtype, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)
