"""``crosspool plan``: the devices, page budget and placement that a set of models needs.

The planner's libraries are an extra of the package: nothing is imported before they are found."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

from crosspool.config.errors import ConfigError

_LIBRARIES = ("scipy", "matplotlib")


def run(words: Sequence[str], prog: str) -> int:
    """Makes the plan that ``words`` ask for and returns the exit status. Raises ConfigError for a
    mistake in the words, and when the extra ``planner`` is not installed."""
    missing = [name for name in _LIBRARIES if find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"{' and '.join(missing)} must be installed: pip install 'crosspool[planner]'"
        )
    from crosspool.cli.plan.command import run_plan

    return run_plan(words, prog)
