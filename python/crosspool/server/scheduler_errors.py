"""What the scheduler refuses, as HTTP has it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from crosspool.server.errors import RequestError
from crosspool.transport.admin import AdminError, AdminMistake


@contextmanager
def scheduler_errors() -> Iterator[None]:
    """Within it, a mistake that the scheduler tells of ends the request with 400, and with 503 what
    it cannot do now."""
    try:
        yield
    except AdminMistake as error:
        raise RequestError(400, str(error)) from None
    except AdminError as error:
        raise RequestError(503, str(error)) from None
