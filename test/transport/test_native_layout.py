"""The lane protocol's header and shared_memory.py put everything in the same place."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from crosspool.config.device import Device
from crosspool.transport import shared_memory
from crosspool.transport.data_path import DispatchHeader
from crosspool.transport.shared_memory import SharedMemoryTransport
from support.headers import COMPILER, assert_holds
from support.linked_devices import deployment_of


@pytest.mark.parametrize("lanes", [1, 3])
@pytest.mark.parametrize("row_bytes", [100, 4096])
@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
def test_links_lie_where_the_header_says(lanes: int, row_bytes: int, tmp_path: Path) -> None:
    kv, weights = ("cpu:0", "cpu:1"), ("cpu:1", "cpu:2", "cpu:3")
    deployment = deployment_of(kv, weights, lanes=lanes)
    fd = shared_memory.create(deployment, row_bytes)
    try:
        transport = SharedMemoryTransport(fd, deployment, Device("cpu:0"))
    finally:
        os.close(fd)
    base = transport.doorbell_address - 64
    claims = [f"constexpr SegmentLayout layout{{4, {lanes}, 16, {row_bytes}, 3}};"]
    for pair, ffn_rank in enumerate((0, 1, 2)):
        for lane in range(lanes):
            offset = transport.attention_place(lane, ffn_rank).address - base
            claims.append(f"static_assert(layout.link({pair}, {lane}) == {offset});")
    assert_holds(claims, tmp_path, "crosspool/lanes.h")
    link = transport.attention_link(0, 0)
    hidden = torch.arange(2 * 25, dtype=torch.float32).view(2, 25)
    link.dispatch(DispatchHeader(epoch=7, model=3, layer=5, rows=2), hidden)
    memory = transport._memory
    begin = transport.attention_place(0, 0).address - base
    words = torch.frombuffer(memory, dtype=torch.int32, count=64, offset=begin).tolist()
    # The offsets that lanes.h asserts: signals at 0 and 128, headers at 64 and 192, payload at 256.
    assert words[:2] == [1, 0]
    assert words[16:22] == [7, 0, 3, 5, 2, 100]
    assert words[32:34] == [0, 0]
    payload = torch.frombuffer(memory, dtype=torch.float32, count=50, offset=begin + 256)
    assert payload.tolist() == hidden.flatten().tolist()
