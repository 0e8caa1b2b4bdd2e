"""The exchange of test_peer_memory with the real driver: processes on one GPU map each other's
memory."""

from __future__ import annotations

import pytest
import torch


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
@pytest.mark.parametrize("weights", [("cuda:1",), ("cuda:1", "cuda:2")], ids=["two", "three"])
def test_processes_on_one_gpu_reach_each_others_memory(tmp_path, weights):
    pytest.importorskip("msgspec")
    from transport.test_peer_memory import exchange_with_peers

    exchange_with_peers(tmp_path, weights, real=True)
