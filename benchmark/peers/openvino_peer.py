"""Runs OpenVINO's CPU plugin on a model exported by optimum-intel, with weights, arithmetic and KV
cache in bf16 and one stream. Only the last token's logits are computed, as in OpenVINO GenAI."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmark.peers import protocol


def export_path(checkpoint: Path) -> Path:
    return checkpoint.with_name(f"{checkpoint.name}.openvino")


def export(checkpoint: Path) -> None:
    """Write the checkpoint in OpenVINO's format, beside it."""
    import torch
    from optimum.intel import OVModelForCausalLM

    part = checkpoint.with_name(f"{checkpoint.name}.openvino.{os.getpid()}")
    model = OVModelForCausalLM.from_pretrained(
        checkpoint, export=True, load_in_8bit=False, compile=False, torch_dtype=torch.bfloat16
    )
    model.save_pretrained(part)
    shutil.rmtree(export_path(checkpoint), ignore_errors=True)
    part.rename(export_path(checkpoint))


class OpenVINOEngine:
    def __init__(self, checkpoint: Path, threads: int) -> None:
        folder = export_path(checkpoint)
        if not (folder / "openvino_model.xml").is_file():
            # in a process of its own, whose memory and threads the engine does not keep
            command = [sys.executable, "-m", "benchmark.peers.openvino_peer", str(checkpoint)]
            subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
        import openvino

        core = openvino.Core()
        model = core.read_model(folder / "openvino_model.xml")
        self.vocabulary = int(model.output("logits").partial_shape[2].get_length())
        _last_logits_only(model)
        self._model = core.compile_model(
            model,
            "CPU",
            {
                "INFERENCE_NUM_THREADS": threads,
                "INFERENCE_PRECISION_HINT": "bf16",
                "KV_CACHE_PRECISION": "bf16",
                "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
                "PERFORMANCE_HINT": "LATENCY",
                "NUM_STREAMS": 1,
            },
        )
        self._inputs = {name.get_any_name() for name in self._model.inputs}

    def about(self) -> protocol.Message:
        import openvino

        names = ("INFERENCE_NUM_THREADS", "INFERENCE_PRECISION_HINT", "KV_CACHE_PRECISION")
        chosen = {name.lower(): str(self._model.get_property(name)) for name in names}
        return {"engine": "OpenVINO", "version": openvino.__version__, **chosen}

    def start(self, prompts: Sequence[Sequence[int]], steps: int) -> Callable[[], list[int]]:
        import numpy as np

        request = self._model.create_infer_request()
        rows = np.array(prompts, np.int64)
        count, past = len(rows), 0

        def read(ids: Any) -> Any:
            nonlocal past
            end = past + ids.shape[1]
            values = {
                "input_ids": ids,
                "attention_mask": np.ones((count, end), np.int64),
                "position_ids": np.tile(np.arange(past, end), (count, 1)),
                "beam_idx": np.arange(count, dtype=np.int32),
            }
            request.infer({name: values[name] for name in self._inputs})
            past = end
            return request.get_tensor("logits").data[:, -1].argmax(-1)[:, None]

        if rows.shape[1] > 1:
            read(rows[:, :-1])
        last = rows[:, -1:]

        def step() -> list[int]:
            nonlocal last
            last = read(last)
            tokens: list[int] = last[:, 0].tolist()
            return tokens

        return step

    def prefill(self, prompt: Sequence[int]) -> None:
        self.start([[*prompt, 0]], 0)


def _last_logits_only(model: Any) -> None:
    """Cut the rows of all tokens but the last before the product with the LM head."""
    from openvino import opset13

    node = model.output("logits").node.input_value(0).node
    while node.get_type_name() != "MatMul":
        node = node.input_value(0).node
    rows = node.input_value(0)
    last = opset13.slice(rows, [-1], [2**31 - 1], [1], [1])
    node.input(0).replace_source_output(last.output(0))
    model.validate_nodes_and_infer_types()


def load(checkpoint: Path, threads: int, cores: list[int]) -> OpenVINOEngine:
    return OpenVINOEngine(checkpoint, threads)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        export(Path(sys.argv[1]))
    else:
        protocol.serve(load)
