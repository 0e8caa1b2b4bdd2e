"""``crosspool wake``: has a model of a running server read its weights."""

from __future__ import annotations

from collections.abc import Sequence

from tqdm import tqdm

from crosspool.cli import managing

_DESCRIPTION = """\
Has a model read its weights, as its next request would, and waits until they are in the pools.
Where room lacks, others that have no requests fall asleep for it."""


def run(words: Sequence[str], prog: str) -> int:
    arguments = managing.parser(prog, _DESCRIPTION, "crosspool wake qwen").parse_args(words)
    name = arguments.name
    told = {}
    with tqdm(desc=name, total=0, unit="B", unit_scale=True, leave=False, disable=None) as bar:
        for told in managing.events(arguments.port, name, "wake"):
            bar.total = told["total_bytes"]
            bar.update(told["read_bytes"] - bar.n)
    seconds = told["last_wake_seconds"]
    after = "" if seconds is None else f"; its last wake took {seconds:.2f} s"
    print(f"{name} is resident{after}")
    return 0
