"""SGLang's detokenizers, one per model, behind one poller. Models come and go while it runs.

Import :mod:`crosspool.frontend.compat` and call ``install()`` before this module.
"""

from __future__ import annotations

import logging
import os
import signal
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import Any

import msgspec
import zmq
from sglang.srt.managers import detokenizer_manager
from sglang.srt.managers.detokenizer_manager import DetokenizerManager
from sglang.srt.managers.io_struct import AbortReq, sock_send
from sglang.srt.runtime_context import publish

from crosspool.config.deployment import Deployment
from crosspool.config.process import freeze_heap
from crosspool.frontend import private
from crosspool.frontend.messages import finish_reason
from crosspool.frontend.own_messages import ModelGone
from crosspool.frontend.server_args import port_args, remove_left_sockets, server_args
from crosspool.observability.bounded_log import BoundedLog
from crosspool.scheduler.request import Finish
from crosspool.transport.detokenizer_link import (
    AddTokenizer,
    DetokenizerStarted,
    RemoveTokenizer,
    SchedulerLink,
    TokenizerAdded,
)

log = logging.getLogger(__name__)
bounded = BoundedLog(log)

_LONGEST_SLEEP_MS = 1000

_NO_TEXT = "the output cannot be detokenized"

private.one_cpu_monitor(detokenizer_manager)
private.bounded_messages(detokenizer_manager)
private.shared_tokenizers(detokenizer_manager)


def serve(deployment: Deployment, incarnation: int) -> None:
    """Returns after SIGTERM or SIGINT. ``incarnation`` is its number among the deployment's
    detokenizers, from 1 on; a later one gets from the scheduler what the one before it has not
    passed on."""
    stopping = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal stopping
        stopping = True

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    detokenizers = Detokenizers(deployment, incarnation, context)
    freeze_heap()
    detokenizers.start()
    log.info("ready")
    while not stopping:
        detokenizers.turn(_LONGEST_SLEEP_MS)


class Detokenizers:
    """The detokenizers of all models, which are those of ``deployment`` until :meth:`start` is
    called, and then come and go as the scheduler says."""

    def __init__(
        self, deployment: Deployment, incarnation: int, context: zmq.Context[zmq.Socket[bytes]]
    ) -> None:
        self._deployment = deployment
        self._incarnation = incarnation
        self._link = SchedulerLink(context, deployment.admin_address)
        self._poller = zmq.Poller()
        self._managers: dict[int, DetokenizerManager] = {}
        self._numbers: dict[Any, int] = {}
        """The model of each socket."""
        self._loading: dict[int, Future[DetokenizerManager]] = {}
        self._threads = ThreadPoolExecutor(1, "tokenizers")
        self._loaded = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        """Readable when a model's detokenizer has been made, or could not be."""
        self._poller.register(self._link.socket, zmq.POLLIN)
        self._poller.register(self._loaded, zmq.POLLIN)
        for number in deployment.models:
            try:
                self._keep(number, self._make(deployment, number))
            except Exception as error:
                if incarnation == 1:
                    raise
                # The scheduler, which asks for it again, is told why.
                log.error("%s cannot be detokenized: %r", deployment.models[number].name, error)
        remove_left_sockets(deployment, self._managers, "detok")

    def start(self) -> None:
        """Tells the scheduler which models are served."""
        self._link.send(
            DetokenizerStarted(incarnation=self._incarnation, models=list(self._managers))
        )

    def turn(self, timeout_ms: int) -> None:
        """Waits for something to do, and does it."""
        for source, _ in self._poller.poll(timeout_ms):
            if source is self._link.socket:
                self._listen()
            elif source == self._loaded:
                os.eventfd_read(self._loaded)
                self._take_loaded()
            elif source in self._numbers:
                self._take(self._numbers[source])

    def _take(self, number: int) -> None:
        manager = self._managers[number]
        is_gone = _take(manager, manager.recv_from_scheduler.recv_multipart())
        if is_gone:
            self._remove(number)

    def _make(self, deployment: Deployment, number: int) -> DetokenizerManager:
        args = server_args(deployment, number)
        # A manager reads the configuration that was published last, and only while it is made.
        publish(args, role="detokenizer")
        for earlier in range(1, self._incarnation):
            address = port_args(deployment, number, earlier).detokenizer_ipc_name
            Path(address.removeprefix("ipc://")).unlink(missing_ok=True)
        with private.making():
            return DetokenizerManager(args, port_args(deployment, number, self._incarnation))

    def _keep(self, number: int, manager: DetokenizerManager) -> None:
        self._managers[number] = manager
        self._numbers[manager.recv_from_scheduler] = number
        self._poller.register(manager.recv_from_scheduler, zmq.POLLIN)

    def _remove(self, number: int) -> None:
        manager = self._managers.pop(number)
        del self._numbers[manager.recv_from_scheduler]
        self._poller.unregister(manager.recv_from_scheduler)
        private.close_detokenizer(manager)

    def _listen(self) -> None:
        """Carries out what the scheduler says about models."""
        try:
            while (message := self._link.receive()) is not None:
                match message:
                    case AddTokenizer():
                        self._add(message)
                    case RemoveTokenizer(model=number):
                        if (future := self._loading.pop(number, None)) is not None:
                            future.add_done_callback(_discard)
                        elif number in self._managers:
                            self._remove(number)
        except (msgspec.DecodeError, RecursionError) as error:
            bounded.error("dropped what is no message of the scheduler's: %s", error)

    def _add(self, message: AddTokenizer) -> None:
        """Reads a further model's tokenizer, in a thread, since that can take a second."""
        number = message.model
        if number in self._managers:
            self._link.send(TokenizerAdded(model=number))
        elif number not in self._loading:
            deployment = self._deployment.with_model(number, message.config)
            future = self._threads.submit(self._make, deployment, number)
            self._loading[number] = future
            future.add_done_callback(lambda _: os.eventfd_write(self._loaded, 1))

    def _take_loaded(self) -> None:
        """Keeps what has been made for models that are still to be served."""
        for number, future in list(self._loading.items()):
            if not future.done():
                continue
            del self._loading[number]
            error = future.exception()
            if error is None:
                self._keep(number, future.result())
            text = None if error is None else str(error) or repr(error)
            self._link.send(TokenizerAdded(model=number, error=text))


def _discard(future: Future[DetokenizerManager]) -> None:
    if future.exception() is None:
        private.close_detokenizer(future.result())


def _take(manager: DetokenizerManager, frames: list[bytes]) -> bool:
    """Detokenizes one message. SGLang's own loop would end with one that is wrong, and the text of
    every model with it; here the requests that it is about end. Returns whether the model is gone.
    """
    message: Any = None
    try:
        (frame,) = frames
        message = private.decode(frame)
        if isinstance(message, ModelGone):
            return True
        output = private.detokenize(manager, message)
        if output is not None:
            sock_send(manager.send_to_tokenizer, output)
    except Exception as error:
        bounded.error("a message cannot be detokenized: %s", error, exc_info=message is not None)
        reason = finish_reason(Finish(kind="abort", message=_NO_TEXT, status=503), 0)
        for rid in getattr(message, "rids", None) or ():
            sock_send(manager.send_to_tokenizer, AbortReq(rid=rid, finished_reason=reason))
    return False
