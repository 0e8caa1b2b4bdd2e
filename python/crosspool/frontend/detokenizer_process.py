"""The detokenizer process: SGLang's detokenizer of every model, behind one poller.

    python -m crosspool.frontend.detokenizer_process --deployment FILE

Exit status 0 after SIGTERM, 2 for a user's mistake (told on stderr), 1 for anything else.
"""

from __future__ import annotations

import functools
import logging
import signal
from collections.abc import Sequence
from types import FrameType

import zmq

from crosspool.config.deployment import Deployment
from crosspool.config.process import freeze_heap
from crosspool.frontend import compat
from crosspool.frontend.process import leave, run

log = logging.getLogger(__name__)

_LONGEST_SLEEP_MS = 1000


def serve(deployment: Deployment) -> None:
    compat.install()
    from sglang.srt.managers import detokenizer_manager
    from sglang.srt.managers.detokenizer_manager import DetokenizerManager
    from sglang.srt.managers.io_struct import sock_recv, sock_send
    from sglang.srt.runtime_context import publish

    from crosspool.frontend.server_args import port_args, server_args

    # One thread counts the process's CPU time, whatever the number of managers.
    detokenizer_manager.start_cpu_monitor_thread = functools.cache(
        detokenizer_manager.start_cpu_monitor_thread
    )
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
        # A manager reads what was published last, and only while it is constructed.
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
                output = manager._request_dispatcher(sock_recv(socket))
            except Exception:
                # SGLang's detokenizer would end here, and every model with it.
                log.exception("dropped a message that cannot be detokenized")
                continue
            if output is not None:
                sock_send(manager.send_to_tokenizer, output)


def main(argv: Sequence[str] | None = None) -> int:
    return run("detokenizer", serve, argv)


if __name__ == "__main__":
    leave(main())
