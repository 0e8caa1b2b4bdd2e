"""Every query of the Grafana board, answered by Prometheus, which reads a live server."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from crosspool.config.process import die_with_parent
from support.fleet import DEEPSEEK, FLAGS, FOR_TWO, QWEN, do, state_of, wait_for
from support.server import ROOT, Server, free_port

MONITORING = ROOT / "examples" / "monitoring"
VARIABLES = {"instance": ".*", "model": ".*", "__rate_interval": "1m"}
"""What Grafana puts in: the board's variables at "All", and four intervals of reading at least."""
OFTEN = 1.0
"""Seconds between two readings, so that the test need not take minutes."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("prometheus") is None, reason="needs the program prometheus"),
]


def panels(node: Any) -> Iterator[dict[str, Any]]:
    """Every panel of a board that asks something, those within rows included."""
    for panel in node["panels"]:
        if panel.get("targets"):
            yield panel
        yield from panels(panel) if panel.get("panels") else ()


def asked() -> list[tuple[str, str]]:
    board = json.loads((MONITORING / "grafana" / "crosspool.json").read_text())
    found = [(panel["title"], t["expr"]) for panel in panels(board) for t in panel["targets"]]
    assert len(found) >= 30
    return found


def filled(query: str) -> str:
    filled = re.sub(r"\$(\w+)", lambda match: VARIABLES[match[1]], query)
    assert "$" not in filled
    return filled


class Prometheus:
    """The program, with the example's configuration but for the server's address and
    :data:`OFTEN`."""

    def __init__(self, server: Server, folder: Path) -> None:
        configuration = yaml.safe_load((MONITORING / "prometheus.yaml").read_text())
        configuration["global"] = {"scrape_interval": f"{OFTEN:g}s", "evaluation_interval": "1s"}
        (job,) = configuration["scrape_configs"]
        job["static_configs"] = [{"targets": [f"127.0.0.1:{server.port}"]}]
        shutil.copy(MONITORING / "rules.yaml", folder)
        (folder / "prometheus.yaml").write_text(yaml.safe_dump(configuration))
        self._port = free_port()
        self._log = folder / "log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [
                    *("prometheus", f"--config.file={folder / 'prometheus.yaml'}"),
                    *(f"--storage.tsdb.path={folder / 'data'}",),
                    *(f"--web.listen-address=127.0.0.1:{self._port}",),
                ],
                stdout=log,
                stderr=log,
                preexec_fn=die_with_parent,  # noqa: PLW1509
            )

    def ask(self, what: str, **parameters: str) -> Any:
        url = f"http://127.0.0.1:{self._port}/api/v1/{what}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(url, timeout=30) as answer:
            told = json.loads(answer.read())
        assert told["status"] == "success", told
        return told["data"]

    def numbers(self, query: str) -> list[float]:
        """The values of the query's series now, those that are no number left out."""
        values = [float(one["value"][1]) for one in self.ask("query", query=query)["result"]]
        return [value for value in values if value == value]  # noqa: PLR0124

    def wait_for(self, query: str, seconds: float = 60) -> None:
        """Returns once the query has an answer that is a number."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                if self.numbers(query):
                    return
            except OSError:
                assert self._process.poll() is None, self._log.read_text()
            assert time.monotonic() < deadline, (query, self._log.read_text())
            time.sleep(0.2)

    def stop(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(20)
        finally:
            self._process.kill()


@pytest.fixture(scope="module")
def watched(packed: Path) -> Iterator[Server]:
    """Serves two models that can sleep, with a bound on the weights of each pool."""
    flags = [*FLAGS, "--packed-cache-dir", str(packed), "--weight-pool-bytes", str(FOR_TWO)]
    flags += ["--attention-weight-bytes", "32MiB"]
    with Server(flags, models=(QWEN, DEEPSEEK)) as running:
        yield running


@pytest.fixture(scope="module")
def prometheus(watched: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """It has seen requests for two models come, end and be refused, and one of them sleep and be
    woken."""
    running = Prometheus(watched, tmp_path_factory.mktemp("prometheus"))
    try:
        running.wait_for('up{job="crosspool"} == 1')
        refused = {"model": QWEN, "prompt": "x", "max_tokens": 2, "regex": "("}
        assert watched.post("/v1/completions", refused)[0] == 400
        for repeated in range(2):
            time.sleep(3 * OFTEN)  # so that counters are read before and after they grow
            for model in (QWEN, DEEPSEEK):
                body = {"model": model, "prompt": "a b c", "max_tokens": 8, "ignore_eos": True}
                assert watched.post("/v1/completions", body)[0] == 200
            assert watched.post("/v1/completions", refused)[0] == 400
            if not repeated:
                do(watched, "sleep", DEEPSEEK)
                wait_for(watched, lambda: state_of(watched, DEEPSEEK) == "asleep")
        time.sleep(3 * OFTEN)
        yield running
    finally:
        running.stop()


def test_every_panel_has_numbers(prometheus: Prometheus) -> None:
    empty = []
    for title, query in asked():
        values = prometheus.numbers(filled(query))
        if not values:
            empty.append((title, query))
    assert not empty


def test_rates_have_seen_what_has_happened(prometheus: Prometheus) -> None:
    for title in ("Output tokens per second", "Wakes and sleeps per minute", "Refused or aborted"):
        for query in [query for found, query in asked() if found == title]:
            assert max(prometheus.numbers(filled(query))) > 0, title


def test_the_boards_variables_have_values(prometheus: Prometheus) -> None:
    board = json.loads((MONITORING / "grafana" / "crosspool.json").read_text())
    for variable in board["templating"]["list"]:
        metric, label = re.fullmatch(
            r"label_values\((\w+), (\w+)\)", variable["definition"]
        ).groups()
        told = prometheus.ask(f"label/{label}/values", **{"match[]": metric})
        assert told, variable
    assert {QWEN, DEEPSEEK} <= set(told)


def test_all_rules_are_taken_and_evaluated(prometheus: Prometheus) -> None:
    rules = yaml.safe_load((MONITORING / "rules.yaml").read_text())
    wanted = {rule["alert"] for group in rules["groups"] for rule in group["rules"]}
    groups = prometheus.ask("rules")["groups"]
    found = {rule["name"]: rule["health"] for group in groups for rule in group["rules"]}
    assert found == dict.fromkeys(wanted, "ok")
