"""Runs our engine alone: device processes that get their steps from here, without scheduler and
HTTP."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
import psutil
from crosspool.config.cores import CONTROL_SLICE_NS, DEFAULT_SLICE_NS, set_slice
from crosspool.config.device import Device
from crosspool.models.registry import read_model
from crosspool.models.spec import KVCacheDType, ModelSpec
from crosspool.observability.trace import LaneEvent
from crosspool.transport.messages import StepResult

from benchmark.device_driver import DeviceDriver, Generation

Loop = Literal["host", "resident"]

_ORDINARY = 100
"""First token id that no vocabulary uses for a special token."""
_WARM_STEPS = 4
"""Decode steps of each model before the clock starts."""
_MOST = 4
"""A model that steps faster than another takes at most this multiple of the asked-for steps."""


@dataclass(frozen=True)
class Setup:
    """Placement of models, and the loop that drives them."""

    kv: tuple[str, ...]
    """Devices of the KV pool."""
    weights: tuple[str, ...]
    """Devices of the weight pool."""
    loop: Loop = "resident"
    lanes: int = 2
    lease: int = 32
    """Decode steps that one message covers under the resident loop."""
    chunk: int = 512
    """Most prompt tokens of one step."""
    kv_cache_dtype: KVCacheDType = "auto"

    @property
    def cores(self) -> list[int]:
        names = dict.fromkeys((*self.kv, *self.weights))
        return sorted({core for name in names for core in Device(name).cores})


def one_device(cores: Sequence[int]) -> Setup:
    """Place both pools on one device of ``cores``."""
    name = "cpu:" + "+".join(str(core) for core in cores)
    return Setup((name,), (name,))


def two_devices(attention: int, ffn: int, lanes: int, loop: Loop = "resident") -> Setup:
    """Give each pool a device of one core."""
    return Setup((f"cpu:{attention}",), (f"cpu:{ffn}",), loop, lanes)


@dataclass(frozen=True)
class Parts:
    """Times of one step in microseconds, from the engine's trace."""

    span: float
    """Time from the start of the first part to the end of the last."""
    attention: float
    ffn: float
    lm_head: float
    end_ns: int
    """End of the last part on the monotonic clock."""


@dataclass
class Decoded:
    """Measurements of models that decoded at once."""

    batch: int
    step_ms: list[list[float]]
    """Times from each result to the next, indexed [model][step]."""
    wall_s: float
    cpu_s: float
    """CPU seconds of the device processes and of the thread that drives them."""
    prompt_s: float
    """Seconds before that, for the prompts and the first steps."""
    parts: list[list[Parts]] = field(default_factory=list)
    """Parts of the steps, indexed [model][step]; empty without a trace."""
    dispatch_us: list[float] = field(default_factory=list)
    """Times from the end of an attention part to the start of its FFN part."""
    combine_us: list[float] = field(default_factory=list)
    """Times from the end of an FFN part to the start of the next attention part or LM head."""

    @property
    def all_ms(self) -> list[float]:
        return [ms for model in self.step_ms for ms in model]

    @property
    def tokens_per_s(self) -> float:
        """Tokens per second of all models together."""
        return self.batch * sum(1e3 / float(np.mean(model)) for model in self.step_ms)


