"""``crosspool bench``: load of many models at once for any server with OpenAI's API."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import resource
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
)

from crosspool.bench import result as results
from crosspool.bench.client import BenchError, Endpoint, models_of, send
from crosspool.bench.figures import read_objectives
from crosspool.bench.plot import plot_results
from crosspool.bench.prompts import PromptWriter, TokenWriter, WordWriter
from crosspool.bench.record import RequestRecord
from crosspool.bench.tables import comparison, result_tables
from crosspool.bench.workload import TimedRequest, make_workload
from crosspool.cli.arrival_flags import add_arrivals, add_lengths, read_load
from crosspool.cli.by_model import few
from crosspool.config.errors import ConfigError
from crosspool.config.flags import Parser
from crosspool.config.urls import base_url
from crosspool.observability.plots import check_suffix
from crosspool.observability.pools_table import make_console

_DESCRIPTION = """\
Sends requests for many models to a server with OpenAI's API, each at its time, whatever became of
those before it, and tells how long they took: time to first token (TTFT), time between tokens
(TBT) and end to end (E2E), as SGLang's bench_serving defines them."""
_EPILOG = """\
examples:
  crosspool bench http://127.0.0.1:30000 --rate 2 --popularity zipf:1.0 --requests 200
  crosspool bench http://127.0.0.1:30000 --rate chat=1,code=0.2 --seconds 300 \\
      --dataset sharegpt.json --slo ttft=2s,tbt=200ms --out a.json
  crosspool bench http://127.0.0.1:30000 --trace AzureLLMInferenceTrace_conv.csv --scale 0.1 \\
      --popularity openrouter --seconds 600 --context 4096 --ignore-eos
  crosspool bench compare a.json b.json --plot cdf.svg

The API key is read from OPENAI_API_KEY unless --api-key names another. The exit status is 1 when no
request has a complete output, and 130 after an interrupt.
"""


def run(words: Sequence[str], prog: str) -> int:
    if words and words[0] == "compare":
        return _compare(words[1:], f"{prog} compare")
    arguments = _parser(prog).parse_args(words)
    _check_files(arguments)
    try:
        return asyncio.run(_bench(arguments))
    except BenchError as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # before the first request
        return 130


def _compare(words: Sequence[str], prog: str) -> int:
    parser = Parser(
        prog=prog,
        description="Prints the figures of two runs and their ratios, the second to the first.",
        epilog="example:\n  crosspool bench compare a.json b.json --plot cdf.svg\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("first", type=Path, metavar="A", help="file that --out has written")
    parser.add_argument("second", type=Path, metavar="B", help="another one")
    _add_plot(parser)
    arguments = parser.parse_args(words)
    if arguments.plot is not None:
        _check_plot(arguments.plot)
    first, second = results.read(arguments.first), results.read(arguments.second)
    names = (arguments.first.name, arguments.second.name)
    if names[0] == names[1]:
        names = (str(arguments.first), str(arguments.second))
    make_console().print(comparison(first, second, names))
    if arguments.plot is not None:
        plot_results(dict(zip(names, (first, second), strict=True)), arguments.plot)
    return 0


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = Parser(
        prog=prog,
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("url", metavar="URL", help="the server, such as http://127.0.0.1:30000")
    _add_load(parser.add_argument_group("load"))
    _add_requests(parser.add_argument_group("requests"))
    output = parser.add_argument_group("output")
    output.add_argument(
        "--slo",
        metavar="LIMITS",
        help="limits that a good request keeps, such as ttft=2s,tbt=200ms: ttft, tbt (its longest "
        "time between tokens), tpot (its mean time per token behind the first), e2e",
    )
    output.add_argument(
        "--out", type=Path, metavar="FILE", help="write figures and requests as JSON"
    )
    _add_plot(output)
    return parser


def _add_load(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--model",
        action="append",
        default=[],
        metavar="NAME",
        help="a model that gets requests; once for each (default: those that --rate names, or all "
        "of the server's)",
    )
    add_arrivals(group)


def _add_requests(group: argparse._ArgumentGroup) -> None:
    add_lengths(group)
    group.add_argument(
        "--tokenizer",
        action="append",
        default=[],
        metavar="[NAME=]DIR",
        help="tokenizer.json, or its folder, of all models or of one: prompts are then exact token "
        "ids (default: common words, about a token each)",
    )
    group.add_argument(
        "--chat", action="store_true", help="use /v1/chat/completions instead of /v1/completions"
    )
    group.add_argument(
        "--ignore-eos",
        action="store_true",
        help="have outputs go on to their full length (SGLang's and vLLM's ignore_eos)",
    )
    group.add_argument(
        "--extra-request-body",
        type=_json_object,
        default={},
        metavar="JSON",
        help="further fields of every request, as a JSON object",
    )
    group.add_argument(
        "--api-key", metavar="KEY", help="the server's API key (default: OPENAI_API_KEY)"
    )
    group.add_argument(
        "--timeout",
        type=float,
        default=600.0,
        metavar="S",
        help="seconds after which a request counts as failed (default: %(default)g)",
    )


def _add_plot(to: argparse._ActionsContainer) -> None:
    to.add_argument(
        "--plot", type=Path, metavar="FILE", help="write the distributions as .svg or .png"
    )


def _json_object(word: str) -> dict[str, Any]:
    try:
        value = json.loads(word)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"{word!r} is no JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{word!r} is no JSON object")
    return value


def _check_files(arguments: argparse.Namespace) -> None:
    """Checks what is written at the end before anything is sent. Raises ConfigError."""
    if arguments.plot is not None:
        _check_plot(arguments.plot)
    if arguments.out is not None and not arguments.out.absolute().parent.is_dir():
        raise ConfigError(f"--out {arguments.out}: there is no folder {arguments.out.parent}")


def _check_plot(path: Path) -> None:
    check_suffix(path)
    if find_spec("matplotlib") is None:
        raise ConfigError("--plot: matplotlib must be installed: pip install 'crosspool[planner]'")


async def _bench(arguments: argparse.Namespace) -> int:
    objectives = None if arguments.slo is None else read_objectives(arguments.slo)
    if not 0 < arguments.timeout <= 86_400:
        raise ConfigError(f"--timeout {arguments.timeout}: must be above 0, and at most 86400 s")
    endpoint = Endpoint(
        url=base_url("URL", arguments.url).removesuffix("/v1"),
        api_key=arguments.api_key or os.environ.get("OPENAI_API_KEY") or None,
        chat=arguments.chat,
        ignore_eos=arguments.ignore_eos,
        timeout=arguments.timeout,
        more=arguments.extra_request_body,
    )
    models = _models(arguments, await models_of(endpoint))
    workload, notes = _workload(arguments, models)
    _allow_connections()
    with _shown(len(workload)) as told:
        sending = await send(endpoint, workload, told)
    flags = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in vars(arguments).items()
        if name not in ("url", "api_key", "out", "plot")
    }
    made = results.make_result(
        sending, models, objectives, url=endpoint.url, arguments=flags, notes=notes
    )
    if arguments.out is not None:
        results.write(made, arguments.out)
    make_console().print(result_tables(made))
    if arguments.plot is not None:
        plot_results({endpoint.url: made}, arguments.plot)
    if made.interrupted:
        where = "" if arguments.out is None else f"; {arguments.out} has them"
        print(
            f"interrupted: {len(made.requests)} of {len(workload)} requests were sent{where}",
            file=sys.stderr,
        )
        return 130
    return 0 if made.all.complete else 1


