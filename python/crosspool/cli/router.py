"""``crosspool router``: smg, SGLang's model gateway, in front of several CrossPool servers."""

from __future__ import annotations

import argparse
import asyncio
import signal
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import msgspec
import yaml

from crosspool.cli.smg_process import SmgTask
from crosspool.config.errors import ConfigError
from crosspool.config.flags import Parser
from crosspool.config.ports import free_port
from crosspool.config.process import die_with_parent, set_title
from crosspool.config.urls import base_url, url_of
from crosspool.transport.router import Node, NodeClient, RouterClient, RouterError

_PORT = 30080
_SMG_FLAGS = {
    "--policy": "cache_aware",
    "--retry-max-retries": "5",
    "--retry-initial-backoff-ms": "50",
    "--retry-max-backoff-ms": "1000",
    "--cb-failure-threshold": "3",
    "--cb-success-threshold": "1",
    "--cb-timeout-duration-secs": "5",
    "--health-check-endpoint": "/ready",
    "--health-check-interval-secs": "2",
    "--health-check-timeout-secs": "5",
    "--health-failure-threshold": "3",
    "--health-success-threshold": "1",
    "--worker-wedge-secs": "600",
    "--shutdown-grace-period-secs": "60",
    "--prometheus-host": "127.0.0.1",
    "--log-level": "warn",
}
"""smg's flags that fit, beside those that are fixed. A worker may be silent for as long as requests
wait for their model to be woken. /health of a model would generate a token every time. The breaker
opens within the retries of one request: until then, a cache-aware policy may send each of them to
the same worker."""
_FIXED = ("--enable-igw", "--disable-tokenizer-autoload")
"""Without the first, smg does not look at the model of a request; it tokenizes for workers that are
asked over gRPC, and would look for the tokenizer of every model in the network."""
_DESCRIPTION = """\
Runs smg, SGLang's model gateway, in front of several CrossPool servers, its nodes. A request goes
to a node that serves the model which it names. Servers that are started with --router-url register
their models themselves; of those that are not, --node names each."""
_EPILOG = """\
Any flag of smg may be given, too (`python -m smg.launch_router --help` lists them). Unless they are
given, these are:
  {flags}

examples:
  crosspool router --node http://10.0.0.1:30000 --node http://10.0.0.2:30000 --host 0.0.0.0
  crosspool router --keys keys.yaml --policy round_robin
  crosspool serve --models-dir models --router-url http://127.0.0.1:30080
"""
_MISSING = (
    "smg, SGLang's model gateway, is not installed; pip install 'crosspool[router]' installs it"
)
_LOOK_SECONDS = 2.0
"""Time between two looks at what nodes serve."""
_READY_LOOK_SECONDS = 0.2


