"""SGLang's tokenizer manager, as one of several in a process that belongs to CrossPool."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from contextvars import ContextVar
from http import HTTPStatus
from typing import Any

import fastapi
from sglang.srt.managers import io_struct, tokenizer_manager
from sglang.srt.managers.tokenizer_manager import TokenizerManager
from sglang.srt.observability.metrics_collector import TokenizerMetricsCollector

from crosspool.frontend import private, refusal

native_api: ContextVar[bool] = ContextVar("native_api", default=False)
"""Whether the current request came by SGLang's ``/generate`` and not by an OpenAI route: the two
report errors differently."""

private.one_cpu_monitor(tokenizer_manager)


class Refused(ValueError):
    """An error on SGLang's own routes, which take the HTTP status from the ``status_code`` of a
    ValueError."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status_code = status


@private.handles_aborts
class PooledTokenizerManager(TokenizerManager):
    """Leaves signals and the end of the process to CrossPool, and turns every abort that has a
    status into an HTTP error of that status."""

    event_loop: asyncio.AbstractEventLoop | None

    def auto_create_handle_loop(self) -> None:
        if self.event_loop is None:
            self.event_loop = asyncio.get_running_loop()
            loop = tokenizer_manager.print_exception_wrapper(self.handle_loop)
            self.asyncio_tasks.add(self.event_loop.create_task(loop))

    async def on_abort(
        self, out: dict[str, Any], state: Any, is_stream: bool
    ) -> dict[str, Any] | None:
        """What SGLang does with an output that ends with an abort; see
        :func:`private.handles_aborts`."""
        reason = out["meta_info"]["finish_reason"]
        status = reason.get("status_code")
        if reason.get("type") != "abort" or not status:
            return None
        # OpenAI streams look for this type; in the message it was a plain number.
        reason["status_code"] = HTTPStatus(status)
        if is_stream and out["meta_info"]["completion_tokens"] > 0:
            return out
        if (refused := refusal.current.get()) is not None:
            refused.status = status
            refused.message = reason["message"]
            refused.retry_after = reason.get("retry_after")
        if native_api.get():
            raise Refused(reason["message"], status)
        if status == HTTPStatus.BAD_REQUEST:
            raise ValueError(reason["message"])
        raise fastapi.HTTPException(status_code=status, detail=reason["message"])

    def fail_all(self, message: str, status: int) -> None:
        """Ends every request with an error. For when the scheduler can no longer finish them."""
        reason = {"type": "abort", "message": message, "status_code": status}
        for rid in list(self.rid_to_state):
            private.abort(self, io_struct.AbortReq(rid=rid, finished_reason=dict(reason)))


def _shared(make: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps ``make`` so that it makes a metric once per name and returns the same one later."""
    made: dict[str, Any] = {}

    def get(**arguments: Any) -> Any:
        name = arguments["name"]
        if name not in made:
            made[name] = make(**arguments)
        return made[name]

    return get


@functools.cache
def shared_metrics() -> type[TokenizerMetricsCollector]:
    """SGLang's metrics of a tokenizer manager, with one set of metrics for all models of the
    process. The label ``model_name`` tells them apart."""
    # Here, because it may be imported only once PROMETHEUS_MULTIPROC_DIR is set.
    import prometheus_client

    return private.with_metric_classes(
        TokenizerMetricsCollector,
        _shared(prometheus_client.Counter),
        _shared(prometheus_client.Gauge),
        _shared(prometheus_client.Histogram),
    )
