"""One deployment over two hosts, whose launchers scripts/cluster/ssh starts over a real sshd."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

import pytest
from support.namespaces import network
from support.server import ROOT, TINY_MODELS, Server
from support.several_hosts import (
    PROMPTS,
    SECONDS,
    SeveralHosts,
    process_of,
    said_by_one_host,
)
from support.ssh_hosts import ssh_hosts

SCRIPT = ROOT / "scripts" / "cluster" / "ssh" / "serve.sh"


@pytest.mark.slow
def test_tokens_are_those_of_one_host(server: Server, tmp_path: Path) -> None:
    """Then a launcher is killed, which ends the other."""
    cores = sorted(os.sched_getaffinity(0))
    expected = said_by_one_host(server)
    names = tmp_path / "hosts.txt"
    with (
        network(2) as bed,
        ssh_hosts(bed, 2, tmp_path) as ssh,
        contextlib.closing(
            SeveralHosts(bed, tmp_path, kv=f"cpu:{cores[0]}", weights=f"node1/cpu:{cores[-1]}")
        ) as hosts,
    ):
        names.write_text("".join(f"{bed.address(node)}\n" for node in hosts.nodes))
        environment = {
            **os.environ,
            "SSH": ssh.command,
            "CROSSPOOL": f"{sys.executable} -m crosspool.cli.main",
            "CROSSPOOL_DIR": str(tmp_path / "keys on hosts"),
            "DIST_INIT_ADDR": hosts.address,
        }
        words = ["bash", str(SCRIPT), str(names), str(hosts.keys), *hosts.options]
        hosts.start_words(0, [*words, "--packed-cache-bytes", "0"], environment)
        hosts.wait_ready()
        for model in TINY_MODELS:
            tokens = [hosts.generate(model, prompt) for prompt in PROMPTS]
            assert tokens == expected[model], hosts.log
        process_of("crosspool::launcher of node 1", ssh.servers[1]).kill()
        assert hosts.launchers[0].wait(SECONDS) == 137, hosts.log
        assert f"node 1 ({bed.address(1)}) has ended with status 137" in hosts.log
        assert "node 0 (" not in hosts.log, "it was told to end"
