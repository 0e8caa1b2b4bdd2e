"""The command ``crosspool``."""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
from collections.abc import Sequence

import crosspool
from crosspool.config.deployment import ConfigError
from crosspool.transport.admin import AdminError

COMMANDS = {
    "serve": "Serve the models that flags or a deployment file name.",
    "router": "Run a router in front of several servers.",
    "keys": "Make the keys by which the hosts of a deployment know each other.",
    "demo": "Serve the three small models that come with CrossPool.",
    "compile": "Compile the kernels that GPUs will launch, ahead and without a GPU.",
    "plan": "Plan pools, KV budget and placement for models, devices and traffic.",
    "simulate": "Serve a load in simulated time, with the times of a cost table.",
    "ps": "Show the models of a running server: which are awake, and who uses them.",
    "top": "Watch a running server: pools, models, requests, latencies; wake and sleep models.",
    "load": "Have a running server serve a further model.",
    "unload": "Have a running server serve a model no more.",
    "wake": "Have a model of a running server read its weights.",
    "sleep": "Have a model of a running server give up the memory of its weights.",
    "pin": "Say when a model of a running server has its weights in memory.",
    "pools": "Show what the pools of a running server hold.",
    "trace": "Record what the lanes of a running server do.",
    "bench": "Send load for many models to any OpenAI-compatible server, and time its answers.",
}
_EPILOG = """\
examples:
  crosspool demo
  crosspool serve --model-path models/Qwen3-30B-A3B --model-path models/GLM-4.7-Flash
  crosspool serve --config deployment.yaml
  crosspool plan Qwen3-30B-A3B GLM-4.7-Flash --devices 5x40GB --rate 1 --prompt 800 --output 200
  crosspool simulate deployment.yaml --costs costs.json --rate 2 --popularity zipf:1.0
  crosspool compile --capability 90 --model-path models/Qwen3-30B-A3B
  crosspool ps --watch
  crosspool top
  crosspool load models/qwen --name qwen
  crosspool pools --tensors
  crosspool trace --seconds 2 --out trace.json
  crosspool bench http://127.0.0.1:30000 --rate 2 --popularity zipf:1.0
  crosspool router --node http://10.0.0.1:30000 --node http://10.0.0.2:30000
  crosspool keys new --out deployment.keys

`crosspool COMMAND --help` lists the flags of a command. The exit status is 0 after an orderly end,
2 for a mistake in the input (the message names it) and 1 when something failed.
"""


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="crosspool",
        description="Serves many cold Mixture-of-Experts models from one KV pool and one weight "
        "pool.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"crosspool {crosspool.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for name, text in COMMANDS.items():
        commands.add_parser(name, help=text)
    command = parser.parse_args(words[:1] or ["--help"]).command
    return run(command, words[1:])


def run(command: str, words: Sequence[str], prog: str | None = None) -> int:
    """Runs one command and returns its exit status; errors are printed on stderr.

    When nobody reads its output any more (``| head``), it ends silently, with the status that a
    shell has for SIGPIPE."""
    prog = prog or f"crosspool {command}"
    module = importlib.import_module(f"crosspool.cli.{command}")
    try:
        try:
            return int(module.run(words, prog))
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # The interpreter flushes the buffer once more at its end, and would print that this fails.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except ConfigError as error:
        print(f"{prog}: error: {error}", file=sys.stderr)
        return 2
    except AdminError as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
