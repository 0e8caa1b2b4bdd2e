"""GPUs as ``nvidia-smi`` lists them."""

from pathlib import Path

import pytest
from crosspool.config.device import Device
from crosspool.config.errors import ConfigError
from crosspool.config.gpu import gpu_of, visible_gpus
from support.gpus import pretend_gpus


def test_gpus_in_the_order_of_the_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pretend_gpus(monkeypatch, tmp_path, 80000, 70000, 60000)
    everything = visible_gpus({})
    assert [gpu.free_bytes >> 20 for gpu in everything] == [80000, 70000, 60000]
    chosen = visible_gpus({"CUDA_VISIBLE_DEVICES": "2, GPU-00000000,9,1"})
    assert [gpu.free_bytes >> 20 for gpu in chosen] == [60000, 80000]
    assert gpu_of(Device("cuda:1"), chosen).uuid == "GPU-00000000"
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": ""}) == []


def test_a_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pretend_gpus(monkeypatch, tmp_path, 80000)
    with pytest.raises(ConfigError, match=r"cuda:1: 1 GPU\(s\) are visible.*cuda:0 Pretended H100"):
        gpu_of(Device("cuda:1"), visible_gpus())


def test_no_driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pretend_gpus(monkeypatch, tmp_path, 1, status=9)
    with pytest.raises(ConfigError, match="nvidia-smi failed with 9: no driver"):
        visible_gpus()
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ConfigError, match="nvidia-smi is not found"):
        visible_gpus()
