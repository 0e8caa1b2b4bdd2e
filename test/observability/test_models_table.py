"""The table of `crosspool ps`."""

from __future__ import annotations

import io
from typing import Any

import msgspec
from crosspool.config.deployment import Deployment, ModelConfig
from crosspool.config.device import Device
from crosspool.observability.models_table import models_table
from crosspool.transport.inspection import ModelStatus
from rich.console import Console
from test_metrics import MODEL


def model(name: str, **residency: Any) -> ModelStatus:
    status = msgspec.convert(MODEL, ModelStatus, from_attributes=True)
    told = msgspec.structs.replace(status.residency, **residency)
    return msgspec.structs.replace(status, name=name, residency=told)


def shown(models: list[ModelStatus]) -> tuple[dict[str, list[str]], str]:
    """The cells of each row by the model's name, and what stands below them."""
    deployment = Deployment(
        models={n: ModelConfig(name=m.name, path="/x") for n, m in enumerate(models)},
        next_model=len(models),
        kv_pool_devices=(Device("cpu"),),
        weight_pool_devices=(Device("cpu"),),
        kv_pool_bytes=1 << 30,
        weight_pool_bytes=40 << 20,
    )
    console = Console(file=io.StringIO(), width=170)
    console.print(models_table(deployment, models))
    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().splitlines()
    table = [line.replace("┃", "│") for line in lines if line[0] in "│┃"]
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in table]
    return {name: cells for name, *cells in rows}, lines[-1].strip()


def test_every_model_shows_its_state_its_memory_and_its_use() -> None:
    rows, below = shown(
        [
            model("a/with-a-long-name"),
            model("b", state="asleep", idle_seconds=None, failed_wakes=0),
            model("c", state="falling_asleep", idle_seconds=7300.0, last_wake_seconds=1.234),
        ]
    )
    head = rows["model"]
    told = {name: dict(zip(head, cells, strict=True)) for name, cells in rows.items()}
    assert told["a/with-a-long-name"]["state"] == "waking, 25%"
    assert (told["a/with-a-long-name"]["used"], told["a/with-a-long-name"]["wakes"]) == (
        "now",
        "12 (14 failed)",
    )
    assert (
        told["a/with-a-long-name"]["running"],
        told["a/with-a-long-name"]["waiting"],
        told["a/with-a-long-name"]["tokens/s"],
    ) == ("2", "3", "2.5")
    assert (told["b"]["state"], told["b"]["used"]) == ("asleep", "never")
    assert told["b"]["FFN"] == "(13.0 MiB)"  # which it would take
    assert told["c"]["state"] == "falling asleep"
    assert (told["c"]["used"], told["c"]["took"]) == ("2 h ago", "1.23 s")
    assert below == (
        "in memory: FFN weights 26.0 MiB of 40.0 MiB, attention weights 22.0 MiB, "
        "KV cache 12.0 MiB of 1.0 GiB"
    )
