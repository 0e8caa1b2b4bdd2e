"""A server whose weight pool holds some of its models, and what it tells of them."""

from __future__ import annotations

import http.client
import json
import os
import socket
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from crosspool.config.runtime_dir import find_running
from crosspool.models.registry import read_model
from crosspool.weightpool.placement import FFNShard, attention_bytes, ffn_bytes

from benchmark import checkpoint
from benchmark.client import STREAM_FLAGS
from benchmark.server import Server

_LOOK_SECONDS = 0.05
_WAIT_SECONDS = 600.0


def cores() -> list[int]:
    """Return the cores of the device: all but one, which is left to front end and client."""
    every = sorted(os.sched_getaffinity(0))
    return every[:-1] or every


def sizes(folder: Path) -> tuple[int, int]:
    """Return the bytes of a model's FFN weights, and of its attention part, on one device."""
    spec = read_model(folder)
    shard = FFNShard(rank=0, ranks=1, parallel="tp")
    return ffn_bytes(spec, shard), attention_bytes(spec)


class Fleet(Server):
    """Serves ``folders``, all of one shape, in memory for the weights of ``room`` of them. Their
    packed weights are in :attr:`packed`, which goes with the server."""

    def __init__(self, folders: Sequence[Path], room: int, flags: Sequence[str] = ()) -> None:
        self.names = [folder.name for folder in folders]
        (checkpoint.cache_dir()).mkdir(parents=True, exist_ok=True)
        self._temporary = tempfile.TemporaryDirectory(prefix="packed-", dir=checkpoint.cache_dir())
        self.packed = Path(self._temporary.name)
        ffn, attention = sizes(folders[0])
        device = "cpu:" + "+".join(map(str, cores()))
        super().__init__(
            [
                *("--kv-pool-devices", device, "--weight-pool-devices", device),
                *("--kv-pool-bytes", "512MiB", "--weight-pool-bytes", str(room * ffn)),
                *("--attention-weight-bytes", str(room * attention)),
                *("--packed-cache-dir", self._temporary.name, "--packed-cache-bytes", "64GiB"),
                *(*STREAM_FLAGS, *flags),
            ],
            [str(folder) for folder in folders],
            ready_timeout=1200.0,
        )

    def __enter__(self) -> Fleet:
        super().__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self._temporary.cleanup()

    def models(self) -> dict[str, dict[str, Any]]:
        """Return what the server tells of each model, by its name."""
        return {told["name"]: told for told in self.request("GET", "/crosspool/models")[1]}

    def do(self, what: str, name: str) -> dict[str, Any]:
        """Wake the model, put it to ``sleep`` or ``pin`` it; return what is told of it then. Raises
        RuntimeError when that fails."""
        return self._call("POST", f"/{name}/{what}")

    def load(self, folder: Path, name: str | None = None) -> dict[str, Any]:
        """Have a further model served; return what is told of it. Raises RuntimeError when that
        fails."""
        return self._call("POST", "", {"path": str(folder), "name": name or folder.name})

    def unload(self, name: str) -> None:
        """Have a model served no more. Raises RuntimeError when that fails."""
        self._call("DELETE", f"/{name}")

    def _call(self, method: str, path: str, body: Any = None) -> dict[str, Any]:
        connection = http.client.HTTPConnection("admin", timeout=_WAIT_SECONDS)
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.settimeout(_WAIT_SECONDS)
        connection.sock.connect(str(find_running(self.port).admin_socket))
        try:
            connection.request(method, f"/crosspool/models{path}", json.dumps(body or {}))
            answer = connection.getresponse()
            told: dict[str, Any] = json.loads(answer.read())
        finally:
            connection.close()
        if answer.status not in (200, 201):
            raise RuntimeError(f"{method} {path}: {told['error']['message']}")
        return told

    def pack_all(self) -> None:
        """Wake every model from sleep once, so that the packed weights of all of them are on disk:
        those that are resident from the start are packed meanwhile. All sleep then."""
        for name in self.names:
            self.do("sleep", name)
        for name in self.names:
            self.do("wake", name)
            self.do("sleep", name)


@contextmanager
def timed(seconds: list[float]) -> Iterator[None]:
    """Add the time within the ``with`` to ``seconds``."""
    began = time.perf_counter()
    yield
    seconds.append(time.perf_counter() - began)


class States:
    """What the state of each model was, at times of ``time.perf_counter``."""

    def __init__(self, server: Fleet) -> None:
        self._server = server
        self.seen: list[tuple[float, dict[str, str]]] = []
        """Pairs (time, state of each model), in order."""

    @contextmanager
    def watched(self) -> Iterator[States]:
        """Look at the server many times a second within the ``with``."""
        over = threading.Event()

        def look() -> None:
            while not over.wait(_LOOK_SECONDS):
                when = time.perf_counter()
                told = self._server.models()
                self.seen.append((when, {name: model["state"] for name, model in told.items()}))

        looker = threading.Thread(target=look, daemon=True)
        looker.start()
        try:
            yield self
        finally:
            over.set()
            looker.join()

    def at(self, when: float, name: str) -> str:
        """Return the state of the model when it was last seen before ``when``."""
        earlier = [states for seen, states in self.seen if seen <= when] or [self.seen[0][1]]
        return earlier[-1][name]
