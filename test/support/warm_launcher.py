"""A launcher without its imports (:mod:`support.warm`)."""

from __future__ import annotations

import os
from collections.abc import Collection

from crosspool.config.process import die_with_parent


def launch(words: Collection[str]) -> int:
    """Is ``python -m crosspool.launch_server``."""
    from crosspool.cli.main import run

    os.setsid()
    die_with_parent()
    return run("serve", list(words), "crosspool.launch_server")
