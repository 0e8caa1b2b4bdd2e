"""Marks that several tests use."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def slow_but(fast: Iterable[Any], cases: Iterable[Any]) -> list[Any]:
    """Return ``cases`` as parameters of which all but the ``fast`` ones are marked ``slow``."""
    kept = list(fast)
    return [case if case in kept else pytest.param(case, marks=pytest.mark.slow) for case in cases]