class Engine:
    """Models on the device processes of a setup. The processes run from construction to
    ``close``."""

    def __init__(self, checkpoints: Sequence[Path], setup: Setup, tokens: int = 24576) -> None:
        """``tokens`` is what the KV pool holds of the model with the largest KV cache per token."""
        self.setup = setup
        chunk_bytes = 2 << 20
        weights = sum(map(_stored_bytes, checkpoints))
        self._driver = DeviceDriver(
            checkpoints,
            kv=setup.kv,
            weights=setup.weights,
            ready_timeout=600.0,
            page_size=16,
            chunk_bytes=chunk_bytes,
            kv_pool_bytes=_kv_bytes(checkpoints, tokens, chunk_bytes),
            weight_pool_bytes=2 * weights,
            chunked_prefill_size=setup.chunk,
            loop=setup.loop,
            lanes=setup.lanes,
            kv_cache_dtype=setup.kv_cache_dtype,
        )
        self._rng = np.random.default_rng(0)

    @property
    def specs(self) -> list[ModelSpec]:
        return list(self._driver.specs.values())

    def decode(
        self,
        batch: int,
        context: int,
        steps: int,
        models: int | None = None,
        trace: bool = False,
    ) -> Decoded:
        """Decode with ``models`` models at once (None: all), each with ``batch`` requests of
        ``context`` tokens, until each has taken ``steps`` steps."""
        began = time.perf_counter()
        driver = self._driver
        tokens = _WARM_STEPS + _MOST * steps + 3 * self.setup.lease
        groups = [
            [self._generation(model, context, tokens) for _ in range(batch)]
            for model in range(len(driver.specs) if models is None else models)
        ]
        for group in groups:
            for sequence in group:
                self._prompt(sequence)
        self._steps(groups, _WARM_STEPS)
        prompt_s = time.perf_counter() - began
        if trace:
            for device in driver.processes:
                driver.inspect(device, "trace_start")
        cpu, start = self.cpu_seconds(), time.perf_counter()
        set_slice(CONTROL_SLICE_NS)  # as the scheduler has, whose place this thread takes
        try:
            ends = self._steps(groups, steps)
        finally:
            set_slice(DEFAULT_SLICE_NS)
        decoded = Decoded(
            batch=batch,
            step_ms=[[1e3 * (b - a) for a, b in pairwise(times)] for times in ends],
            wall_s=time.perf_counter() - start,
            cpu_s=self.cpu_seconds() - cpu,
            prompt_s=prompt_s,
        )
        if trace:
            self._read_traces(decoded)
        driver.release([sequence for group in groups for sequence in group])
        return decoded

    def prefill(self, tokens: int) -> float:
        """Return the seconds from a prompt's first step to its first token."""
        sequence = self._generation(0, tokens, 1)
        start = time.perf_counter()
        self._prompt(sequence)
        seconds = time.perf_counter() - start
        self._driver.release([sequence])
        return seconds

    def prefill_parts(self, tokens: int) -> Parts:
        """Return the parts of the steps that read one prompt of the first model, added up."""
        driver = self._driver
        for device in driver.processes:
            driver.inspect(device, "trace_start")
        self.prefill(tokens)
        events = [
            msgspec.convert(event, LaneEvent)
            for device in driver.processes
            for event in driver.inspect(device, "trace_stop")
        ]
        took = {
            part: sum(e.end_ns - e.start_ns for e in events if e.part == part) / 1e3
            for part in ("attention", "ffn", "lm_head")
        }
        start, end = min(e.start_ns for e in events), max(e.end_ns for e in events)
        return Parts((end - start) / 1e3, **took, end_ns=end)

    def tokens(self, prompt: Sequence[int], steps: int) -> list[int]:
        """Return the first model's greedy continuation of a prompt."""
        sequence = Generation(0, list(prompt), steps + self.setup.lease, chunk=self.setup.chunk)
        self._prompt(sequence)
        self._steps([[sequence]], steps)
        self._driver.release([sequence])
        return sequence.output[:steps]

    def close(self) -> None:
        self._driver.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _generation(self, model: int, context: int, new_tokens: int) -> Generation:
        vocab = self._driver.specs[model].vocab
        prompt = self._rng.integers(_ORDINARY, vocab, context).tolist()
        return Generation(model, prompt, new_tokens, chunk=self.setup.chunk)

    def _prompt(self, sequence: Generation) -> None:
        while not sequence.output:
            self._step([sequence])
            self._take([sequence])

    def _step(self, group: list[Generation]) -> None:
        self._driver.step(group)

    def _take(self, group: list[Generation]) -> None:
        _, message = self._driver.receive()
        assert isinstance(message, StepResult), message
        self._driver.take(group, message)

    def _steps(self, groups: Sequence[list[Generation]], steps: int) -> list[list[float]]:
        """Step every group until all have ``steps`` results. Returns for each group its start and
        the times of its results."""
        driver = self._driver
        lease = self.setup.lease if self.setup.loop == "resident" else 1
        now = time.perf_counter()
        ends = [[now] for _ in groups]
        flying = {driver.step(group, lease=lease): index for index, group in enumerate(groups)}
        short = len(groups)
        while flying:
            _, message = driver.receive()
            now = time.perf_counter()
            assert isinstance(message, StepResult), message
            index = flying[message.step]
            driver.take(groups[index], message)
            if short:
                ends[index].append(now)
                short -= len(ends[index]) == steps + 1
            if message.more:
                continue
            del flying[message.step]
            if short and len(ends[index]) <= _MOST * steps:
                flying[driver.step(groups[index], lease=lease)] = index
        return ends

    def cpu_seconds(self) -> float:
        """Return the CPU time so far of the device processes and of the thread that drives them."""
        used = time.thread_time()
        for process in self._driver.processes.values():
            times = psutil.Process(process.pid).cpu_times()
            used += times.user + times.system
        return used

    def _read_traces(self, decoded: Decoded) -> None:
        events = [
            msgspec.convert(event, LaneEvent)
            for device in self._driver.processes
            for event in self._driver.inspect(device, "trace_stop")
        ]
        decoded.parts = [steps_of(events, model) for model in range(len(decoded.step_ms))]
        decoded.dispatch_us, decoded.combine_us = hand_overs(events)