def _models(arguments: argparse.Namespace, served: Sequence[str]) -> list[str]:
    """Returns the names of the models that get requests. Raises ConfigError."""
    named = list(dict.fromkeys(arguments.model))
    if not named and arguments.rate is not None and "=" in arguments.rate:
        named = [part.rpartition("=")[0] for part in arguments.rate.split(",")]
    for name in named:
        if name not in served:
            raise ConfigError(f"the server has no model {name!r}, only {few(served)}")
    if not named and not served:
        raise ConfigError("the server has no models; name one that it loads with --model")
    return named or list(served)


def _workload(
    arguments: argparse.Namespace, models: Sequence[str]
) -> tuple[list[TimedRequest], list[str]]:
    """Returns the requests, and remarks on how they were made. Raises ConfigError."""
    tokenizers = _tokenizers(arguments.tokenizer, models)
    counts_tokens = next((path for path in tokenizers if path is not None), None)
    arrivals, rows, prompts_rng, notes = read_load(arguments, models, counts_tokens)
    if rows.texts is None and None in tokenizers:
        notes.append("without --tokenizer, prompts are words, about a token each")
    writers = _writers(tokenizers, arguments.chat, prompts_rng)
    return make_workload(arrivals, models, rows, writers), notes


def _tokenizers(words: Sequence[str], models: Sequence[str]) -> list[Path | None]:
    """Returns the tokenizer of each model; None where there is none. Raises ConfigError."""
    found: dict[str, Path] = {}
    for word in words:
        name, separator, path = word.partition("=")
        if separator and name not in models:
            raise ConfigError(f"--tokenizer {word!r}: there is no model {name!r}")
        found |= {name: Path(path)} if separator else dict.fromkeys(models, Path(word))
    return [found.get(name) for name in models]


def _writers(
    tokenizers: Sequence[Path | None], chat: bool, rng: np.random.Generator
) -> list[PromptWriter]:
    """Returns a writer for each model. Models with the same tokenizer share one."""
    made: dict[Path | None, PromptWriter] = {}
    for path in tokenizers:
        if path not in made:
            made[path] = WordWriter(rng) if path is None else TokenWriter(path, rng, as_text=chat)
    return [made[path] for path in tokenizers]


def _allow_connections() -> None:
    """Lets this process have as many open requests as the system allows."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


@contextlib.contextmanager
def _shown(total: int) -> Iterator[Callable[[RequestRecord], None]]:
    """Shows a bar on a terminal; yields what moves it."""
    console = Console(stderr=True)
    columns = (
        *(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()),
        TimeElapsedColumn(),
    )
    failed = 0
    with Progress(
        *columns, console=console, disable=not console.is_terminal, refresh_per_second=2
    ) as bar:
        task = bar.add_task("requests", total=total)

        def told(record: RequestRecord) -> None:
            nonlocal failed
            failed += not record.complete
            what = f"requests, {failed} failed" if failed else "requests"
            bar.update(task, advance=1, description=what)

        yield told
