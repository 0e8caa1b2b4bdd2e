"""``crosspool keys``: the keys of a deployment over several hosts."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from crosspool.config.flags import Parser
from crosspool.transport.deployment_keys import DeploymentKeys, write_keys

_EPILOG = """\
examples:
  crosspool keys new --out deployment.keys
  scp -p deployment.keys host1:              # each host needs the same file, of mode 0600
  crosspool serve --nnodes 2 --node-rank 0 --dist-init-addr host0:20000 --keys deployment.keys ...
"""


def run(words: Sequence[str], prog: str) -> int:
    parser = Parser(
        prog=prog,
        description="Makes the keys by which the hosts of a deployment know each other.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("action", choices=["new"], help="make a file with new keys")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("crosspool.keys"),
        metavar="FILE",
        help="the file, which must not exist yet (default: crosspool.keys)",
    )
    arguments = parser.parse_args(words)
    keys = DeploymentKeys.new()
    write_keys(arguments.out, keys)
    print(f"{arguments.out} has the keys of deployment {keys.deployment}; only you may read it")
    return 0
