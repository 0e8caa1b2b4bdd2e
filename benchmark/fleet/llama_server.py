"""The server of llama-cpp-python with several models in its config file: it holds one at a time,
and swaps it for another when a request names that."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from crosspool.config.process import die_with_parent

from benchmark.peers.install import PEERS
from benchmark.peers.llama_peer import gguf_path
from benchmark.records import ROOT

_READY_SECONDS = 600.0
_CONTEXT_TOKENS = 1024


class LlamaServer:
    """Runs ``python -m llama_cpp.server`` on ``cores`` within a ``with``. Its models are made from
    the checkpoints ``folders`` where they are not there yet."""

    def __init__(self, folders: Sequence[Path], cores: Sequence[int]) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        self.url = f"http://127.0.0.1:{self.port}"
        self._cores = cores
        self._python = str(PEERS["llama"].python)
        for folder in folders:
            if not gguf_path(folder).is_file():
                command = [self._python, "-m", "benchmark.peers.gguf_file"]
                subprocess.run(
                    [*command, str(folder), str(gguf_path(folder))], check=True, cwd=ROOT
                )
        self._temporary = tempfile.TemporaryDirectory(prefix="llama-server-")
        self._config = Path(self._temporary.name) / "config.json"
        self._log = Path(self._temporary.name) / "log"
        settings = {
            "host": "127.0.0.1",
            "port": self.port,
            "interrupt_requests": False,
            "models": [
                {
                    "model": str(gguf_path(folder)),
                    "model_alias": folder.name,
                    "n_ctx": _CONTEXT_TOKENS,
                    "n_threads": len(cores),
                    "n_threads_batch": len(cores),
                    "verbose": False,
                }
                for folder in folders
            ],
        }
        self._config.write_text(json.dumps(settings))

    def __enter__(self) -> LlamaServer:
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [self._python, "-m", "llama_cpp.server", "--config_file", str(self._config)],
                stdout=log,
                stderr=subprocess.STDOUT,
                preexec_fn=self._begin,  # noqa: PLW1509
            )
        deadline = time.monotonic() + _READY_SECONDS
        while time.monotonic() < deadline and self._process.poll() is None:
            with (
                contextlib.suppress(OSError),
                urllib.request.urlopen(f"{self.url}/v1/models", timeout=5) as answer,
            ):
                if answer.status == 200:
                    return self
            time.sleep(0.2)
        text = self._log.read_text(errors="replace")
        self.__exit__()
        raise RuntimeError(f"llama_cpp.server does not answer:\n{text[-3000:]}")

    def _begin(self) -> None:
        die_with_parent()
        os.sched_setaffinity(0, self._cores)

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        self._temporary.cleanup()
