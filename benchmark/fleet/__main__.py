"""Measures more models than fit into the weight pool.

    python -m benchmark.fleet first-token [--layers 16] [--rounds 5]
    python -m benchmark.fleet beside [--layers 4] [--rate 0.5] [--seconds 20] [--rounds 5] [--loads]
                                     [--own-tokenizer]
    python -m benchmark.fleet cycles [--cycles 1000] [--registered 100]
    python -m benchmark.fleet registered [--layers 4] [--registered 100] [--rounds 10]
    python -m benchmark.fleet prefixes [--layers 4] [--rounds 5]
    python -m benchmark.fleet turns [--layers 4] [--seconds 30] [--quantum 2]
    python -m benchmark.fleet popularity [--models 8] [--room 3] [--layers 4] [--rate 1]
                                         [--seconds 900] [--llama]
    python -m benchmark.fleet planned [--models 8] [--room 3] [--layers 4] [--rate 1]
                                      [--seconds 600]

``first-token`` takes the time from a request to its first token while its model is resident and
while it is asleep, and the bytes/s of the wake. ``beside`` compares the time between tokens of two
models while a third wakes and sleeps all the time with that without; with ``--loads``, the third
is loaded before and unloaded after each time. The three have one tokenizer, unless the third has
its own with ``--own-tokenizer``. ``cycles`` loads, wakes and unloads a tiny model
many times beside two that answer, and tells what is left of it, and what models take that are
registered and never woken. ``registered`` compares a server of one model with one that has
``--registered`` tiny models more: their start, their memory, and what a token of the one takes.
``prefixes`` asks for a cached prefix of a model that has slept, of one that has not, and of one
whose cache was lost. ``turns`` has two models asked all the time that do not fit together.
``popularity`` has requests for many models, of which some are more popular (Zipf), and with
``--llama`` the same ones for ``llama_cpp.server``. ``planned`` compares such a load with what the
planner says of it beforehand.

The models are those of ``benchmark.checkpoint``, cut to ``--layers``. The device has all cores but
one, which is left to the front end. With ``--quick`` the models are tiny, the runs are short, and
nothing is recorded.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console

from benchmark.fleet import (
    beside,
    cycles,
    first_token,
    planned,
    popularity,
    prefixes,
    registered,
    taking_turns,
)
from benchmark.fleet.served import cores
from benchmark.records import Recorder


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmark.fleet",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    programs = parser.add_subparsers(dest="program", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--layers", type=int, default=4)
    common.add_argument("--quick", action="store_true", help="tiny models; records nothing")
    common.add_argument("--results", type=Path, help="folder of the records")
    given = programs.add_parser("first-token", parents=[common])
    given.add_argument("--rounds", type=int, default=5)
    given = programs.add_parser("beside", parents=[common])
    given.add_argument("--rate", type=float, default=0.5, help="requests/s of each model")
    given.add_argument("--seconds", type=float, default=20.0, help="length of a turn")
    given.add_argument("--rounds", type=int, default=5)
    given.add_argument("--loads", action="store_true", help="load and unload the third, too")
    given.add_argument("--own-tokenizer", action="store_true", help="of the third model")
    given = programs.add_parser("cycles", parents=[common])
    given.add_argument("--cycles", type=int, default=1000)
    given.add_argument("--registered", type=int, default=100, help="models loaded at the end")
    given = programs.add_parser("registered", parents=[common])
    given.add_argument("--registered", type=int, default=100, help="models that only sleep")
    given.add_argument("--rounds", type=int, default=10, help="turns of each server")
    given = programs.add_parser("prefixes", parents=[common])
    given.add_argument("--rounds", type=int, default=5)
    given = programs.add_parser("turns", parents=[common])
    given.add_argument("--seconds", type=float, default=30.0, help="length of each part")
    given.add_argument("--quantum", type=float, default=2.0, help="residency_quantum, in seconds")
    popular = argparse.ArgumentParser(add_help=False)
    popular.add_argument("--models", type=int, default=8)
    popular.add_argument("--room", type=int, default=3, help="models that fit together")
    popular.add_argument("--rate", type=float, default=1.0, help="requests/s of all models")
    popular.add_argument("--exponent", type=float, default=1.0, help="of Zipf's law")
    given = programs.add_parser("popularity", parents=[common, popular])
    given.add_argument("--seconds", type=float, default=900.0)
    given.add_argument("--llama", action="store_true", help="beside llama_cpp.server")
    given = programs.add_parser("planned", parents=[common, popular])
    given.add_argument("--seconds", type=float, default=600.0, help="length of the run")
    given.add_argument("--runs", type=int, default=200, help="simulated runs")
    options = parser.parse_args()
    text, recorder = _measure(options)
    Console(soft_wrap=True, highlight=False).print(text, markup=False)
    if not options.quick:
        recorder.write(options.results) if options.results else recorder.write()
    return 0


def _measure(given: argparse.Namespace) -> tuple[str, Recorder]:
    """Run the program; return what it tells and its records."""
    layers, tiny = (None if given.quick else given.layers), given.quick
    model = "moe-tiny" if tiny else f"moe-1.7b, {layers} layers"
    parameters = {
        key: value
        for key, value in vars(given).items()
        if key not in ("program", "quick", "results", "llama")
    } | {"cores": len(cores())}
    match given.program:
        case "first-token":
            first = first_token.run(layers=layers, tiny=tiny, rounds=given.rounds)
            return first_token.told(first), first_token.record(first, model, parameters)
        case "beside":
            paired = beside.run(
                layers=layers, tiny=tiny, rate=given.rate, seconds=given.seconds,
                rounds=given.rounds, loads=given.loads, own_tokenizer=given.own_tokenizer,
            )  # fmt: skip
            return beside.told(paired), beside.record(paired, model, parameters)
        case "cycles":
            del parameters["layers"]  # its models are tiny
            cycled = cycles.run(cycles=given.cycles, registered=given.registered)
            return cycles.told(cycled), cycles.record(cycled, "moe-tiny", parameters)
        case "registered":
            compared = registered.run(
                layers=layers, tiny=tiny, registered=given.registered, rounds=given.rounds
            )
            return registered.told(compared), registered.record(compared, model, parameters)
        case "prefixes":
            asked = prefixes.run(layers=layers, tiny=tiny, rounds=given.rounds)
            return prefixes.told(asked), prefixes.record(asked, model, parameters)
        case "turns":
            turns = taking_turns.run(
                layers=layers, tiny=tiny, seconds=given.seconds, quantum=given.quantum
            )
            return taking_turns.told(turns), taking_turns.record(turns, model, parameters)
        case "planned":
            checked = planned.run(
                models=given.models, room=given.room, layers=layers, tiny=tiny, rate=given.rate,
                seconds=given.seconds, exponent=given.exponent, runs=given.runs,
            )  # fmt: skip
            return planned.told(checked), planned.record(checked, model, parameters)
    popular = popularity.run(
        models=given.models, room=given.room, layers=layers, tiny=tiny, rate=given.rate,
        seconds=given.seconds, exponent=given.exponent, with_llama=given.llama,
    )  # fmt: skip
    return popularity.told(popular), popularity.record(popular, model, parameters)


if __name__ == "__main__":
    sys.exit(main())
