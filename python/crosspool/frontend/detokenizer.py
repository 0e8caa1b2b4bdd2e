"""SGLang's detokenizers, one per model, behind one poller.

Import :mod:`crosspool.frontend.compat` and call ``install()`` before this module.
"""

from __future__ import annotations

import logging
import signal
from types import FrameType

import zmq
from sglang.srt.managers import detokenizer_manager
from sglang.srt.managers.detokenizer_manager import DetokenizerManager
from sglang.srt.managers.io_struct import sock_recv, sock_send
from sglang.srt.runtime_context import publish

from crosspool.config.deployment import Deployment
from crosspool.config.process import freeze_heap
from crosspool.frontend import private
from crosspool.frontend.server_args import port_args, server_args

log = logging.getLogger(__name__)

_LONGEST_SLEEP_MS = 1000

private.one_cpu_monitor(detokenizer_manager)


def serve(deployment: Deployment) -> None:
    """Returns after SIGTERM or SIGINT."""
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
        manager = DetokenizerManager(args, port_args(deployment, index))
        managers[manager.recv_from_scheduler] = manager
        poller.register(manager.recv_from_scheduler, zmq.POLLIN)
    freeze_heap()
    log.info("ready")
    while not stopping:
        for socket, _ in poller.poll(_LONGEST_SLEEP_MS):
            manager = managers[socket]
            try:
                output = private.detokenize(manager, sock_recv(socket))
            except Exception:
                # SGLang's own loop would end here, and text of every model with it.
                log.exception("dropped a message that cannot be detokenized")
                continue
            if output is not None:
                sock_send(manager.send_to_tokenizer, output)