def steps_of(events: Sequence[LaneEvent], model: int) -> list[Parts]:
    """Return the parts of each whole step of a model that has one step at a time."""
    own = sorted((e for e in events if e.model == model), key=lambda e: e.start_ns)
    begins = [i for i, e in enumerate(own) if e.part == "attention" and e.layer == 0]
    steps = []
    for begin, end in pairwise(begins):  # what follows the last beginning may not be whole
        took = {"attention": 0, "ffn": 0, "lm_head": 0}
        for part in own[begin:end]:
            took[part.part] += part.end_ns - part.start_ns
        last = own[end - 1].end_ns  # the LM head has several parts
        steps.append(
            Parts(
                (last - own[begin].start_ns) / 1e3,
                took["attention"] / 1e3,
                took["ffn"] / 1e3,
                took["lm_head"] / 1e3,
                last,
            )
        )
    return [step for step in steps if step.attention > 0]


def hand_overs(events: Sequence[LaneEvent]) -> tuple[list[float], list[float]]:
    """Return the microseconds from attention part to FFN part of the same lane and layer, and from
    there to the next attention part or LM head."""
    lanes: dict[tuple[int, int], list[LaneEvent]] = {}
    for event in sorted(events, key=lambda e: e.start_ns):
        lanes.setdefault((event.attention_rank, event.lane), []).append(event)
    there, back = list[float](), list[float]()
    for lane in lanes.values():
        for first, then in pairwise(lane):
            gap = (then.start_ns - first.end_ns) / 1e3
            if first.part == "attention" and then.part == "ffn":
                there.append(gap)
            elif first.part == "ffn" and then.part != "ffn":
                back.append(gap)
    return there, back


def _stored_bytes(checkpoint: Path) -> int:
    """Bytes of a GGUF file, or of the safetensors of a folder."""
    files = [checkpoint] if checkpoint.is_file() else checkpoint.glob("*.safetensors")
    return sum(file.stat().st_size for file in files)


def _kv_bytes(checkpoints: Sequence[Path], tokens: int, chunk_bytes: int) -> int:
    largest = max(read_model(path).kv_bytes_per_token for path in checkpoints)
    return (-(-tokens * largest // chunk_bytes) + len(checkpoints)) * chunk_bytes
