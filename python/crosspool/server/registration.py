"""Registers the server's models at a router, and takes them back."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from crosspool.config.deployment import Deployment
from crosspool.transport.router import Node, RouterClient, RouterError, Settled

log = logging.getLogger(__name__)

_LOOK_SECONDS = 0.1
"""Time between two looks at which models are served; they cost nothing."""
_SOON_SECONDS = 1.0
"""Time after which the router is asked again when it had to be told something, or has not
answered."""
_SETTLED_SECONDS = 5.0
"""The same when all was as it should be: it may have been restarted, and know nothing."""
_BACK_SECONDS = 3.0
"""Most time in which models are taken back before they leave all the same."""
_GOING_SECONDS = 0.05


class Registration:
    """Has the router of the deployment know the models that ``names`` has, as they come and go. A
    model that sleeps is one of them: a request wakes it.

    ``names`` is looked at again and again, and stays the same object."""

    def __init__(self, deployment: Deployment, names: Sequence[str]) -> None:
        assert deployment.router_url is not None and deployment.advertise_url is not None
        api_key, _ = deployment.api_keys
        self._router = RouterClient(deployment.router_url, deployment.router_api_key)
        self._node = Node(url=deployment.advertise_url, api_key=api_key)
        self._names = names
        self._leaving: list[str] = []
        """Models that are about to be unloaded."""
        self._lock = asyncio.Lock()
        self._ended = False
        self._problem = ""
        """What was last told of what does not work."""

    async def run(self) -> None:
        """Registers models until :meth:`end`. A router that does not answer is asked again: the
        server serves without it."""
        told: tuple[str, ...] | None = None
        due = 0.0
        while not self._ended:
            wanted = self._wanted()
            if wanted != told or time.monotonic() >= due:
                told, due = wanted, time.monotonic() + await self._keep(wanted)
            await asyncio.sleep(_LOOK_SECONDS)

    @asynccontextmanager
    async def without(self, name: str) -> AsyncIterator[None]:
        """Takes a model back before it is unloaded, so that the router sends it no request that
        would be refused. If it is still served afterwards, it is registered again."""
        self._leaving.append(name)
        try:
            await self._take_back()
            yield
        finally:
            self._leaving.remove(name)

    async def end(self) -> None:
        """Takes all models back, for good."""
        self._ended = True
        await self._take_back()
        if not self._lock.locked():  # a call that hangs ends with the process
            await self._router.close()

    def _wanted(self) -> tuple[str, ...]:
        if self._ended:
            return ()
        return tuple(name for name in self._names if name not in self._leaving)

    async def _keep(self, wanted: Sequence[str]) -> float:
        """Has the router know the models ``wanted``; returns seconds until the next look."""
        try:
            async with self._lock:
                if self._ended:
                    return _SETTLED_SECONDS
                settled = await self._router.settle(self._node, wanted)
        except RouterError as error:
            self._tell_problem(str(error))
            return _SOON_SECONDS
        self._tell(settled)
        self._tell_problem("; ".join(settled.problems))
        return _SOON_SECONDS if settled else _SETTLED_SECONDS

    async def _take_back(self) -> None:
        """Returns once the router sends no more requests to models that are not wanted any more, or
        when that takes too long."""
        try:
            async with asyncio.timeout(_BACK_SECONDS):
                async with self._lock:
                    while settled := await self._router.settle(self._node, self._wanted()):
                        self._tell(settled)
                        if not settled.removed:
                            break
                        await asyncio.sleep(_GOING_SECONDS)
        except TimeoutError:
            log.warning("router %s still has models that leave", self._router.url)
        except RouterError as error:
            self._tell_problem(str(error))

    def _tell(self, settled: Settled) -> None:
        for model in settled.added:
            log.info("router %s is asked to add model %s", self._router.url, model)
        for url in settled.removed:
            log.info("router %s is asked to remove %s", self._router.url, url)

    def _tell_problem(self, problem: str) -> None:
        """Logs what does not work, once for each new text."""
        if problem and problem != self._problem:
            log.error("router: %s", problem)
        self._problem = problem
