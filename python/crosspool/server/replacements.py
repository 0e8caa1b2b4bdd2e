"""Models that take the place of others of the same name, whose weights are changed by that.

The new model comes beside the old one and is woken, so that whatever is wrong with its weights is
found while the old one serves. Then the two change places at once: the deployment's file, in which
later processes read who is served, never has both. The old one leaves when its requests have ended.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from crosspool.config.options import Keep
from crosspool.server.problem import Loaded, Problem
from crosspool.transport.admin import FORMER_SECONDS, WEIGHTS_SECONDS

if TYPE_CHECKING:
    from crosspool.scheduler.core import SchedulerCore

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Arriving:
    """A model that is not served yet."""

    old: int
    done: Loaded
    deadline: float


@dataclass
class _Former:
    """A model that is served no more, but for the requests that it has."""

    new: int
    keep: Keep
    leaves_at: float


class Replacements:
    """``save`` writes the models that there are without the hidden ones; ``retire`` has a hidden
    one leave, and calls what it is given when nothing is left of it."""

    def __init__(
        self,
        core: SchedulerCore,
        save: Callable[[], Problem | None],
        retire: Callable[[int, Callable[[Problem | None], None]], None],
    ) -> None:
        self._core = core
        self._save = save
        self._retire = retire
        self._arriving: dict[int, _Arriving] = {}
        self._former: dict[int, _Former] = {}
        self._failed: set[int] = set()
        """Models that have not been able to take another one's place, and leave."""

    @property
    def hidden(self) -> set[int]:
        """Models that are there, while another one is served under their name."""
        return self._arriving.keys() | self._former.keys() | self._failed

    @property
    def replaced(self) -> set[int]:
        """Models that are to be replaced."""
        return {it.old for it in self._arriving.values()}

    def arrive(self, new: int, old: int, done: Loaded, error: str | None) -> None:
        """All processes are ready for the model ``new``, or one is not after all."""
        self._arriving[new] = _Arriving(old, done, time.monotonic() + WEIGHTS_SECONDS)
        if error is not None:
            return self._give_up(new, Problem(error, is_mistake=True))
        try:
            self._core.begin_replacing(old, new)
        except ValueError as mistake:
            self._give_up(new, Problem(str(mistake), is_mistake=True))
        return None

    def go_on(self) -> None:
        """Changes places with models whose weights have been read, and gives those up whose cannot
        be."""
        now = time.monotonic()
        for new, it in list(self._arriving.items()):
            try:
                if self._core.is_resident(new):
                    self._change_places(new, it)
                elif now >= it.deadline:
                    text = f"its weights were not read within {WEIGHTS_SECONDS:g} s"
                    self._give_up(new, Problem(text, is_mistake=False))
            except ValueError as error:
                self._give_up(new, Problem(str(error), is_mistake=True))
        for old, former in list(self._former.items()):
            if former.leaves_at <= now:
                self.let_go(old, lambda problem: None)

    def let_go(self, old: int, done: Callable[[Problem | None], None]) -> None:
        """Has a model leave in whose place another one is served; what requests it still has end
        with 503."""
        if old not in self._former:
            return done(None)
        self._former[old].leaves_at = float("inf")
        return self._retire(old, done)

    def gone(self, number: int, error: str | None) -> None:
        """A model is gone, whichever it was."""
        self._failed.discard(number)
        if (it := self._arriving.pop(number, None)) is not None:
            self._core.end_replacing(it.old)
            it.done(Problem(error or "the model was unloaded", is_mistake=True))
        if (former := self._former.pop(number, None)) is not None and former.keep != "demand":
            # Two models that are pinned might not fit together.
            with contextlib.suppress(ValueError):
                self._core.pin(former.new, former.keep)

    def fail(self, cause: str) -> None:
        """Nothing can be changed any more."""
        arriving, self._arriving = self._arriving, {}
        for it in arriving.values():
            it.done(Problem(cause, is_mistake=False))

    def _change_places(self, new: int, it: _Arriving) -> None:
        models = self._core.deployment.models
        del self._arriving[new]
        if it.old in models:
            leaves_at = time.monotonic() + FORMER_SECONDS
            self._former[it.old] = _Former(new, models[it.old].keep, leaves_at)
        if (problem := self._save()) is not None:
            self._former.pop(it.old, None)
            self._arriving[new] = it
            return self._give_up(new, problem)
        log.info("model %s has other weights now, as number %d", models[new].name, new)
        return it.done(new)

    def _give_up(self, new: int, problem: Problem) -> None:
        it = self._arriving.pop(new)
        self._failed.add(new)
        self._core.end_replacing(it.old)
        log.warning("model %d keeps its weights: %s", it.old, problem.text)
        self._retire(new, lambda _: it.done(problem))
