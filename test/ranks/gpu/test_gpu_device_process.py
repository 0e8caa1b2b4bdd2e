"""Real device processes on GPUs, driven as the scheduler drives them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import crosspool
import pytest

pytest.importorskip("msgspec", reason="msgspec is not installed (the messages of a step)")
pytest.importorskip("zmq", reason="pyzmq is not installed (the control path)")
pytest.importorskip("setproctitle", reason="setproctitle is not installed")

from crosspool.kernels import nvshmem
from support.shallow import shallow

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


def run(
    models: list[Path], kv: str, weights: Sequence[str], loop: str, **fields: str
) -> list[list[int]]:
    sequences = generations(1)
    with DeviceDriver(
        models,
        kv=[kv],
        weights=weights,
        loop=loop,
        kv_pool_bytes=256 << 20,
        ready_timeout=300.0,
        **fields,
    ) as driver:
        driver.generate(sequences)
        pools = driver.inspect(kv, "pools")
        assert pools["free_bytes"] == pools["budget_bytes"]
        assert set(driver.shutdown().values()) == {0}
    return [sequence.output for sequence in sequences]


@pytest.fixture(scope="module")
def expected(models: list[Path]) -> list[list[int]]:
    return run(models, "cpu", ["cpu"], "host")


@pytest.mark.parametrize("loop", ["host", "resident"])
def test_greedy_tokens_equal_the_cpus(
    models: list[Path], expected: list[list[int]], loop: str
) -> None:
    assert run(models, "cuda:0", ["cuda:0"], loop) == expected


@pytest.mark.parametrize("how", ["host", "resident", "resident, NVSHMEM"])
@pytest.mark.parametrize(
    ("weights", "parallel"), [(["cuda:1"], "tp"), (["cuda:0", "cuda:1"], "ep")]
)
def test_two_gpus_give_the_cpus_tokens(
    models: list[Path], expected: list[list[int]], weights: list[str], parallel: str, how: str
) -> None:
    """The FFN parts on another GPU, or half of the experts there and half beside attention."""
    import torch

    if torch.cuda.device_count() < 2:
        pytest.skip("needs two NVIDIA GPUs")
    loop, _, carried = how.partition(", ")
    if carried:
        try:
            nvshmem.library()
        except ImportError as error:
            pytest.skip(str(error))
    links = "nvshmem" if carried else "peer"
    found = run(models, "cuda:0", weights, loop, ffn_parallel=parallel, gpu_links=links)
    assert found == expected
