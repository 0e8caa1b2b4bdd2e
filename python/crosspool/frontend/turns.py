"""How the HTTP process stays able to answer while many requests come at once.

Beginning a request takes the event loop a millisecond or two, and so does beginning each sample of
one. If everything that is ready began at one go, health checks and the streams of other clients
would wait for all of it.
"""

from __future__ import annotations

import asyncio
from collections import deque


class Turns:
    """Lets pieces of work begin one at a time, first come, first served. Between two of them the
    event loop does once everything else that it can do."""

    def __init__(self) -> None:
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._taken = False
        """Whether a piece of work has begun since the event loop last looked around."""

    async def take(self) -> bool:
        """Returns when the caller may begin: whether it had to wait."""
        loop = asyncio.get_running_loop()
        if not self._taken:
            self._taken = True
            loop.call_soon(self._pass_on)
            return False
        turn = loop.create_future()
        self._waiting.append(turn)
        await turn
        return True

    def _pass_on(self) -> None:
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():  # its caller may have been cancelled
                turn.set_result(None)
                asyncio.get_running_loop().call_soon(self._pass_on)
                return
        self._taken = False
