"""The GPU benchmark, driven on CPU tensors where Triton interprets its kernels; and its costs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.packages import installed

from benchmark.gpu import MODELS, cost_table, spec_of

ROOT = Path(__file__).parents[2]
RUN = """
import sys
from support import triton_interpreter
triton_interpreter.repair()
from benchmark.gpu import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.skipif(not installed("triton"), reason="triton is not installed")
def test_a_tiny_model_goes_the_whole_way(tmp_path: Path) -> None:
    small = "--device cpu --tiny --layers 1 --batches 1 --context 3 --tokens 1 --rounds 1"
    path = os.pathsep.join(
        [str(ROOT / "python"), str(ROOT), str(ROOT / "test"), os.environ.get("PYTHONPATH", "")]
    )
    done = subprocess.run(
        [sys.executable, "-c", RUN, *small.split(), "--out", str(tmp_path)],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    names = {row["name"] for row in rows}
    assert {"whole", "host", "host, 2 lanes", "hand-over, host", "stage attention"} <= names
    assert all(row["gpu"] == "CPU, interpreted" for row in rows)
    costs = json.loads((tmp_path / "gpu_costs.json").read_text())
    stages = {stage["stage"]: stage for stage in costs["stages"]}
    # Dense FFN of the bundled DeepSeek: 3 matrices of 128 x 384 in bfloat16.
    assert stages["stage dense FFN"]["bytes"] == 3 * 128 * 384 * 2
    assert costs["launch_us"][0]["us"] > 0
    assert "stage dense FFN" in done.stdout.splitlines()[-2]


@pytest.mark.parametrize("name", MODELS)
def test_shapes_of_the_models_are_found(name: str) -> None:
    spec = spec_of(name)
    assert spec.layers > 20 and spec.dtype == "bfloat16"


def test_costs_of_rows() -> None:
    where = {"layers": 4, "batch": 2, "context": 9}
    rows = [
        {"name": "copy bandwidth", "model": "all", "parameters": {"context": 9}, "median": 3000.0},
        {"name": "whole", "model": "a", "parameters": where, "median": 1.0},
        {"name": "hand-over, resident", "model": "a", "parameters": where, "median": 1.5},
        {
            "name": "stage head", "model": "a", "parameters": where, "median": 2.0,
            "bytes": 10, "bytes_per_s": 5e6,
        },
        {
            "name": "pool map", "model": "all", "median": 40.0,
            "parameters": {"chunk_bytes": 2 << 20, "pattern": "single", "beside": "alone"},
        },
    ]  # fmt: skip
    costs = cost_table(rows, "H100")
    assert costs["copy_bytes_per_s"] == 3e12
    assert costs["hand_over_us"] == [{"loop": "resident", "model": "a", **where, "us": 1.5}]
    assert costs["map_us"] == [
        {"call": "map", "chunk_bytes": 2 << 20, "pattern": "single", "us": 40.0}
    ]
    assert costs["stages"][0]["bytes_per_s"] == 5e6
