"""``crosspool simulate``, as a user calls it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from crosspool.cli.main import run
from support.server import DEMO

COSTS: dict[str, Any] = {
    "source": "the test",
    "models": {
        "*": {
            "layers": 4,
            "attention": [[1, 0.001], [512, 0.01]],
            "decode_read": 1e-8,
            "chunk_read": 1e-9,
            "ffn": [[1, 0.002], [512, 0.02]],
            "head": [[1, 0.0005]],
        }
    },
    "wake_bytes_per_s": 1e9,
}
FILE = f"""
models:
- {{path: {DEMO / "tiny-qwen3-moe"}, name: small}}
- {{path: Qwen3-30B-A3B}}
kv_pool_devices: ["cuda:0"]
weight_pool_devices: ["cuda:1", "cuda:2"]
kv_pool_bytes: 4GiB
"""


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str]:
    deployment, costs = tmp_path / "deployment.yaml", tmp_path / "costs.json"
    deployment.write_text(FILE)
    costs.write_text(json.dumps(COSTS))
    return str(deployment), str(costs)


def simulate(files: tuple[str, str], *words: str) -> int:
    return run("simulate", [files[0], "--costs", files[1], *words])


LOAD = ("--rate", "3", "--requests", "30", "--dataset", "random:prompt=60,output=20")


def test_the_same_seed_gives_the_same_figures(
    files: tuple[str, str], capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    printed = []
    for seed in ("1", "1", "2"):
        assert simulate(files, *LOAD, "--seed", seed, "--json") == 0
        printed.append(capfdbinary.readouterr().out)
    assert printed[0] == printed[1] != printed[2]
    told = json.loads(printed[0])
    assert set(told["models"]) == {"small", "Qwen3-30B-A3B"}
    assert sum(model["requests"] for model in told["models"].values()) == 30
    assert told["all"]["output_tokens"] == 30 * 20
    assert 0.002 < told["all"]["tbt"]["p50"] < told["all"]["ttft"]["p99"] < 1
    assert set(told["utilisation"]) == {"cuda:0", "cuda:1", "cuda:2"}


def test_tables_and_a_plot(
    files: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plot = tmp_path / "cdf.svg"
    words = ("--lose", "cuda:1@2+1", "--shared-prefix", "32", "--plot", str(plot))
    assert simulate(files, *LOAD, *words) == 0
    told = capsys.readouterr().out
    assert "small" in told and "Qwen3-30B-A3B" in told and "costs: the test" in told
    assert plot.read_text().startswith("<?xml")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--rate", "0", "--requests", "3"), "--rate"),
        ((), "no load: give --rate, or --trace FILE"),
        (("--rate", "1", "--lose", "cuda:1"), "write DEVICE@SECONDS+SECONDS"),
        (("--rate", "1", "--lose", "cuda:7@1+1"), "there is no such device, only cuda:0"),
        (("--rate", "1", "--shared-prefix", "-1"), "--shared-prefix -1: must be from 0"),
        (("--rate", "1", "--plot", "cdf.pdf"), "must end in .svg or .png"),
        (("--rate", "1", "--popularity", "law"), "law"),
    ],
)
def test_mistakes_in_flags(
    files: tuple[str, str],
    words: tuple[str, ...],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert simulate(files, *words) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"wake_bytes_per_s": 0}, "wake_bytes_per_s must be above 0"),
        ({"models": {}}, "there is no model 'small'"),
        ({"speed": 1}, "unknown field `speed`"),
        ({"host": {"turn": -1}}, "host.turn must be seconds, 0 or more"),
        (
            {"models": {"*": {**COSTS["models"]["*"], "ffn": [[2, 1], [1, 1]]}}},
            "models.*.ffn: tokens must be above 0, and ascend",
        ),
        ({"models": {"*": {**COSTS["models"]["*"], "head": []}}}, "models.*.head needs one point"),
    ],
)
def test_mistakes_in_a_cost_table(
    files: tuple[str, str],
    change: dict[str, Any],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    Path(files[1]).write_text(json.dumps(COSTS | change))
    assert simulate(files, *LOAD) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("kv_pool_bytes: 4GiB", "", "kv_pool_bytes is missing"),
        ("path: Qwen3-30B-A3B", "path: Qwen3-31B-A3B", "neither in the catalogue"),
        ("path: Qwen3-30B-A3B", "path: Qwen3-30B-A3B, name: small", "two models are named 'small'"),
        ("kv_pool_bytes: 4GiB", "kv_pool_bytes: 1KiB", "kv_pool_bytes"),
    ],
)
def test_mistakes_in_a_deployment(
    files: tuple[str, str], old: str, new: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path(files[0]).write_text(FILE.replace(old, new))
    assert simulate(files, *LOAD) == 2
    assert message in capsys.readouterr().err
