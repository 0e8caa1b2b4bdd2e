"""``crosspool trace``: records what the lanes of a running server do, for a trace viewer."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

from crosspool.config.runtime_dir import find_running
from crosspool.observability.trace import to_chrome
from crosspool.transport import admin

_EPILOG = """\
example:
  crosspool trace --seconds 2 --out trace.json      # send requests meanwhile
  # then open trace.json in https://ui.perfetto.dev or chrome://tracing
"""
_ANSWER_SECONDS = 30.0


def run(words: Sequence[str], prog: str) -> int:
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Records which rank works on which layer of which model, lane by lane.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--seconds", type=float, default=2.0, help="how long to record, in seconds (default: 2)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("trace.json"), help="file to write (default: trace.json)"
    )
    parser.add_argument("--port", type=int, help="port of the server, if several run here")
    arguments = parser.parse_args(words)

    deployment = find_running(arguments.port)
    admin.inspect(deployment.admin_address, "trace_start", _ANSWER_SECONDS)
    time.sleep(arguments.seconds)
    report = admin.inspect(deployment.admin_address, "trace_stop", _ANSWER_SECONDS)
    events = [event for device in report.trace_stop for event in device.events]
    arguments.out.write_text(json.dumps(to_chrome(events, deployment.names)))
    print(f"wrote {len(events)} events to {arguments.out}")
    return 0
