"""What the server's processes have in common: arguments, title, log, exit status."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from crosspool.config.cores import CONTROL_SLICE_NS, keep_off, set_slice
from crosspool.config.deployment import ConfigError, Deployment, load
from crosspool.config.process import die_with_parent, set_title


def run(name: str, serve: Callable[[Deployment], None], argv: Sequence[str] | None = None) -> int:
    """Parses ``--deployment FILE`` and calls ``serve``, which imports SGLang.

    The exit status is 0 when ``serve`` returns, 2 after a ConfigError, which goes to stderr, and 1
    after any other exception, which goes to the log."""
    parser = argparse.ArgumentParser(prog=f"crosspool {name}")
    parser.add_argument("--deployment", type=Path, required=True, help="deployment.json")
    arguments = parser.parse_args(argv)

    die_with_parent()
    deployment = prepare(name, arguments.deployment)
    try:
        serve(deployment)
    except ConfigError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    except Exception:
        logging.getLogger(__name__).exception("the %s process cannot go on", name)
        return 1
    return 0


def prepare(name: str, file: Path) -> Deployment:
    """Gives the process its title, its log and the environment in which SGLang is imported."""
    set_title(name)
    deployment = load(file)
    keep_off(deployment.devices)
    set_slice(CONTROL_SLICE_NS)
    configure_logging(name, deployment)
    os.environ["SGLANG_USE_PICKLE_IPC"] = "0"
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if deployment.sglang.get("enable_metrics"):
        # SGLang's metrics of all processes go through files; prometheus_client reads this when it
        # is imported.
        folder = Path(deployment.runtime_dir) / "metrics"
        folder.mkdir(exist_ok=True)
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(folder)
    return deployment


def leave(status: int) -> NoReturn:
    """Ends the process at once: an orderly end of SGLang's and torch's modules takes seconds and
    is of no use."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


_NOISE = (
    "does not support Intel AMX",
    "SGLANG_USE_CUDA_IPC_TRANSPORT is deprecated",
    "Registered linear attn model",
    "OpenAI Responses API (/v1/responses) disabled",
    "Using fallback token IDs for yes/no",
    "Restoring add_bos_token",
    "Using default HuggingFace chat template",
    "Started server process",
    "Finished server process",
)
"""Lines of SGLang and uvicorn about what CrossPool does not use, or that name no model."""


def configure_logging(name: str, deployment: Deployment) -> None:
    """Sends log lines of this process to stderr at the deployment's ``log_level``, without those
    that are noise."""
    logging.basicConfig(
        level=str(deployment.sglang.get("log_level", "info")).upper(),
        format=f"%(asctime)s %(levelname)s {name}: %(message)s",
        stream=sys.stderr,
        force=True,
    )
    for handler in logging.getLogger().handlers:
        handler.addFilter(lambda record: not any(n in record.getMessage() for n in _NOISE))
    warnings.filterwarnings("ignore", message="Only CUDA", module="sglang")
    warnings.filterwarnings("ignore", message="ORJSONResponse is deprecated")
