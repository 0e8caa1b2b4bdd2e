"""A real device process on a GPU, driven as the scheduler drives it."""

from __future__ import annotations

from pathlib import Path

import crosspool
import pytest

pytest.importorskip("msgspec", reason="msgspec is not installed (the messages of a step)")
pytest.importorskip("zmq", reason="pyzmq is not installed (the control path)")
pytest.importorskip("setproctitle", reason="setproctitle is not installed")

from support.triton_device import shallow

from benchmark.device_driver import DeviceDriver, Generation

pytestmark = pytest.mark.gpu

DEMO = Path(crosspool.__file__).parent / "demo"
NAMES = ("tiny-qwen3-moe", "tiny-deepseek-v2", "tiny-glm4-moe-lite")
PROMPTS = 20


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The bundled models in float32."""
    folder = tmp_path_factory.mktemp("float32")
    return [shallow(DEMO / name, folder / name, dtype="float32") for name in NAMES]


def generations(seed: int) -> list[Generation]:
    import torch

    generator = torch.Generator().manual_seed(seed)
    return [
        Generation(
            model,
            torch.randint(6, 2000, (5 + 7 * number,), generator=generator).tolist(),
            new_tokens=24,
            chunk=64,
        )
        for model in range(len(NAMES))
        for number in range(PROMPTS)
    ]


def run(models: list[Path], device: str, loop: str) -> list[list[int]]:
    sequences = generations(1)
    with DeviceDriver(
        models,
        kv=[device],
        weights=[device],
        loop=loop,
        kv_pool_bytes=256 << 20,
        ready_timeout=300.0,
    ) as driver:
        driver.generate(sequences)
        pools = driver.inspect(device, "pools")
        assert pools["free_bytes"] == pools["budget_bytes"]
        assert set(driver.shutdown().values()) == {0}
    return [sequence.output for sequence in sequences]


@pytest.mark.parametrize("loop", ["host", "resident"])
def test_greedy_tokens_equal_the_cpus(models: list[Path], loop: str) -> None:
    assert run(models, "cuda:0", loop) == run(models, "cpu", "host")
