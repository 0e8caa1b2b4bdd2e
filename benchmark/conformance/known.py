"""Failures of other projects' tests that are no fault of CrossPool, each with its reason."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Reason = Literal["tiny model", "out of scope", "by design", "as SGLang"]
"""Why a test fails: what a model of two million weights says, or cannot say; a feature that
CrossPool does not have; a rule of its own; an answer that SGLang gives, too, and another project's
tests do not expect."""


@dataclass(frozen=True)
class Known:
    """A reason for the failure of some tests."""

    tests: str
    """A regular expression that is found in the test's name."""
    message: str
    """A regular expression that is found in the failure's message: another failure of the same
    test is not excused."""
    reason: Reason
    why: str
    """A sentence."""
    run: bool = True
    """Whether such a test is run at all; False for one that would only wait."""

    def names(self, test: str) -> bool:
        return re.search(self.tests, test) is not None

    def excuses(self, test: str, message: str) -> bool:
        return self.names(test) and re.search(self.message, message) is not None


def reason_for(known: Iterable[Known], test: str, message: str) -> Known | None:
    """Return the first reason that excuses a failure; None for one that is CrossPool's fault."""
    return next((one for one in known if one.excuses(test, message)), None)
