"""The process that compiles grammars, for what clients send may take for ever or all memory.

It is forked from the scheduler before that has threads, keeps the tokenizers of all models, reads
those of models that come later, and forks a child for each grammar, which it can kill
(:mod:`crosspool.server.grammar_children`). The child tries whether the grammar can be compiled, and
tells which tokens may come first; the scheduler then compiles it again. That costs less than
handing the compiled grammar over: xgrammar's serialized form of a JSON schema of 300 properties has
167 MB and takes 5 s to write.
"""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import threading
from collections.abc import Callable, Mapping
from multiprocessing.connection import Pipe
from queue import SimpleQueue

import psutil

from crosspool.config.process import die_with_parent, set_title
from crosspool.server.grammar_children import CompileLimits, GrammarChildren, MakesModelCompiler
from crosspool.server.grammar_library import GrammarCompiler
from crosspool.server.grammar_messages import (
    FromGrammarProcess,
    ToGrammarProcess,
    decode_from_process,
    encode,
)

_STOPPED_SECONDS = 1.0
"""Time between two looks at whether a signal has stopped the process; it is killed at the second.
"""


class GrammarProcess:
    """The scheduler's side: forks the process when it is made, which must be before the first
    thread starts. ``compilers`` are those of the models that there are, by number; ``make`` makes
    that of a model that comes later, in the process, and raises ValueError where it cannot.

    ``on_told`` is called with what the process tells, and ``on_lost`` once when the process has
    ended unasked, both from a thread of this object. A process that a signal has stopped is killed.
    """

    def __init__(
        self,
        compilers: Mapping[int, GrammarCompiler],
        make: MakesModelCompiler,
        limits: CompileLimits,
        *,
        on_told: Callable[[FromGrammarProcess], None],
        on_lost: Callable[[], None],
    ) -> None:
        self._on_told = on_told
        self._on_lost = on_lost
        self._connection, theirs = Pipe()
        scheduler = os.getpid()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                self._connection.close()
                _become(scheduler)
                GrammarChildren(theirs, dict(compilers), make, limits).run()
            finally:
                os._exit(0)
        theirs.close()
        self._closing = False
        self._frames: SimpleQueue[bytes | None] = SimpleQueue()
        for name, target in (("send", self._send), ("receive", self._receive)):
            threading.Thread(target=target, name=f"grammars {name}", daemon=True).start()

    def send(self, message: ToGrammarProcess) -> None:
        """Returns at once."""
        self._frames.put(encode(message))

    def close(self) -> None:
        """Ends the process and waits until it has ended."""
        self._closing = True
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        self._frames.put(None)

    def _send(self) -> None:
        while (frame := self._frames.get()) is not None:
            try:
                self._connection.send_bytes(frame)
            except OSError:  # _receive notices it, too
                return

    def _receive(self) -> None:
        was_stopped = False
        while True:
            try:
                if not self._connection.poll(_STOPPED_SECONDS):
                    is_stopped = psutil.Process(self.pid).status() == psutil.STATUS_STOPPED
                    if was_stopped and is_stopped:
                        os.kill(self.pid, signal.SIGKILL)
                    was_stopped = is_stopped
                    continue
                frame = self._connection.recv_bytes()
            except (EOFError, OSError, psutil.NoSuchProcess):
                break
            self._on_told(decode_from_process(frame))
        if not self._closing:
            self._on_lost()


def _become(scheduler: int) -> None:
    """Makes this fork of the scheduler a process of its own, which ends with it."""
    die_with_parent()
    if os.getppid() != scheduler:
        os._exit(0)
    set_title("grammars")
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)  # it ends when the scheduler does
    gc.freeze()  # when a model goes, the collector runs, and would copy the scheduler's pages
    gc.disable()
    ctypes.CDLL(None).malloc_trim(0)  # what is free would hide how much memory a grammar takes