class RouterKeys(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The keys of a router, from a file."""

    api_key: str | None = None
    """Clients must send it. The router passes it on, so nodes must ask for the same."""
    admin_api_key: str | None = None
    """Who changes the router's workers must send it; without one, ``api_key``."""

    @property
    def of_workers(self) -> str | None:
        """What the router asks for when its workers are changed."""
        return self.admin_api_key or self.api_key


def run(words: Sequence[str], prog: str) -> int:
    arguments, rest = _parser(prog).parse_known_args(words)
    nodes = list(dict.fromkeys(base_url("--node", url) for url in arguments.node))
    keys = RouterKeys() if arguments.keys is None else read_keys(arguments.keys)
    if find_spec("smg") is None:
        raise ConfigError(_MISSING)
    port = free_port(arguments.host, arguments.port)
    task = SmgTask(
        arguments=smg_arguments(arguments.host, port, rest),
        api_key=keys.api_key,
        admin_api_key=keys.admin_api_key,
    )
    set_title("router")
    client_host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(arguments.host, arguments.host)
    router = RouterClient(url_of(client_host, port), keys.of_workers)
    followed = [Node(url=url, api_key=keys.api_key) for url in nodes]
    return asyncio.run(_serve(task, router, followed))


def _parser(prog: str) -> argparse.ArgumentParser:
    flags = "\n  ".join(f"{flag} {value}" for flag, value in _SMG_FLAGS.items())
    parser = Parser(
        prog=prog,
        usage="%(prog)s [--node URL ...] [flags] [flags of smg]",
        description=_DESCRIPTION,
        epilog=_EPILOG.format(flags=flags),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--node",
        action="append",
        default=[],
        metavar="URL",
        help="CrossPool server whose models the router serves, as http://HOST:PORT; once for each",
    )
    parser.add_argument(
        "--host", default="127.0.0.1", help="address on which it listens (default: 127.0.0.1)"
    )
    parser.add_argument(
        "--port",
        type=int,
        default=_PORT,
        help=f"port on which it listens; 0 takes any free one (default: {_PORT})",
    )
    parser.add_argument(
        "--keys",
        type=Path,
        metavar="FILE",
        help="YAML file that nobody else may read, with api_key (clients must send it, and the "
        "nodes must ask for the same) and admin_api_key (who changes the router's workers must "
        "send it; without one, api_key)",
    )
    return parser


def smg_arguments(host: str, port: int, given: Sequence[str]) -> list[str]:
    """Returns smg's command line: what is fixed, what fits, and then what was ``given``, which
    counts where a flag comes twice.

    Raises ConfigError for a key, which others could read in the command line."""
    for word in given:
        flag = word.partition("=")[0]
        if flag in ("--api-key", "--control-plane-api-keys"):
            raise ConfigError(f"{flag}: keys go into the file that --keys names")
    fitting = [word for pair in _SMG_FLAGS.items() for word in pair]
    return ["--host", host, "--port", str(port), *_FIXED, *fitting, *given]


def read_keys(path: Path) -> RouterKeys:
    """Raises ConfigError, which has no key, for a file that is wrong or that others may read."""
    try:
        with path.open() as stream:
            mode = path.stat().st_mode & 0o777
            data = yaml.safe_load(stream)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError):  # its text quotes the file
        raise ConfigError(f"{path} is no YAML") from None
    if mode & 0o077:
        raise ConfigError(f"{path} has keys, and its mode is {mode:o}: chmod 600 {path}")
    try:
        keys = msgspec.convert(data, RouterKeys)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{path}: {error}") from None
    for field in msgspec.structs.fields(keys):
        key = getattr(keys, field.name)
        if key is not None and not (key and key.isascii() and key.isprintable()):
            raise ConfigError(f"{path}: {field.name} must have printable ASCII characters alone")
    return keys


async def _serve(task: SmgTask, router: RouterClient, nodes: Sequence[Node]) -> int:
    """Runs smg until a signal comes or it ends; returns the exit status. A second signal ends the
    requests in flight as well."""
    smg = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "crosspool.cli.smg_process"),
        stdin=subprocess.PIPE,
        preexec_fn=die_with_parent,
    )
    signals = 0

    def stop() -> None:
        nonlocal signals
        signals += 1
        if smg.returncode is None:
            smg.send_signal(signal.SIGTERM if signals == 1 else signal.SIGKILL)

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop)
    waits = asyncio.create_task(_hand_over(smg, task))
    works = asyncio.create_task(_follow_all(nodes, router))
    try:
        await asyncio.wait([waits, works], return_when=asyncio.FIRST_COMPLETED)
        if works.done():
            works.result()  # raises: it does not end by itself
        status = waits.result()
    finally:
        works.cancel()
        if smg.returncode is None:
            smg.kill()
        await router.close()
    if signals:
        return 0
    _say("smg has ended" if status == 0 else f"smg has ended with status {status}")
    return status if status > 0 else 1


async def _hand_over(smg: asyncio.subprocess.Process, task: SmgTask) -> int:
    """Tells smg its task, and returns the status with which it ends."""
    await smg.communicate(msgspec.json.encode(task))
    return await smg.wait()


async def _follow_all(nodes: Sequence[Node], router: RouterClient) -> None:
    """Has the router serve what the nodes do, once it answers. Never returns by itself."""
    while not await router.is_there():
        await asyncio.sleep(_READY_LOOK_SECONDS)
    _say(f"the router is ready on {router.url}")
    await asyncio.gather(asyncio.Event().wait(), *(_follow(node, router) for node in nodes))


async def _follow(node: Node, router: RouterClient) -> None:
    """Has the router serve what the node does. While the node does not answer, its workers stay:
    the router finds out for itself, and again when they are back."""
    client, told = NodeClient(node), ""
    try:
        while True:
            try:
                settled = await router.settle(node, await client.models())
                problem = "; ".join(settled.problems)
                for model in settled.added:
                    _say(f"{node.url}: model {model} comes to the router")
                for url in settled.removed:
                    _say(f"{url} goes from the router")
            except RouterError as error:
                problem = str(error)
            if problem and problem != told:
                _say(problem)
            told = problem
            await asyncio.sleep(_LOOK_SECONDS)
    finally:
        await client.close()


def _say(text: str) -> None:
    print(f"crosspool: {text}", flush=True)
