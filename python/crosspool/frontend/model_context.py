"""SGLang's process-wide runtime context, one per model.

SGLang holds the published configuration in one global of ``runtime_context`` and reads some of it
late, while it serves (context length, template options, weight version). With several models in
one process, every task must see its own model's: the global becomes a stand-in that forwards to a
context variable, which asyncio carries along with each task.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from sglang.srt import runtime_context

_current: ContextVar[runtime_context.RuntimeContext] = ContextVar("model_context")
_first: list[runtime_context.RuntimeContext] = []
"""What threads see that were not started within :func:`use`."""


def _context() -> runtime_context.RuntimeContext:
    return _current.get(_first[0])


class _CurrentContext:
    """Stands where SGLang's global context was."""

    def __getattr__(self, name: str) -> Any:
        return getattr(_context(), name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(_context(), name, value)


def new() -> runtime_context.RuntimeContext:
    """An empty context for one more model; the first call puts the stand-in in place."""
    if not isinstance(runtime_context._CONTEXT, _CurrentContext):
        runtime_context._CONTEXT = _CurrentContext()
    context = runtime_context.RuntimeContext(parallel=runtime_context._PARALLEL)
    if not _first:
        _first.append(context)
    return context


@contextmanager
def use(context: runtime_context.RuntimeContext) -> Iterator[None]:
    """Within it, and in the tasks that are started there, SGLang sees this model's
    configuration."""
    token = _current.set(context)
    try:
        yield
    finally:
        _current.reset(token)
