"""SGLang's runtime context, one for each model instead of one for the process.

SGLang keeps its configuration in a global and reads some of it late, while it serves: context
length, template options, weight version. With several models in one process, every task must see
its own model's. So a stand-in takes the global's place and forwards to a context variable, which
asyncio hands on from task to task.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from sglang.srt.runtime_context import RuntimeContext

from crosspool.frontend import private

_current: ContextVar[RuntimeContext] = ContextVar("model_context")
_first: list[RuntimeContext] = []
"""The context that threads see that were not started within :func:`use`."""


def _context() -> RuntimeContext:
    return _current.get(_first[0])


class _CurrentContext:
    """Stands where SGLang's global context was."""

    def __getattr__(self, name: str) -> Any:
        return getattr(_context(), name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(_context(), name, value)


def new() -> RuntimeContext:
    """An empty context for one more model; the first call puts the stand-in in place."""
    context = private.new_context()
    if not _first:
        _first.append(context)
        private.replace_context(_CurrentContext())
    return context


@contextmanager
def use(context: RuntimeContext) -> Iterator[None]:
    """Within it, and in the tasks that are started there, SGLang sees this model's
    configuration."""
    token = _current.set(context)
    try:
        yield
    finally:
        _current.reset(token)
