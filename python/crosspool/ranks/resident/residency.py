"""Models that sleep and wake on a device of the resident loop."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from enum import Enum, auto
from queue import Empty, SimpleQueue

from crosspool.config.errors import ConfigError
from crosspool.kernels import engine_structs as es
from crosspool.kernels.engine import Loop
from crosspool.ranks.resident.experts import ExpertPool
from crosspool.ranks.resident.reading import Packer, Part, Reading, ReadingOrder, SleepingPart
from crosspool.transport.messages import Slept, Waking, Woken

log = logging.getLogger(__name__)

_TELL_SECONDS = 0.2
_NOT_KEPT = (
    "its packed weights are not kept, and so cannot be read again: give packed_cache_bytes and a "
    "packed_cache_dir that can be written to"
)


class _State(Enum):
    ASLEEP = auto()
    WAKING = auto()
    RESIDENT = auto()
    ENDING = auto()
    """Its weights go: the loop lets go of them, then the system gets the memory."""


class _Model:
    """A model that a device has a share of."""

    def __init__(self, parts: Sequence[Part], kept: Sequence[SleepingPart] | None) -> None:
        self.parts = parts
        self.order = None if kept is None else ReadingOrder(kept)
        """How its weights are read; None: they are not kept."""
        taken = all(part.weights.arena.taken for part in parts)
        self.state = _State.RESIDENT if taken else _State.ASLEEP
        self.reading: Reading | None = None
        self.tell_at = 0.0
        """When to tell how far reading is, on the monotonic clock."""
        self.error: str | None = None
        """Why its weights go, when they could not be read."""


class SleepingModels:
    """Reads weights and gives them up beside a running loop, each in a thread, since both take
    seconds. All methods are for the thread that carries messages."""

    def __init__(
        self,
        models: Mapping[int, tuple[Sequence[Part], Sequence[SleepingPart] | None]],
        loop: Loop,
        descriptor: int,
        packer: Packer,
        given_up: Callable[[int], None],
        *,
        pool: ExpertPool | None = None,
    ) -> None:
        """``models``: the device's parts of each model that it has a share of, and where their
        weights are kept; None: nowhere. ``descriptor``: an eventfd that is written to when
        :meth:`news` has some.
        ``given_up`` is called in a thread after the weights of a model went. ``pool``: for routed
        experts on demand."""
        self._models = {index: _Model(*parts) for index, parts in models.items()}
        self._loop = loop
        self._descriptor = descriptor
        self._packer = packer
        self._given_up = given_up
        self._pool = pool
        self._ended: SimpleQueue[tuple[int, str | None]] = SimpleQueue()
        """Models whose thread is done, and why they could not be read."""
        self._news: list[Waking | Woken | Slept] = []
        self._threads: dict[int, threading.Thread] = {}

    def enter(self, index: int, parts: Sequence[Part], kept: Sequence[SleepingPart] | None) -> None:
        """A further model comes, which is asleep."""
        self._models[index] = _Model(parts, kept)

    def leave(self, index: int) -> None:
        """A model goes, which is asleep. Its parts may be closed then."""
        if index in self._models:
            self._expect(index, _State.ASLEEP)
            del self._models[index]

    def resident(self) -> list[int]:
        return sorted(i for i, model in self._models.items() if model.state is _State.RESIDENT)

    def wake(self, index: int) -> None:
        """Begins to read the weights of a model; :class:`Woken` comes among the news."""
        model = self._models[index]
        if model.state is _State.RESIDENT:
            self._tell(Woken(model=index))
            return
        self._expect(index, _State.ASLEEP)
        if model.order is None:
            self._tell(Woken(model=index, error=_NOT_KEPT))
            return
        model.state, model.error = _State.WAKING, None
        keys = [one.key for one in model.order.parts]
        packer = self._packer(index, keys)
        model.reading = Reading(self._loop, index, model.order, packer, self._pool)
        for part in model.parts:
            self._loop.set_present(index, part.native, 0)
        self._start(index, self._read)

    def sleep(self, index: int) -> None:
        """Begins to give up the weights of a model; :class:`Slept` comes among the news."""
        model = self._models[index]
        if model.state is _State.ASLEEP:
            self._tell(Slept(model=index))
            return
        if model.state is _State.ENDING and model.error is not None:
            model.error = None  # it goes already, since an expert could not be read
            return
        self._expect(index, _State.RESIDENT)
        model.state = _State.ENDING
        self._loop.push_close(index, refuse=False)

    def closed(self, index: int) -> None:
        """The loop reads no weights of a model any more."""
        self._expect(index, _State.ENDING)
        self._start(index, self._drop)

    def news(self) -> list[Waking | Woken | Slept]:
        """Returns what has happened since the last call, and how far reading is."""
        while True:
            try:
                index, error = self._ended.get_nowait()
            except Empty:
                break
            self._threads.pop(index).join()
            self._end(index, error)
        self._look_at_experts()
        now = time.monotonic()
        for index, model in self._models.items():
            if model.reading is not None and now >= model.tell_at:
                done, total = model.reading.bytes, model.reading.total_bytes
                self._news.append(Waking(model=index, bytes=min(done, total), total_bytes=total))
                model.tell_at = now + _TELL_SECONDS
        news, self._news = self._news, []
        return news

    @property
    def busy(self) -> bool:
        """False: the descriptor tells."""
        return False

    def close(self) -> None:
        """Ends all threads."""
        for model in self._models.values():
            if model.reading is not None:
                model.reading.stop()
        for thread in self._threads.values():
            thread.join()

    def _look_at_experts(self) -> None:
        """Gives up a model of which an expert could not be read. Steps that need its experts are
        refused; it is packed anew when it is woken."""
        if self._pool is None or (failure := self._pool.failure()) is None:
            return
        index, error = failure
        model = self._models[index]
        for one in model.order.parts if model.order else ():
            if one.part.native == es.FFN_WEIGHTS:
                one.kept.discard(one.key, error)
        text = f"its packed weights cannot be read: {error.strerror}"
        if model.state is _State.RESIDENT:
            model.state, model.error = _State.ENDING, text
            self._loop.push_close(index, refuse=True)
        elif model.reading is not None:
            model.error = text
            model.reading.stop()

    def _end(self, index: int, error: str | None) -> None:
        """A thread is done."""
        model = self._models[index]
        error = error if model.error is None else model.error
        if model.state is _State.WAKING and error is None:
            model.state, model.reading = _State.RESIDENT, None
            self._news.append(Woken(model=index))
        elif model.state is _State.WAKING:
            model.state, model.reading, model.error = _State.ENDING, None, error
            self._loop.push_close(index, refuse=True)
        else:
            model.state = _State.ASLEEP
            slept = Slept(model=index)
            self._news.append(
                slept if model.error is None else Woken(model=index, error=model.error)
            )

    def _read(self, index: int) -> str | None:
        reading = self._models[index].reading
        assert reading is not None
        try:
            reading.run(self._descriptor)
        except ConfigError as error:
            return str(error)
        except OSError as error:
            return f"there is no memory for its weights: {error}"
        return None

    def _drop(self, index: int) -> None:
        if self._pool is not None:
            self._pool.remove(index)
        for part in self._models[index].parts:
            part.weights.arena.drop()
        self._given_up(index)

    def _start(self, index: int, work: Callable[[int], str | None]) -> None:
        def run() -> None:
            signal.pthread_sigmask(signal.SIG_SETMASK, signal.valid_signals())
            error: str | None = "an error of the server"
            try:
                error = work(index)
            except Exception:
                log.exception("model %d cannot be woken", index)
            finally:
                self._ended.put((index, error))
                os.eventfd_write(self._descriptor, 1)

        thread = threading.Thread(target=run, name=f"residency {index}")
        self._threads[index] = thread
        thread.start()

    def _tell(self, news: Waking | Woken | Slept) -> None:
        self._news.append(news)
        os.eventfd_write(self._descriptor, 1)

    def _expect(self, index: int, state: _State) -> None:
        found = self._models[index].state
        if found is not state:
            raise RuntimeError(f"model {index} is {found.name}, it must be {state.name}")
