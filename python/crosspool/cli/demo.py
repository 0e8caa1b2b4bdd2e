"""``crosspool demo``: the three small models that come with the package."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from crosspool.cli.launcher import launch
from crosspool.config import flags

MODELS = Path(__file__).parents[1] / "demo"
_KV_POOL_BYTES = "256MiB"


def run(words: Sequence[str], prog: str) -> int:
    """Takes the flags of ``crosspool serve`` but for those that name the models."""
    paths = sorted(path.parent for path in MODELS.glob("*/config.json"))
    models = [word for path in paths for word in ("--model-path", str(path))]
    given = [*models, "--kv-pool-bytes", _KV_POOL_BYTES, *words]
    return launch(flags.parse(given, prog, usage="%(prog)s [flags]"))
