"""Runs llama.cpp (``llama-cpp-python``, built for this machine) with bf16 weights and its defaults
for KV cache (f16), flash attention and batch sizes. A step is one ``llama_decode`` and an
argmax."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmark.peers import protocol

LONGEST_READ = 2048
"""Most prompt tokens of one ``llama_decode``."""


def gguf_path(checkpoint: Path) -> Path:
    return checkpoint.with_name(f"{checkpoint.name}.gguf")


class LlamaEngine:
    def __init__(self, checkpoint: Path, threads: int) -> None:
        import llama_cpp

        from benchmark.peers import gguf_file

        path = gguf_path(checkpoint)
        if not path.is_file():
            gguf_file.convert(checkpoint, path)
        self._threads = threads
        self._llama: Any = llama_cpp
        self._llama.llama_backend_init()
        parameters = self._llama.llama_model_default_params()
        parameters.use_mmap = False
        parameters.n_gpu_layers = 0
        self._model = self._llama.llama_model_load_from_file(str(path).encode(), parameters)
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {path}")
        vocabulary = self._llama.llama_model_get_vocab(self._model)
        self.vocabulary = self._llama.llama_vocab_n_tokens(vocabulary)
        self._context: Any = None

    def about(self) -> protocol.Message:
        return {
            "engine": "llama.cpp",
            "version": f"llama-cpp-python {self._llama.__version__}",
            "threads": self._threads,
            "dtype": "bf16 (KV cache f16)",
            "system": self._llama.llama_print_system_info().decode(),
        }

    def start(self, prompts: Sequence[Sequence[int]], steps: int) -> Callable[[], list[int]]:
        count, length = len(prompts), len(prompts[0])
        self._open(count, length + steps)
        for sequence, prompt in enumerate(prompts):
            self._read(prompt[:-1], sequence)
        last = [prompt[-1] for prompt in prompts]
        position = length - 1
        batch = self._llama.llama_batch_init(count, 0, 1)

        def step() -> list[int]:
            nonlocal last, position
            for row, token in enumerate(last):
                self._put(batch, row, token, position, row, logits=True)
            self._run(batch, count)
            position += 1
            last = [int(self._logits(row).argmax()) for row in range(count)]
            return last

        return step

    def prefill(self, prompt: Sequence[int]) -> None:
        self._open(1, len(prompt))
        self._read(prompt, 0, logits=True)

    def losses(self, row: Sequence[int]) -> list[float]:
        import numpy as np

        if len(row) > LONGEST_READ:
            raise ValueError(f"a row has {LONGEST_READ} tokens at most")
        self._open(1, len(row))
        batch = self._llama.llama_batch_init(LONGEST_READ, 0, 1)
        for position, token in enumerate(row):
            self._put(batch, position, token, position, 0, logits=True)
        self._run(batch, len(row))
        self._llama.llama_batch_free(batch)
        found = []
        for position, token in enumerate(row[1:]):
            logits = self._logits(position).astype(np.float64)
            most = logits.max()
            found.append(float(most + np.log(np.exp(logits - most).sum()) - logits[token]))
        return found

    def _logits(self, row: int) -> Any:
        """Return those of a row of the last batch, float32 [vocabulary]; the next one overwrites
        them."""
        import numpy as np

        pointer = self._llama.llama_get_logits_ith(self._context, row)
        return np.ctypeslib.as_array(
            ctypes.cast(pointer, ctypes.POINTER(ctypes.c_float)), (self.vocabulary,)
        )

    def _open(self, sequences: int, length: int) -> None:
        if self._context is not None:
            self._llama.llama_free(self._context)
        parameters = self._llama.llama_context_default_params()
        parameters.n_ctx = sequences * -(-length // 256) * 256  # shared out evenly
        parameters.n_batch = LONGEST_READ
        parameters.n_seq_max = sequences
        parameters.n_threads = parameters.n_threads_batch = self._threads
        self._context = self._llama.llama_init_from_model(self._model, parameters)
        if not self._context:
            raise RuntimeError("llama.cpp cannot make a context")

    def _read(self, tokens: Sequence[int], sequence: int, logits: bool = False) -> None:
        batch = self._llama.llama_batch_init(LONGEST_READ, 0, 1)
        for first in range(0, len(tokens), LONGEST_READ):
            part = tokens[first : first + LONGEST_READ]
            for row, token in enumerate(part):
                ends = logits and first + row == len(tokens) - 1
                self._put(batch, row, token, first + row, sequence, logits=ends)
            self._run(batch, len(part))
        self._llama.llama_batch_free(batch)

    def _put(
        self, batch: Any, row: int, token: int, position: int, sequence: int, *, logits: bool
    ) -> None:
        batch.token[row] = token
        batch.pos[row] = position
        batch.n_seq_id[row] = 1
        batch.seq_id[row][0] = sequence
        batch.logits[row] = logits

    def _run(self, batch: Any, rows: int) -> None:
        batch.n_tokens = rows
        status = self._llama.llama_decode(self._context, batch)
        if status != 0:
            raise RuntimeError(f"llama_decode returned {status}")
        self._llama.llama_synchronize(self._context)


def load(checkpoint: Path, threads: int, cores: list[int]) -> LlamaEngine:
    return LlamaEngine(checkpoint, threads)


if __name__ == "__main__":
    protocol.serve(load)
