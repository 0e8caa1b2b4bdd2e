"""Launchers of one deployment on several hosts, which are network namespaces."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import psutil
from crosspool.config.runtime_dir import find_running
from crosspool.transport.deployment_keys import DeploymentKeys, write_keys
from support.greedy import prompts_of
from support.namespaces import Network, network
from support.server import DEMO, TINY_MODELS, Server, free_port

FLAGS = ("--dtype", "float32", "--kv-pool-bytes", "128MiB")
PARAMETERS = {"temperature": 0, "max_new_tokens": 48, "ignore_eos": True}
PROMPTS = prompts_of(DEMO / TINY_MODELS[0])[:4]
SECONDS = 120.0


class SeveralHosts:
    """``kv`` and ``weights``: the devices of the pools; by default both are on node 1. ``models``
    are served, and ``flags`` go to every launcher."""

    def __init__(
        self,
        bed: Network,
        folder: Path,
        kv: str | None = None,
        weights: str | None = None,
        *,
        nodes: int = 2,
        models: Sequence[str] = TINY_MODELS,
        flags: Sequence[str] = (),
    ) -> None:
        self.bed = bed
        self.nodes = range(nodes)
        self.models = models
        self._flags = flags
        cores = [f"node1/cpu:{core}" for core in sorted(os.sched_getaffinity(0))[:2]]
        self._pools = kv or cores[0], weights or cores[-1]
        self.port = free_port()
        self.keys = folder / "keys"
        write_keys(self.keys, DeploymentKeys.new())
        self.control = free_port()
        self.launchers: dict[int, subprocess.Popen[bytes]] = {}
        self.packed = {node: folder / f"packed{node}" for node in self.nodes}
        for packed in self.packed.values():
            packed.mkdir(mode=0o700)
        self.logs = {node: folder / f"node{node}.log" for node in self.nodes}

    @property
    def options(self) -> list[str]:
        """What every launcher is started with, but for what names a host."""
        kv, weights = self._pools
        words = [*FLAGS, *self._flags, "--host-timeout", "4", "--port", str(self.port)]
        words += ["--kv-pool-devices", kv, "--weight-pool-devices", weights]
        for name in self.models:
            words += ["--model-path", str(DEMO / name)]
        return words

    @property
    def address(self) -> str:
        """Where other hosts reach node 0."""
        return f"{self.bed.address(0)}:{self.control}"

    def start(self, node: int) -> None:
        words = [sys.executable, "-m", "crosspool.launch_server", *self.options]
        words += ["--nnodes", str(len(self.nodes)), "--node-rank", str(node)]
        words += ["--keys", str(self.keys), "--dist-init-addr", self.address]
        words += ["--packed-cache-dir", str(self.packed[node])]
        self.start_words(node, words)

    def start_words(
        self, node: int, words: Sequence[str], environment: Mapping[str, str] | None = None
    ) -> None:
        """Starts something else on a host that starts launchers."""
        with self.logs[node].open("ab") as log:
            self.launchers[node] = self.bed.start(
                node, words, env=environment, stdout=log, stderr=subprocess.STDOUT
            )

    @property
    def log(self) -> str:
        return "\n".join(f"--- {f.name}\n{f.read_text()}" for f in self.logs.values() if f.exists())

    def client(self) -> httpx.Client:
        """A client of the admin's socket, which namespaces share."""
        transport = httpx.HTTPTransport(uds=str(find_running(self.port).admin_socket))
        return httpx.Client(transport=transport, base_url="http://admin", timeout=SECONDS)

    def get(self, path: str) -> Any:
        with self.client() as client:
            return client.get(path).json()

    def devices(self) -> list[dict[str, Any]]:
        return list(self.get("/crosspool/status")["devices"])

    def wait(self, what: Callable[[], bool]) -> None:
        deadline = time.monotonic() + SECONDS
        while True:
            assert all(p.poll() is None for p in self.launchers.values()), self.log
            with contextlib.suppress(Exception):
                if what():
                    return
            assert time.monotonic() < deadline, self.log
            time.sleep(0.2)

    def wait_ready(self) -> None:
        def is_ready() -> bool:
            with self.client() as client:
                return client.get("/health").status_code == 200

        self.wait(is_ready)

    def wait_back(self, restarts: int) -> None:
        """Waits until all devices work, and one of them has been replaced as often."""
        self.wait(
            lambda: (
                all(d["ready"] for d in self.devices())
                and max(d["restarts"] for d in self.devices()) >= restarts
            )
        )

    def generate(self, model: str, prompt: list[int]) -> list[int]:
        body = {"input_ids": prompt, "sampling_params": PARAMETERS}
        with self.client() as client:
            answer = client.post(f"/m/{model}/generate", json=body)
        assert answer.status_code == 200, answer.text
        return list(answer.json()["output_ids"])

    def lose(self, lose: Callable[[], None], expected: Sequence[list[int]]) -> float:
        """Loses something while requests of the first model run; none of them may fail or say
        anything else than expected. Returns the seconds from the end of ``lose`` to the last
        answer."""
        answers: list[list[int] | None] = [None] * len(PROMPTS)

        def ask(index: int) -> None:
            answers[index] = self.generate(TINY_MODELS[0], PROMPTS[index])

        threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(PROMPTS))]
        for thread in threads:
            thread.start()
        lose()
        mended = time.monotonic()
        for thread in threads:
            thread.join(SECONDS)
        seconds = time.monotonic() - mended
        assert answers == expected, self.log
        return seconds

    def cut_for(self, seconds: float) -> None:
        """Cuts node 1 off for so long: what it sends is lost, and its line stays up."""
        self.bed.cut(1)
        time.sleep(seconds)
        self.bed.mend(1)

    def down_for(self, seconds: float) -> None:
        """Takes the line of node 1 down for so long, as when a cable is pulled."""
        self.bed.take_down(1)
        time.sleep(seconds)
        self.bed.bring_up(1)

    def close(self) -> None:
        for process in self.launchers.values():
            process.send_signal(signal.SIGTERM)
        for process in self.launchers.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(60)
            process.kill()
            process.wait()


@contextlib.contextmanager
def several_hosts(
    folder: Path,
    kv: str | None = None,
    weights: str | None = None,
    *,
    nodes: int = 2,
    models: Sequence[str] = TINY_MODELS,
    flags: Sequence[str] = (),
) -> Iterator[SeveralHosts]:
    """The hosts, ready."""
    with (
        network(nodes) as bed,
        contextlib.closing(
            SeveralHosts(bed, folder, kv, weights, nodes=nodes, models=models, flags=flags)
        ) as hosts,
    ):
        for node in reversed(hosts.nodes):
            hosts.start(node)
        hosts.wait_ready()
        yield hosts


def said_by_one_host(server: Server) -> dict[str, list[list[int]]]:
    """The tokens of each model for the prompts."""
    found: dict[str, list[list[int]]] = {}
    for model in TINY_MODELS:
        for prompt in PROMPTS:
            body = {"input_ids": prompt, "sampling_params": PARAMETERS}
            status, answer = server.post(f"/m/{model}/generate", body)
            assert status == 200
            found.setdefault(model, []).append(answer["output_ids"])
    return found


def process_of(title: str, launcher: int) -> psutil.Process:
    """Returns the process below a launcher whose title has the text; there is one."""
    found = [
        process
        for process in psutil.Process(launcher).children(recursive=True)
        if title in " ".join(process.cmdline())
    ]
    assert len(found) == 1, (title, found)
    return found[0]
