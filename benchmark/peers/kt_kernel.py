"""Runs KTransformers' kt-kernel: MoE layers alone, with the checkpoint's weights in bf16.

``repeats`` in the request ``moe`` counts layers, taken one after another through the model, each
with new random experts for every row. ``moe_error`` compares the first layer with PyTorch in
float32.

Workers spin, and so does the thread that hands them tasks. On one core they would take it from each
other, ten milliseconds at a time. So only the workers are on the given cores; other threads are on
the remaining cores, if there are any.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from benchmark.peers import protocol

LONGEST = 512
"""Most rows of a layer."""
WARM_UP = 32
"""Number of first layers that are not counted."""


class KTKernel:
    def __init__(self, checkpoint: Path, threads: int, cores: list[int]) -> None:
        import torch
        from kt_kernel import kt_kernel_ext
        from safetensors import safe_open

        torch.set_num_threads(threads)
        self._kt: Any = kt_kernel_ext
        config = json.loads((checkpoint / "config.json").read_text())
        self._experts = config["num_experts"]
        self._top_k = config["num_experts_per_tok"]
        self._hidden = config["hidden_size"]
        self._intermediate = config["moe_intermediate_size"]
        workers = self._kt.WorkerPoolConfig()
        workers.subpool_count = 1
        workers.subpool_numa_map = [0]
        workers.subpool_thread_count = [threads]
        self._threads = threads
        self._cpu = self._kt.CPUInfer(workers)
        _keep_apart(cores)
        self._no_gpu = torch.zeros(self._experts, dtype=torch.bool)
        self._order = torch.arange(self._experts)
        index = json.loads((checkpoint / "model.safetensors.index.json").read_text())["weight_map"]
        self._layers = []
        self._first: list[list[torch.Tensor]] = []
        for layer in range(config["num_hidden_layers"]):
            names = [
                [
                    f"model.layers.{layer}.mlp.experts.{expert}.{part}_proj.weight"
                    for expert in range(self._experts)
                ]
                for part in ("gate", "up", "down")
            ]
            files = {
                file: safe_open(checkpoint / file, "pt")
                for file in {index[name] for part in names for name in part}
            }
            weights = [[files[index[name]].get_tensor(name) for name in part] for part in names]
            self._layers.append(self._layer(layer, weights))
            self._first = self._first or weights

    def about(self) -> protocol.Message:
        import kt_kernel

        return {
            "engine": "kt-kernel",
            "version": kt_kernel.__version__,
            "variant": kt_kernel.__cpu_variant__,
            "threads": self._threads,
            "dtype": "bf16",
        }

    def moe(self, batch: int, layers: int) -> list[float]:
        """Return the microseconds of each layer."""
        inputs = [self._inputs(batch, seed) for seed in range(WARM_UP + layers)]
        microseconds = []
        for number, (x, experts, weights, y) in enumerate(inputs):
            start = time.perf_counter()
            self._forward(number % len(self._layers), x, experts, weights, y)
            microseconds.append(1e6 * (time.perf_counter() - start))
        return microseconds[WARM_UP:]

    def error(self, batch: int) -> float:
        """Return the norm of the first layer's difference from float32, divided by its norm."""
        import torch

        x, experts, weights, y = self._inputs(batch, 0)
        self._forward(0, x, experts, weights, y)
        expected = torch.zeros(batch, self._hidden)
        gate, up, down = ([w.float() for w in part] for part in self._first)
        for row in range(batch):
            for expert, weight in zip(experts[row].tolist(), weights[row].tolist(), strict=True):
                wide = x[row].float()
                inner = torch.nn.functional.silu(gate[expert] @ wide) * (up[expert] @ wide)
                expected[row] += weight * (down[expert] @ inner)
        return float((y.float() - expected).norm() / expected.norm())

    def _layer(self, number: int, weights: list[list[Any]]) -> Any:
        config = self._kt.moe.MOEConfig(
            self._experts, self._top_k, self._hidden, self._intermediate, self._no_gpu.data_ptr()
        )
        config.layer_idx = number
        config.pool = self._cpu.backend_
        config.max_len = LONGEST
        gate, up, down = ([[tensor.data_ptr() for tensor in part]] for part in weights)
        config.gate_projs, config.up_projs, config.down_projs = gate, up, down
        unscaled = [[0] * self._experts]
        config.gate_scales = config.up_scales = config.down_scales = unscaled
        layer = self._kt.moe.AMXBF16_MOE(config)  # AVX512-BF16 in the variant without AMX
        self._cpu.submit(layer.load_weights_task(self._order.data_ptr()))
        self._cpu.sync()
        return layer

    def _inputs(self, batch: int, seed: int) -> tuple[Any, Any, Any, Any]:
        import torch

        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(batch, self._hidden, generator=generator).bfloat16()
        scores = torch.rand(batch, self._experts, generator=generator)
        experts = scores.topk(self._top_k).indices
        weights = torch.rand(batch, self._top_k, generator=generator)
        return x, experts, weights / weights.sum(-1, keepdim=True), torch.zeros_like(x)

    def _forward(self, layer: int, x: Any, experts: Any, weights: Any, y: Any) -> None:
        import torch

        rows = torch.tensor([len(x)], dtype=torch.int32)
        pointers = (experts.data_ptr(), weights.data_ptr(), x.data_ptr(), y.data_ptr())
        task = self._layers[layer].forward_task(rows.data_ptr(), self._top_k, *pointers, False)
        self._cpu.submit(task)
        self._cpu.sync()


def _keep_apart(cores: list[int]) -> None:
    others = os.sched_getaffinity(os.getppid()) - set(cores) or set(cores)
    for task in Path("/proc/self/task").iterdir():
        works = (task / "comm").read_text().startswith("numa_")
        os.sched_setaffinity(int(task.name), cores if works else others)


def load(checkpoint: Path, threads: int, cores: list[int]) -> KTKernel:
    return KTKernel(checkpoint, threads, cores)


if __name__ == "__main__":
    protocol.serve(load)
