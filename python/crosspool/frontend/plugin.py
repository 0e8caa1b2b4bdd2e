"""A plugin with which a stock SGLang server serves a model of a CrossPool that is already running.

    CROSSPOOL_ADMIN=ipc:///.../admin python -m crosspool.sglang launch_server \\
        --model-path PATH --served-model-name NAME --device cpu --port 31000

SGLang loads it by its entry point (group ``sglang.srt.plugins``). Without ``CROSSPOOL_ADMIN`` it
does nothing. With it, the server starts no scheduler of its own: CrossPool connects to its sockets
and treats it as one more front end of the model NAME. The server ends when CrossPool does.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from functools import partial
from typing import Any

from crosspool.transport import admin

log = logging.getLogger(__name__)

ADDRESS = "CROSSPOOL_ADMIN"
_PING_SECONDS = 1.0
_SILENCE_SECONDS = 15.0


def register() -> None:
    """SGLang calls this in every process that it starts."""
    address = os.environ.get(ADDRESS)
    if address is None:
        return
    if not address.startswith("ipc://"):
        raise ValueError(f"{ADDRESS} must be an ipc:// address, got {address!r}")

    from crosspool.frontend import private

    # CrossPool reads no pickles; for this process, and for the detokenizer that it will start.
    private.refuse_pickles()
    os.environ["SGLANG_USE_PICKLE_IPC"] = "0"
    private.replace_scheduler_launch(partial(_attach, address))


def _attach(address: str, server_args: Any, port_args: Any) -> Any:
    from sglang.srt.entrypoints.engine import SchedulerInitResult

    attached = admin.attach(
        address,
        model=server_args.served_model_name or server_args.model_path,
        scheduler_input=port_args.scheduler_input_ipc_name,
        tokenizer=port_args.tokenizer_ipc_name,
        detokenizer=port_args.detokenizer_ipc_name,
    )
    watch = threading.Thread(
        target=_watch, args=(address, attached.scheduler), name="crosspool watch", daemon=True
    )
    watch.start()
    ready = {
        "status": "ready",
        "max_total_num_tokens": attached.max_total_tokens,
        "max_req_input_len": attached.max_input_tokens,
        "startup_time": {},
    }
    return SchedulerInitResult(scheduler_infos=[ready]), None


def _watch(address: str, scheduler: int) -> None:
    """Ends this server when the deployment has failed or is gone and could finish no request, or
    when another scheduler has taken the place of the one with the number ``scheduler``, to which
    this server is attached."""
    heard = time.monotonic()
    while time.monotonic() - heard < _SILENCE_SECONDS:
        time.sleep(_PING_SECONDS)
        try:
            status = admin.status(address, timeout=_PING_SECONDS)
        except admin.AdminError:
            continue
        heard = time.monotonic()
        if not status.ready:
            log.error("this server ends, since CrossPool cannot serve: %s", status.message)
            break
        if status.incarnation != scheduler:
            log.error("this server ends, since CrossPool's scheduler is a new one: start it again")
            break
    else:
        log.error("this server ends, since CrossPool at %s does not answer", address)
    # SGLang's own way to end a server whose scheduler has died.
    os.kill(os.getpid(), signal.SIGQUIT)
