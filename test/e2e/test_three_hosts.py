"""One deployment over three hosts, which are network namespaces: the KV pool on node 0, the weight
pool on the two others, which share every layer."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from support.server import TINY_MODELS, Server
from support.several_hosts import PROMPTS, said_by_one_host, several_hosts


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["tp", "ep"])
def test_tokens_are_those_of_one_host(parallel: str, server: Server, tmp_path: Path) -> None:
    cores = sorted(os.sched_getaffinity(0))
    weights = f"node1/cpu:{cores[-1]},node2/cpu:{cores[0]}"
    flags = ("--ffn-parallel", parallel)
    expected = said_by_one_host(server)
    with several_hosts(
        tmp_path, kv=f"cpu:{cores[0]}", weights=weights, nodes=3, flags=flags
    ) as hosts:
        assert [device["node"] for device in hosts.devices()] == [0, 1, 2]
        for model in TINY_MODELS:
            tokens = [hosts.generate(model, prompt) for prompt in PROMPTS]
            assert tokens == expected[model], hosts.log
        for node in (1, 2):
            listening = hosts.bed.run(node, "ss", "-Hltn").split()
            assert f"{hosts.bed.address(node)}:{int(hosts.control) + 1 + node}" in listening
