"""``crosspool serve`` and ``python -m crosspool.launch_server``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import msgspec

from crosspool.cli.launcher import launch
from crosspool.config import deployment_file, flags
from crosspool.config.draft import Draft

_CONFIG_FLAG = "--config"


def run(words: Sequence[str], prog: str) -> int:
    return launch(read_draft(words, prog))


def read_draft(words: Sequence[str], prog: str) -> Draft:
    """From ``--config FILE``, beside which only the address may be given, or else from flags."""
    if not any(word.partition("=")[0] == _CONFIG_FLAG for word in words):
        return flags.parse(words, prog)
    parser = flags.Parser(prog=prog, allow_abbrev=False)
    parser.add_argument(_CONFIG_FLAG, type=Path, required=True, metavar="FILE")
    parser.add_argument("--host", help="instead of the file's", default=argparse.SUPPRESS)
    parser.add_argument("--port", help="instead of the file's", type=int, default=argparse.SUPPRESS)
    given = vars(parser.parse_args(words))
    return msgspec.structs.replace(deployment_file.read(given.pop("config")), **given)
