"""``crosspool serve`` and ``python -m crosspool.launch_server``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec

from crosspool.cli.host_launcher import launch_on_host
from crosspool.cli.launcher import launch
from crosspool.config import deployment_file, flags
from crosspool.config.errors import ConfigError
from crosspool.config.hosts import check_hosts
from crosspool.config.options import SERVER_OPTIONS, Options

_CONFIG_FLAG = "--config"
_BESIDE = ("host", "port", "node_rank")
"""Options that may be given as flags beside a file, which may be the same on every host."""


def run(words: Sequence[str], prog: str) -> int:
    options = read_options(words, prog)
    check_hosts(options)
    return launch_on_host(options) if options.node_rank else launch(options)


def read_options(words: Sequence[str], prog: str) -> Options:
    """Returns what the user asks for, in the file of ``--config`` or by flags. With a file, only
    the address and the number of the host may be given as flags."""
    if not any(word.partition("=")[0] == _CONFIG_FLAG for word in words):
        return flags.parse(words, prog)
    parser = flags.Parser(prog=prog, allow_abbrev=False)
    parser.add_argument(_CONFIG_FLAG, type=Path, required=True, metavar="FILE")
    for name in _BESIDE:
        flags.add_flag(parser, SERVER_OPTIONS[name])
    arguments, unknown = parser.parse_known_args(words)
    if unknown:  # its value is not told, since it may be a key
        raise ConfigError(
            f"{unknown[0].partition('=')[0]}: beside {_CONFIG_FLAG} there may be --host, --port "
            "and --node-rank alone; write everything else into the file"
        )
    given = vars(arguments)
    options = deployment_file.read(given.pop("config"))
    return msgspec.structs.replace(options, **given)
