"""How many KV pages a request is promised at a time: the rules behind ``--promise``.

To add a rule, write its class here, enter it in :data:`PROMISE_RULES`, and add its name to the
option ``promise``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

from crosspool.config.deployment import Deployment
from crosspool.kvpool.allocator import Guard
from crosspool.kvpool.bounds import Bounds
from crosspool.kvpool.growth import Claim, safe, touched
from crosspool.kvpool.layout import KVLayout
from crosspool.scheduler.sequence import Sequence


class PromiseRule(ABC):
    """The rule of one attention rank; it may keep account of what it has promised there."""

    grows = False
    """Whether running requests may need more pages than they have been promised."""

    def __init__(
        self, deployment: Deployment, bounds: Bounds, layouts: Mapping[int, KVLayout]
    ) -> None:
        """``bounds`` and ``layouts`` are those of the models that there are at any time."""
        self._deployment = deployment
        self._bounds = bounds
        self._layouts = layouts

    @abstractmethod
    def counts(self, seq: Sequence, held: int, tokens: int) -> list[int]:
        """Numbers of further pages to promise ``seq``, which holds ``held`` pages and has
        ``tokens`` tokens. The first number that fits is promised; if none does, ``seq`` waits."""

    def guard(self, seq: Sequence, pages: list[int]) -> Guard | None:
        """A check of the pages that ``seq``, which holds ``pages``, would be promised in addition;
        None where every promise within the bounds is allowed."""
        return None

    def is_safe(self) -> bool:
        """Whether every running request can still end within the bounds."""
        return True

    def promised(self, seq: Sequence) -> None:  # noqa: B027 - most rules keep no account
        """``seq.pages`` has just grown."""

    def ended(self, seq: Sequence) -> None:  # noqa: B027
        """``seq`` gives its pages back."""


class WorstCase(PromiseRule):
    """Promises at admission all the pages that the request can come to need."""

    def counts(self, seq: Sequence, held: int, tokens: int) -> list[int]:
        return [self._layouts[seq.model].pages_for(seq.limit) - held]


class Growth(PromiseRule):
    """Promises pages for ``growth_tokens`` more tokens whenever a request has filled its own, if
    every running request can still end after that (:mod:`crosspool.kvpool.growth`)."""

    grows = True

    def __init__(
        self, deployment: Deployment, bounds: Bounds, layouts: Mapping[int, KVLayout]
    ) -> None:
        super().__init__(deployment, bounds, layouts)
        self._claims: dict[int, Claim] = {}
        """The claim of every request that holds pages, by the request's number."""

    def counts(self, seq: Sequence, held: int, tokens: int) -> list[int]:
        layout = self._layouts[seq.model]
        most = layout.pages_for(seq.limit) - held
        grown = min(seq.limit, tokens + self._deployment.growth_tokens)
        some = layout.pages_for(grown) - held
        return [some, most] if some < most else [most]

    def guard(self, seq: Sequence, pages: list[int]) -> Guard | None:
        others = [claim for number, claim in self._claims.items() if number != seq.number]

        def is_safe(more: list[int]) -> bool:
            return safe(self._bounds, self._layouts, [*others, self._claim(seq, pages + more)])

        return is_safe

    def is_safe(self) -> bool:
        claims = list(self._claims.values())
        return not claims or safe(self._bounds, self._layouts, claims)

    def promised(self, seq: Sequence) -> None:
        self._claims[seq.number] = self._claim(seq, seq.pages)

    def ended(self, seq: Sequence) -> None:
        self._claims.pop(seq.number, None)

    def _claim(self, seq: Sequence, pages: list[int]) -> Claim:
        layout = self._layouts[seq.model]
        need = layout.pages_for(seq.limit) - len(pages)
        return Claim(seq.model, touched(layout, pages), need)


PROMISE_RULES: dict[str, type[PromiseRule]] = {"worst_case": WorstCase, "growth": Growth}
"""The rules by the name that the option ``promise`` gives them."""
