"""SGLang's detokenizers, one per model, behind one poller.

Import :mod:`crosspool.frontend.compat` and call ``install()`` before this module.
"""

from __future__ import annotations

import logging
import signal
from pathlib import Path
from types import FrameType
from typing import Any

import zmq
from sglang.srt.managers import detokenizer_manager
from sglang.srt.managers.detokenizer_manager import DetokenizerManager
from sglang.srt.managers.io_struct import AbortReq, sock_send
from sglang.srt.runtime_context import publish

from crosspool.config.deployment import Deployment
from crosspool.config.process import freeze_heap
from crosspool.frontend import private
from crosspool.frontend.messages import finish_reason
from crosspool.frontend.server_args import port_args, server_args
from crosspool.observability.bounded_log import BoundedLog
from crosspool.scheduler.request import Finish
from crosspool.transport import admin

log = logging.getLogger(__name__)
bounded = BoundedLog(log)

_LONGEST_SLEEP_MS = 1000

_NO_TEXT = "the output cannot be detokenized"

private.one_cpu_monitor(detokenizer_manager)
private.bounded_messages(detokenizer_manager)


def serve(deployment: Deployment, incarnation: int) -> None:
    """Returns after SIGTERM or SIGINT. ``incarnation`` is its number among the deployment's
    detokenizers, from 1 on; a later one asks the scheduler for what the one before it has not
    passed on."""
    stopping = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal stopping
        stopping = True

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    managers: dict[zmq.Socket[bytes], DetokenizerManager] = {}
    poller = zmq.Poller()
    for index in range(len(deployment.models)):
        args = server_args(deployment, index)
        # A manager reads the configuration that was published last, and only while it is made.
        publish(args, role="detokenizer")
        for earlier in range(1, incarnation):
            address = port_args(deployment, index, earlier).detokenizer_ipc_name
            Path(address.removeprefix("ipc://")).unlink(missing_ok=True)
        manager = DetokenizerManager(args, port_args(deployment, index, incarnation))
        managers[manager.recv_from_scheduler] = manager
        poller.register(manager.recv_from_scheduler, zmq.POLLIN)
    freeze_heap()
    is_known = incarnation == 1
    while not is_known and not stopping:
        try:
            admin.detokenizer_replaced(deployment.admin_address, incarnation)
            is_known = True
        except admin.AdminError as error:
            log.warning("the scheduler does not know of this process: %s", error)
    log.info("ready")
    while not stopping:
        for socket, _ in poller.poll(_LONGEST_SLEEP_MS):
            _take(managers[socket], socket.recv_multipart())


def _take(manager: DetokenizerManager, frames: list[bytes]) -> None:
    """Detokenizes one message. SGLang's own loop would end with one that is wrong, and the text of
    every model with it; here the requests that it is about end."""
    message: Any = None
    try:
        (frame,) = frames
        message = private.decode(frame)
        output = private.detokenize(manager, message)
        if output is not None:
            sock_send(manager.send_to_tokenizer, output)
    except Exception as error:
        bounded.error("a message cannot be detokenized: %s", error, exc_info=message is not None)
        reason = finish_reason(Finish(kind="abort", message=_NO_TEXT, status=503), 0)
        for rid in getattr(message, "rids", None) or ():
            sock_send(manager.send_to_tokenizer, AbortReq(rid=rid, finished_reason=reason))
