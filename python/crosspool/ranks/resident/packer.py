"""Packs the weights of one model for a device, in a process that yields to all others.

    python -m crosspool.ranks.resident.packer --deployment FILE --device cpu:0 --model 3 \\
        --config JSON --keys KEY ...

Exit status 2 when there are none to be packed; the last line of stderr says why.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import msgspec

from crosspool.config.deployment import ConfigError, Deployment, ModelConfig, load
from crosspool.config.device import Device
from crosspool.config.process import USER_MISTAKE, die_with_parent, set_title
from crosspool.kernels.engine import Team
from crosspool.ranks.further import further_model
from crosspool.ranks.resident.weights import ResidentWeights, keeper_of
from crosspool.ranks.weights import HeldModel
from crosspool.weightpool.packed_cache import Unusable

_LOW_PRIORITY = 10
"""A request waits for it, so it has a tenth of what others have on a busy core, and not less."""
_LOOK_SECONDS = 0.1


def packer_command(
    deployment: Deployment, device: Device, model: int, config: ModelConfig, keys: Sequence[str]
) -> list[str]:
    """Returns the command that packs a model's parts for a device; the deployment's file may not
    have the model yet. ``keys``: what tells them from others; a checkpoint that has changed is
    refused."""
    module = [sys.executable, "-m", "crosspool.ranks.resident.packer"]
    where = ["--deployment", str(deployment.file), "--device", device.name]
    given = msgspec.json.encode(config).decode()
    return [*module, *where, "--model", str(model), "--config", given, "--keys", *keys]


def main(argv: Sequence[str] | None = None) -> int:
    die_with_parent()
    parser = argparse.ArgumentParser(prog="crosspool.ranks.resident.packer")
    parser.add_argument("--deployment", type=Path, required=True, help="deployment.json")
    parser.add_argument("--device", required=True, help="name of the device")
    parser.add_argument("--model", type=int, required=True, help="number of the model")
    parser.add_argument("--config", required=True, help="its options, as JSON")
    parser.add_argument("--keys", nargs="+", required=True, help="keys of its parts")
    args = parser.parse_args(argv)
    set_title(f"packer of model {args.model}")
    os.setpriority(os.PRIO_PROCESS, 0, _LOW_PRIORITY)
    try:
        config = msgspec.json.decode(args.config, type=ModelConfig)
        deployment = load(args.deployment)
        _, held = further_model(deployment, Device(args.device), args.model, config)
        assert held is not None, "only a device that holds a part asks for it"
        _pack(deployment, held, args.keys)
    except (ConfigError, Unusable) as error:
        print(error, file=sys.stderr)
        return USER_MISTAKE
    except OSError as error:
        print(f"its packed weights cannot be written: {error}", file=sys.stderr)
        return USER_MISTAKE
    return 0


def _pack(deployment: Deployment, held: HeldModel, keys: Sequence[str]) -> None:
    """Packs the parts that the cache does not have. Raises ConfigError, Unusable, OSError."""
    keeper = keeper_of(deployment)
    assert keeper is not None, "only a device whose packed weights are kept asks for more"
    weights = ResidentWeights({}, {}, {})
    weights.declare(replace(held, experts_on_demand=False), 1, keeper)
    kept = weights.sleeping[held.index]
    if [one.key for one in kept] != list(keys):
        raise ConfigError(f"{held.path} has changed since the server began")
    # One thread, which may run wherever nobody else does.
    with Team([-1]) as team:
        for part, one in zip(weights.parts(held.index), kept, strict=True):
            while not one.kept.touch(one.key):
                if one.kept.is_being_written(one.key):
                    time.sleep(_LOOK_SECONDS)
                    continue
                part.load(team, _ignore, one.kept)
                keeper.write_now()
                part.weights.arena.drop()


def _ignore(_done: int) -> None:
    """Nobody watches the progress."""


if __name__ == "__main__":
    sys.exit(main())
