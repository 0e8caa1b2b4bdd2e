"""Why a request was not served, carried past SGLang's application to the HTTP response.

SGLang's application turns an error into a body, and drops what has no place in it. So the server
makes a :class:`Refusal` current before the application runs, the tokenizer manager fills it in, and
the status and headers of the response follow from it.
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass


@dataclass
class Refusal:
    """Empty while the request has not been refused."""

    status: int = 0
    """HTTP status; 0: not refused."""
    message: str = ""
    retry_after: int | None = None
    """Seconds after which the client may try again; None: the scheduler named none."""


current: ContextVar[Refusal | None] = ContextVar("refusal", default=None)
"""The refusal of the current request; tasks that the application starts for it share the object."""
