"""The guard of a GPU on which a resident loop runs.

CUDA may hold some calls back until the device has no work: those that allocate or free page-locked
or device memory, load a kernel, create a stream or instantiate a graph. Behind a resident loop,
which never ends, such a call may wait for ever. So a loop starts when all of this is done, and
whoever makes such a call asks :class:`Residency` first."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

log = logging.getLogger(__name__)


class ResidencyError(RuntimeError):
    """A call was refused that may wait for ever behind a resident loop."""


class Residency:
    """Knows whether a resident loop is on a device. :class:`~crosspool.kernels.cuda_loop.CudaLoop`
    says when it comes and goes."""

    def __init__(
        self, device: str, allocations: Callable[[], Mapping[str, int]] | None = None
    ) -> None:
        """``device``: its name, as the deployment writes it; ``allocations``: returns how often
        each allocator, by its name, has asked CUDA for memory so far."""
        self.device = device
        self._loops: set[int] = set()
        self._allocations = allocations or dict
        self._before: Mapping[str, int] = {}

    @property
    def resident(self) -> bool:
        """Whether a loop is on the device."""
        return bool(self._loops)

    def check(self, what: str) -> None:
        """Raises ResidencyError while the loop is on the device. ``what``: what is asked for."""
        if self.resident:
            raise ResidencyError(
                f"{what}: the resident loop on {self.device} is on the device, so this may wait "
                "for ever; do it before the loop starts, or while the loop is quiesced"
            )

    def enter(self, loop: object) -> None:
        """Notes that ``loop`` is about to be launched."""
        if not self.resident:
            self._before = self._allocations()
        self._loops.add(id(loop))

    def leave(self, loop: object) -> None:
        """Notes that ``loop`` has left the device. When none is left, an error in the log names
        each allocator that has asked CUDA for memory meanwhile: it got through, and another time it
        may not."""
        was_resident = self.resident
        self._loops.discard(id(loop))
        if was_resident and not self.resident:
            for name, count in self._allocations().items():
                if (more := count - self._before.get(name, 0)) > 0:
                    log.error(
                        "%s: the resident loop on %s was on the device during %d calls, each of "
                        "which may wait for ever",
                        name,
                        self.device,
                        more,
                    )

    @contextlib.contextmanager
    def over_triton(self) -> Iterator[None]:
        """Makes Triton check before it loads a kernel, which waits for the device to drain."""
        import triton

        def on_load(module: Any, function: Any, name: str, metadata: Any, key: str) -> None:
            del module, function, metadata, key
            self.check(f"loading the Triton kernel {name}")

        hook = triton.knobs.runtime.kernel_load_start_hook
        hook.add(on_load)
        try:
            yield
        finally:
            hook.remove(on_load)
