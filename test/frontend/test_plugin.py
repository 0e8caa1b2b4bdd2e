"""A stock SGLang server that is attached to a running deployment."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from crosspool.frontend import plugin
from crosspool.transport import admin
from support.front_end import MODELS, FrontEndServer
from support.server import DEMO, ROOT, free_port

pytestmark = pytest.mark.slow


@pytest.fixture
def installed(tmp_path: Path) -> dict[str, str]:
    """The environment of a Python in which CrossPool's entry point is installed."""
    info = tmp_path / "crosspool_installed-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: crosspool-installed\nVersion: 0\n")
    group = "[sglang.srt.plugins]\ncrosspool = crosspool.frontend.plugin:register\n"
    (info / "entry_points.txt").write_text(group)
    path = f"{tmp_path}:{ROOT / 'python'}"
    return {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}


@pytest.fixture
def attached(server: FrontEndServer, installed: dict[str, str], tmp_path: Path) -> Iterator[Any]:
    port = free_port()
    log = tmp_path / "log"
    with log.open("w") as out:
        process = psutil.Popen(
            [
                *(sys.executable, "-m", "crosspool.sglang", "launch_server", "--device", "cpu"),
                *("--model-path", str(DEMO / MODELS[1]), "--served-model-name", MODELS[1]),
                *("--port", str(port), "--skip-server-warmup"),
            ],
            env={**installed, plugin.ADDRESS: server.deployment.admin_address},
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    other = FrontEndServer.__new__(FrontEndServer)
    other.url, other.log, other.processes = f"http://127.0.0.1:{port}", log, {"stock": process}
    try:
        yield other.wait_ready()
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except psutil.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def test_it_serves_beside_the_deployment(server: FrontEndServer, attached: FrontEndServer) -> None:
    body = {"model": MODELS[1], "prompt": "x", "max_tokens": 6}
    status, answer, _ = attached.request("/v1/completions", body)
    assert status == 200, (answer, attached.log.read_text()[-3000:])
    status, own, _ = server.request("/v1/completions", body)
    assert status == 200, (own, server.log.read_text()[-3000:])
    assert answer["choices"][0]["text"] == own["choices"][0]["text"]
    models = admin.status(server.deployment.admin_address).models
    assert [model.attached for model in models] == [0, 1]
    attached.processes["stock"].send_signal(signal.SIGTERM)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        models = admin.status(server.deployment.admin_address).models
        if [model.attached for model in models] == [0, 0]:
            break
        time.sleep(0.2)
    assert [model.attached for model in models] == [0, 0]
    assert server.request("/v1/completions", body)[0] == 200


def test_an_unknown_model_is_refused_with_the_known_ones(server: FrontEndServer) -> None:
    with pytest.raises(admin.AdminError, match=MODELS[0]):
        admin.attach(
            server.deployment.admin_address,
            model="nope",
            scheduler_input="ipc:///tmp/a",
            tokenizer="ipc:///tmp/b",
            detokenizer="ipc:///tmp/c",
        )
