"""Runs SGLang's own engine on the CPU: its scheduler, model code and processes, on PyTorch's
kernels.

SGLang's CPU kernels (``sgl-kernel`` built for the CPU) are in no package index. Without AMX SGLang
imports them and calls PyTorch. So a package of that name stands in for them, and every function in
it raises NotImplementedError. A step ends when every sequence's next token has come out of the
engine.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import os
import sys
import time
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from crosspool.frontend import compat

from benchmark.peers import protocol

LONGEST = 8192
MOST_SEQUENCES = 8
KV_TOKENS = 20_000
SPARE = 4
"""Tokens that a sequence may still lack when the last step is counted."""


class Missing:
    """A name of a package that is not installed."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> Missing:
        if name.startswith("__"):
            raise AttributeError(name)
        return Missing(f"{self._name}.{name}")

    def __call__(self, *_: object, **__: object) -> None:
        raise NotImplementedError(self._name)


class MissingPackage(types.ModuleType):
    def __getattr__(self, name: str) -> Missing:
        if name.startswith("__"):
            raise AttributeError(name)
        return Missing(f"{self.__name__}.{name}")


class MissingKernels(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports ``sgl_kernel`` and its modules as packages of missing names."""

    def find_spec(self, fullname: str, *_: object) -> importlib.machinery.ModuleSpec | None:
        if fullname.partition(".")[0] != "sgl_kernel":
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return MissingPackage(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


class SGLangEngine:
    def __init__(self, checkpoint: Path, threads: int, cores: list[int]) -> None:
        compat.install()
        from sglang.srt.entrypoints.engine import Engine

        self._threads = threads
        self._engine = Engine(
            model_path=str(checkpoint),
            device="cpu",
            dtype="bfloat16",
            attention_backend="torch_native",
            sampling_backend="pytorch",
            disable_overlap_schedule=True,
            disable_cuda_graph=True,
            disable_radix_cache=True,
            max_total_tokens=KV_TOKENS,
            # Without it SGLang keeps about 13 GB of the memory free beside the KV cache, and finds
            # no room for the cache where other programs hold the rest.
            mem_fraction_static=0.99,
            max_running_requests=MOST_SEQUENCES,
            chunked_prefill_size=LONGEST,
            context_length=LONGEST,
            skip_tokenizer_init=True,
            log_level="warning",
        )
        config = self._engine.tokenizer_manager.model_config
        self.vocabulary = config.vocab_size
        self._tokens: Iterator[dict[str, Any]] = iter(())

    def about(self) -> protocol.Message:
        import sglang

        return {
            "engine": "sglang",
            "version": sglang.__version__,
            "threads": self._threads,
            "dtype": "bfloat16",
            "kernels": "PyTorch (no sgl-kernel)",
        }

    def start(self, prompts: Sequence[Sequence[int]], steps: int) -> Callable[[], list[int]]:
        self._begin(prompts, steps + SPARE)
        tokens: list[list[int]] = [[] for _ in prompts]
        # the first token comes with the prompt
        ready = 0

        def forward() -> None:
            output = next(self._tokens)
            tokens[output.get("index", 0)] = output["output_ids"]  # all so far

        def step() -> list[int]:
            nonlocal ready
            ready += 1
            while min(map(len, tokens)) < ready:
                forward()
            return [sequence[ready - 1] for sequence in tokens]

        while not all(tokens):
            forward()
        return step

    def prefill(self, prompt: Sequence[int]) -> None:
        self._begin([prompt], 1)
        for _ in self._tokens:
            pass

    def cpu_seconds(self) -> float:
        """Return the CPU time of this process and of those that it started."""
        return sum(time.clock_gettime(_cpu_clock(pid)) for pid in _family(os.getpid()))

    def _begin(self, prompts: Sequence[Sequence[int]], tokens: int) -> None:
        for _ in self._tokens:  # the rest of the earlier requests
            pass
        self._tokens = self._engine.generate(
            input_ids=[list(prompt) for prompt in prompts],
            sampling_params={"max_new_tokens": tokens, "temperature": 0.0, "ignore_eos": True},
            stream=True,
        )


def _family(pid: int) -> Iterator[int]:
    yield pid
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            yield from _family(int(child))


def _cpu_clock(pid: int) -> int:
    """Return the clock of a process's CPU time, as clock_getcpuclockid(3) does. The times in /proc
    have ticks of 10 ms."""
    return ~pid << 3 | 2


def load(checkpoint: Path, threads: int, cores: list[int]) -> SGLangEngine:
    return SGLangEngine(checkpoint, threads, cores)


if __name__ in ("__main__", "__mp_main__"):  # also in processes that SGLang starts
    os.environ["SGLANG_USE_CPU_ENGINE"] = "1"
    sys.meta_path.insert(0, MissingKernels())
if __name__ == "__mp_main__":
    compat.install()
if __name__ == "__main__":
    protocol.serve(load)
