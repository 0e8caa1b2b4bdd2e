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
from crosspool.bench.dataset import Fit, Rows, read_dataset
from crosspool.bench.figures import read_objectives
from crosspool.bench.plot import plot_results
from crosspool.bench.prompts import PromptWriter, TokenWriter, WordWriter
from crosspool.bench.record import RequestRecord
from crosspool.bench.tables import comparison, result_tables
from crosspool.bench.workload import (
    Arrivals,
    Extent,
    TimedRequest,
    arrival_times,
    dealt,
    make_workload,
    poisson,
)
from crosspool.cli.by_model import few, per_model, rate
from crosspool.config.errors import ConfigError
from crosspool.config.flags import Parser
from crosspool.config.urls import base_url
from crosspool.observability.plots import check_suffix
from crosspool.observability.pools_table import make_console
from crosspool.planner.traffic.popularity import read_popularity
from crosspool.planner.traffic.spread import named_owners
from crosspool.planner.traffic.trace_files import read_trace

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
_DATASET = "random:prompt=512,output=128"
_REQUESTS = 100


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
    group.add_argument(
        "--rate",
        metavar="RATE",
        help="requests per second of all models together, or NAME=RATE,... for each; arrivals are "
        "Poisson",
    )
    group.add_argument(
        "--popularity",
        metavar="LAW",
        help="how requests are dealt to models, the first one most popular: openrouter, "
        "zipf:ALPHA, uniform, or a weight for each model (default: uniform, or the models that a "
        "trace names)",
    )
    group.add_argument(
        "--trace",
        type=Path,
        metavar="FILE",
        help="recorded requests whose arrival times are kept, and whose lengths are unless "
        "--dataset gives others; the formats are those of crosspool plan, such as the Azure LLM "
        "traces' CSV",
    )
    group.add_argument(
        "--scale",
        type=float,
        metavar="X",
        help="send a trace's requests X times as fast as they came (default: 1)",
    )
    extent = group.add_mutually_exclusive_group()
    extent.add_argument(
        "--requests",
        type=int,
        metavar="N",
        help=f"number of requests (default: {_REQUESTS}, or all of a trace)",
    )
    extent.add_argument(
        "--seconds", type=float, metavar="S", help="send requests for S seconds instead"
    )
    group.add_argument(
        "--seed", type=int, default=0, help="seed of all random draws (default: %(default)s)"
    )


def _add_requests(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--dataset",
        metavar="DATASET",
        help="a ShareGPT JSON file, any trace file for its lengths, azure-conversation, azure-code "
        "or random:prompt=TOKENS,output=TOKENS, with range_ratio=R for lengths from R of that on "
        f"(default: the trace's lengths, or {_DATASET})",
    )
    group.add_argument(
        "--tokenizer",
        action="append",
        default=[],
        metavar="[NAME=]DIR",
        help="tokenizer.json, or its folder, of all models or of one: prompts are then exact token "
        "ids (default: common words, about a token each)",
    )
    group.add_argument(
        "--scale-lengths", type=float, default=1.0, metavar="X", help="multiply lengths by X"
    )
    group.add_argument(
        "--context",
        type=int,
        metavar="TOKENS",
        help="leave out requests whose prompt and output together are longer",
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
    streams = np.random.SeedSequence(_seed(arguments.seed)).spawn(3)
    arrivals_rng, rows_rng, prompts_rng = map(np.random.default_rng, streams)
    fit = Fit(scale=arguments.scale_lengths, context=arguments.context)
    extent = Extent(requests=arguments.requests, seconds=arguments.seconds)
    tokenizers = _tokenizers(arguments.tokenizer, models)
    notes: list[str] = []
    rows: Rows | None = None
    if arguments.trace is not None:
        if arguments.rate is not None:
            raise ConfigError("--rate: --trace has arrival times already; leave one of the two out")
        arrivals, rows = _traced(arguments, models, fit, extent, rng=arrivals_rng, notes=notes)
    else:
        if arguments.scale is not None:
            raise ConfigError("--scale: it is for the arrival times of a --trace")
        if arguments.rate is None:
            raise ConfigError("no load: give --rate, or --trace FILE")
        if extent.requests is None and extent.seconds is None:
            extent = Extent(requests=_REQUESTS)
        arrivals = poisson(_rates(arguments, models), extent, arrivals_rng)
    if not len(arrivals):
        raise ConfigError("no request arrives in that time: give more --seconds, or a higher rate")
    if arguments.dataset is not None or rows is None:
        counts_tokens = next((path for path in tokenizers if path is not None), None)
        dataset = read_dataset(arguments.dataset or _DATASET, counts_tokens, fit)
        notes += dataset.notes
        rows = dataset.draw(len(arrivals), rows_rng)
    if rows.texts is None and None in tokenizers:
        notes.append("without --tokenizer, prompts are words, about a token each")
    writers = _writers(tokenizers, arguments.chat, prompts_rng)
    return make_workload(arrivals, models, rows, writers), notes


def _seed(seed: int) -> int:
    if seed < 0:
        raise ConfigError(f"--seed {seed}: must be 0 or more")
    return seed


def _traced(
    arguments: argparse.Namespace,
    models: Sequence[str],
    fit: Fit,
    extent: Extent,
    *,
    rng: np.random.Generator,
    notes: list[str],
) -> tuple[Arrivals, Rows]:
    """Returns the arrivals and the lengths of the trace's requests that fit."""
    scale = 1.0 if arguments.scale is None else arguments.scale
    if not (np.isfinite(scale) and scale > 0):
        raise ConfigError(f"--scale {scale}: must be a number above 0")
    trace = read_trace(arguments.trace)
    notes += trace.notes
    times = arrival_times(trace) / scale
    rows = Rows(trace.prompt, trace.output).scaled(fit.scale)
    if arguments.dataset is None:
        places = fit.places(rows)
        notes += fit.note(len(places), len(rows))
        trace, times, rows = trace.take(places), times[places], rows.take(places)
    if trace.model is not None and arguments.popularity is None:
        owners = named_owners(trace, models)
    else:
        shares = read_popularity(arguments.popularity or "uniform", len(models))
        owners = dealt(trace, shares, rng).owners
    count = extent.of(times)
    return Arrivals(times[:count], owners[:count]), rows.take(np.arange(count))


def _rates(arguments: argparse.Namespace, models: Sequence[str]) -> list[float]:
    """Returns the models' rates in requests per second, in their order. Raises ConfigError."""
    if "=" in arguments.rate:
        if arguments.popularity is not None:
            raise ConfigError(
                "--popularity: --rate already gives each model its rate; leave one of the two out"
            )
        found = per_model(arguments.rate, models, "--rate", rate)
        rates = [found[name] for name in models]
    else:
        shares = read_popularity(arguments.popularity or "uniform", len(models))
        rates = [rate(arguments.rate, "--rate") * float(share) for share in shares]
    if not sum(rates) > 0:
        raise ConfigError("--rate: at least one rate must be above 0 requests per second")
    return rates


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
