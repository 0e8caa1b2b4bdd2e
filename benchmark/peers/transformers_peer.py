"""Runs Transformers on PyTorch: eager, with SDPA attention and experts as grouped products."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmark.peers import protocol


class TransformersEngine:
    def __init__(self, checkpoint: Path, threads: int) -> None:
        import torch

        # a torchvision built for CUDA fails at import beside PyTorch's CPU build, and transformers
        # with it; a model of text does without
        sys.modules["torchvision"] = None  # type: ignore[assignment]
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(threads)
        self._model = AutoModelForCausalLM.from_pretrained(
            checkpoint,
            dtype=torch.bfloat16,
            attn_implementation="sdpa",
            experts_implementation="grouped_mm",
        ).eval()
        self.vocabulary = self._model.config.vocab_size

    def about(self) -> protocol.Message:
        import torch
        import transformers

        config = self._model.config
        return {
            "engine": "transformers",
            "version": transformers.__version__,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "dtype": str(self._model.dtype),
            "attention": config._attn_implementation,
            "experts": config._experts_implementation,
        }

    def start(self, prompts: Sequence[Sequence[int]], steps: int) -> Callable[[], list[int]]:
        import torch
        from transformers import DynamicCache

        cache = DynamicCache(config=self._model.config)

        def read(ids: torch.Tensor) -> torch.Tensor:
            with torch.inference_mode():
                output = self._model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
                chosen: torch.Tensor = output.logits[:, -1].argmax(-1, keepdim=True)
                return chosen

        rows = torch.tensor(prompts)
        if rows.shape[1] > 1:
            read(rows[:, :-1])
        last = rows[:, -1:]

        def step() -> list[int]:
            nonlocal last
            last = read(last)
            return last[:, 0].tolist()

        return step

    def prefill(self, prompt: Sequence[int]) -> None:
        self.start([[*prompt, 0]], 0)


def load(checkpoint: Path, threads: int, cores: list[int]) -> TransformersEngine:
    return TransformersEngine(checkpoint, threads)


if __name__ == "__main__":
    protocol.serve(load)
