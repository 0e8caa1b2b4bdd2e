"""Device processes that cannot start or go on: their messages and exit statuses."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from crosspool.config.deployment import Deployment, ModelConfig, save
from crosspool.config.device import Device
from crosspool.transport.messages import Failed, Row, Step
from make_random_checkpoint import make_random_checkpoint
from safetensors.torch import load_file, save_file
from support.marks import slow_but

from benchmark.device_driver import DeviceDriver, DeviceFailed, Generation

FIRST, SECOND = (f"cpu:{pick(os.sched_getaffinity(0))}" for pick in (min, max))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_random_checkpoint(
        "qwen3_moe",
        tmp_path_factory.mktemp("checkpoints") / "qwen",
        {"num_hidden_layers": 2},
        "float32",
        seed=1,
    )


def test_a_step_for_an_unknown_request_ends_the_process_with_its_cause(checkpoint: Path) -> None:
    with DeviceDriver([checkpoint], kv=[FIRST], weights=[FIRST]) as driver:
        row = Row(request=99, start=0, tokens=[1], pages=[0], sample=True)
        driver.send(FIRST, Step(step=1, model=0, map_chunks=[0], opens=[], rows=[row]))
        _, message = driver.receive()
        assert isinstance(message, Failed)
        assert "request 99" in message.message
        assert driver.processes[FIRST].wait(10) == 1
        assert "Traceback" in driver.log(FIRST)


@pytest.mark.skipif(FIRST == SECOND, reason="needs two cores")
@pytest.mark.parametrize("loop", slow_but(["resident"], ["host", "resident"]))
def test_a_device_need_not_wait_for_a_step_whose_peer_is_dead(loop: str, checkpoint: Path) -> None:
    with DeviceDriver([checkpoint], kv=[FIRST], weights=[SECOND], loop=loop) as driver:
        driver.generate([Generation(0, [1, 2, 3], 2)])
        driver.processes[SECOND].kill()
        driver.processes.pop(SECOND).wait()
        driver.step([Generation(0, [4, 5], 8)])
        time.sleep(0.2)
        began = time.monotonic()
        assert driver.shutdown(drain=False) == {FIRST: 0}
        assert time.monotonic() - began < 20


def failure(driver: type[DeviceDriver], *args: Any, **fields: Any) -> Failed:
    with pytest.raises(DeviceFailed) as caught:
        driver(*args, **fields)
    return caught.value.failed


class LoggingDriver(DeviceDriver):
    """Keeps exit statuses and logs of processes that never became ready."""

    outcome: tuple[int, str] = (0, "")

    def close(self) -> None:
        for name, process in self.processes.items():
            try:
                LoggingDriver.outcome = (process.wait(10), self.log(name))
            except subprocess.TimeoutExpired:
                LoggingDriver.outcome = (-1, self.log(name))
        super().close()


def test_a_missing_tensor_is_the_users_error(checkpoint: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in checkpoint.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    tensors = load_file(broken / "model.safetensors")
    missing = "model.layers.1.mlp.experts.2.up_proj.weight"
    del tensors[missing]
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    failed = failure(LoggingDriver, [broken], kv=[FIRST], weights=[FIRST])
    assert missing in failed.message
    status, log = LoggingDriver.outcome
    assert status == 2
    assert missing in log
    assert "Traceback" not in log


def test_weights_that_do_not_fit_are_the_users_error(checkpoint: Path) -> None:
    failed = failure(
        LoggingDriver, [checkpoint], kv=[FIRST], weights=[FIRST], weight_pool_bytes=1 << 10
    )
    assert "weight_pool_bytes" in failed.message
    assert LoggingDriver.outcome[0] == 2


@pytest.mark.parametrize(("incarnation", "status"), [(1, 2), (2, 1)])
def test_too_little_memory_is_the_users_error_at_the_first_start_alone(
    checkpoint: Path, tmp_path: Path, incarnation: int, status: int
) -> None:
    """The first process of a device has had the memory, so that a later one may get it again."""
    deployment = Deployment(
        models={0: ModelConfig(name="model", path=str(checkpoint))},
        next_model=1,
        kv_pool_devices=(Device(FIRST),),
        weight_pool_devices=(Device(FIRST),),
        runtime_dir=str(tmp_path),
        kv_pool_bytes=1 << 44,
        weight_pool_bytes=1 << 28,
        chunk_bytes=1 << 33,
        loop="host",
    )
    save(deployment)
    ended = subprocess.run(
        [
            *[sys.executable, "-m", "crosspool.ranks.device_process"],
            *["--deployment", str(deployment.file), "--device", FIRST],
            *["--incarnation", str(incarnation)],
        ],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.returncode == status
    assert "kv_pool_bytes" in ended.stderr and "make the KV pool smaller" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_gpu_that_torch_does_not_see_is_refused(checkpoint: Path) -> None:
    gpus = torch.cuda.device_count()
    device = f"cuda:{gpus}"
    why = rf"torch sees {gpus} GPU" if torch.backends.cuda.is_built() else "built without CUDA"
    with pytest.raises(DeviceFailed, match=rf"device {device}: .*{why}"):
        DeviceDriver([checkpoint], kv=[device], weights=[device])


def test_an_unknown_isa_path_is_the_users_error(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CROSSPOOL_CPU_ISA", "avx3")
    failed = failure(LoggingDriver, [checkpoint], kv=[FIRST], weights=[FIRST])
    assert "CROSSPOOL_CPU_ISA must be one of portable" in failed.message
    status, log = LoggingDriver.outcome
    assert status == 2
    assert "Traceback" not in log
