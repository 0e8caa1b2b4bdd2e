"""Drives real device processes as the scheduler would: a deployment, its processes, its steps."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import msgspec
import zmq
from crosspool.config import deployment as deployment_module
from crosspool.config.deployment import Deployment, ModelConfig
from crosspool.config.device import Device
from crosspool.config.process import die_with_parent
from crosspool.kvpool.allocator import PageAllocator
from crosspool.kvpool.bounds import Bounds
from crosspool.kvpool.layout import KVLayout
from crosspool.models.registry import spec_of, specs_of
from crosspool.models.spec import KVCacheDType
from crosspool.transport import links
from crosspool.transport.device_socket import identity_of, read_identity
from crosspool.transport.messages import (
    Added,
    AddModel,
    Failed,
    FromDevice,
    Inspect,
    Inspected,
    Logprobs,
    Open,
    Ready,
    Release,
    Removed,
    RemoveModel,
    Row,
    RowResult,
    Sampling,
    Shutdown,
    Sleep,
    Slept,
    Step,
    StepResult,
    ToDevice,
    TokenLogprobs,
    Wake,
    Waking,
    Woken,
    decode_from_device,
    encode,
)

GREEDY = Sampling(temperature=0.0)


@dataclass
class Generation:
    """A request on one attention rank, and its progress."""

    model: int
    prompt: list[int]
    new_tokens: int
    sampling: Sampling = GREEDY
    logprobs: Logprobs = field(default_factory=Logprobs)
    rank: int = 0
    chunk: int = 1 << 30
    """Most prompt tokens of one step."""
    output: list[int] = field(default_factory=list)
    output_logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    request: int = -1
    computed: int = 0
    """Number of its tokens whose KV lies in pages, those in ``shared`` pages included."""
    shared: list[int] = field(default_factory=list)
    """Pages of another sequence that hold the first tokens."""
    pages: list[int] = field(default_factory=list)
    paged: int = 0

    @property
    def done(self) -> bool:
        return len(self.output) >= self.new_tokens


class DeviceDriver:
    """Device processes of a deployment, and the scheduler's side of their control path."""

    def __init__(
        self,
        models: Sequence[Path],
        kv: Sequence[str] = ("cpu:0",),
        weights: Sequence[str] = ("cpu:0",),
        places: Sequence[Sequence[str] | None] | None = None,
        ready_timeout: float = 120.0,
        *,
        loops: Mapping[str, Literal["host", "resident"]] | None = None,
        keep: Sequence[Literal["pinned", "demand", "asleep"]] | None = None,
        experts: Literal["all", "demand"] = "all",
        quantization: Literal["int4", "int8", "fp8"] | None = None,
        kv_cache_dtype: KVCacheDType = "auto",
        **fields: Any,
    ) -> None:
        """``places`` gives for each model the devices of its FFN weights, None for all of
        ``weights``; ``loops`` the loop of single devices where it is not the deployment's; ``keep``
        when each model's weights are in memory, ``experts`` which of their routed experts are then,
        ``quantization`` the format to which they are rounded, and ``kv_cache_dtype`` that of their
        KV cache; ``fields`` further fields of the deployment."""
        self._loops = loops or {}
        self.runtime_dir = Path(tempfile.mkdtemp(prefix="crosspool-test-"))
        settings: dict[str, Any] = {
            "kv_pool_bytes": 8 << 20,
            "weight_pool_bytes": 256 << 20,
            "page_size": 4,
            "packed_cache_bytes": 0,
        } | fields
        self.deployment = Deployment(
            models={
                i: ModelConfig(
                    name=f"{path.name}-{i}",
                    path=str(path),
                    weight_pool_devices=None
                    if own is None
                    else tuple(Device(name) for name in own),
                    keep="demand" if keep is None else keep[i],
                    experts=experts,
                    quantization=quantization,
                    kv_cache_dtype=kv_cache_dtype,
                )
                for i, (path, own) in enumerate(
                    zip(models, places or [None] * len(models), strict=True)
                )
            },
            next_model=len(models),
            kv_pool_devices=tuple(Device(name) for name in kv),
            weight_pool_devices=tuple(Device(name) for name in weights),
            runtime_dir=str(self.runtime_dir),
            **settings,
        )
        deployment_module.save(self.deployment)
        self.specs = specs_of(self.deployment.models)
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._socket.bind(self.deployment.control_address)
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.logs: dict[str, Path] = {}
        self.ready: dict[str, Ready] = {}
        self._lanes_fd: int | None = None
        self._kept = links.keep_memory(self.deployment)
        self._incarnations = {device.name: 1 for device in self.deployment.devices}
        self._early: list[tuple[str, FromDevice]] = []
        self._messages: list[tuple[str, FromDevice]] = []
        self._numbers = 0
        self._steps = 0
        try:
            self._spawn()
            self._await_ready(ready_timeout)
        except BaseException:
            self.close()
            raise
        self._bounds = Bounds.of(self.deployment)
        self.allocators = [self._allocator() for _ in kv]

    def _allocator(self) -> PageAllocator:
        """Return the pages of an attention rank that holds none yet."""
        deployment = self.deployment
        layouts = {
            number: KVLayout(spec, deployment.page_size, deployment.chunk_bytes)
            for number, spec in self.specs.items()
        }
        return PageAllocator(self._bounds.budget, layouts, self._bounds)

    def _spawn(self) -> None:
        deployment = self.deployment
        self._lanes_fd = links.create(deployment, self.specs)
        for device in deployment.devices:
            self.logs[device.name] = self.runtime_dir / f"{device.name}.log"
            self._spawn_device(device)

    def _spawn_device(self, device: Device) -> None:
        lanes = [] if self._lanes_fd is None else ["--lanes-fd", str(self._lanes_fd)]
        kept = self._kept.fds
        shared = [] if self._lanes_fd is None else [self._lanes_fd]
        if kept:
            lanes += ["--link-memory-fds", ",".join(map(str, kept))]
        with self.logs[device.name].open("ab") as out:
            self.processes[device.name] = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "crosspool.ranks.device_process",
                    "--deployment",
                    str(self._file_of(device)),
                    "--device",
                    device.name,
                    *lanes,
                    "--incarnation",
                    str(self._incarnations[device.name]),
                ],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                pass_fds=[*shared, *kept],
                preexec_fn=die_with_parent,  # noqa: PLW1509
            )

    def replace(self, name: str) -> None:
        """Kill a device's process, start another in its place, and wait until it is ready. What an
        attention rank there has computed is lost."""
        self.processes[name].kill()
        self.processes[name].wait()
        del self.ready[name]
        self._incarnations[name] += 1
        for rank, device in enumerate(self.deployment.kv_pool_devices):
            if device.name == name:
                self.allocators[rank] = self._allocator()
        self._spawn_device(Device(name))
        self._await_ready(60.0)
        self._messages, self._early = self._early, []

    def _file_of(self, device: Device) -> Path:
        """Return the file of the deployment that the device's process shall read."""
        loop = self._loops.get(device.name)
        if loop is None:
            return self.deployment.file
        file = self.runtime_dir / f"{device.name}.json"
        file.write_bytes(msgspec.json.encode(msgspec.structs.replace(self.deployment, loop=loop)))
        return file

    def _await_ready(self, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        while len(self.ready) < len(self.processes):
            device, message = self.receive(deadline - time.monotonic())
            if isinstance(message, Failed):
                raise DeviceFailed(message)
            if isinstance(message, StepResult | Waking | Woken):  # before a replaced rank says so
                self._early.append((device, message))
                continue
            assert isinstance(message, Ready), message
            self.ready[device] = message

    def send(self, device: str, message: ToDevice) -> None:
        identity = identity_of(device, self._incarnations[device])
        self._socket.send_multipart([identity, encode(message)])

    def receive(self, timeout: float = 60.0) -> tuple[str, FromDevice]:
        """Return the next message and the device that sent it. Raises AssertionError when none
        comes or a device has died."""
        if self._messages:
            return self._messages.pop(0)
        deadline = time.monotonic() + timeout
        while not self._socket.poll(100):
            for name, process in self.processes.items():
                if process.poll() is not None and not self._socket.poll(500):
                    raise AssertionError(
                        f"{name} ended with {process.returncode}:\n{self.log(name)}"
                    )
            if time.monotonic() > deadline:
                logs = "\n".join(self.log(name) for name in self.processes)
                raise AssertionError(f"no message in {timeout:.0f} s:\n{logs}")
        identity, frame = self._socket.recv_multipart()
        return read_identity(identity)[0], decode_from_device(frame)

    def log(self, device: str) -> str:
        return self.logs[device].read_text(errors="replace")

    def inspect(self, device: str, what: str) -> Any:
        self._numbers += 1
        self.send(device, Inspect(id=self._numbers, what=what))  # type: ignore[arg-type]
        sender, message = self.receive()
        assert isinstance(message, Inspected), message
        assert (message.id, message.device, sender) == (self._numbers, device, device)
        entries = msgspec.to_builtins(getattr(message.report, what))
        match what:
            case "pools" | "counters":
                return entries[0]
            case "trace_stop":
                return entries[0]["events"]
        return entries

    def step(
        self, sequences: Sequence[Generation], bitmask: bytes | None = None, lease: int = 1
    ) -> int:
        """Send one step with the next tokens of ``sequences``, all of one model and one rank, and a
        lease of ``lease`` steps. Every result goes to :meth:`take`."""
        first = sequences[0]
        opens, rows, chunks = [], [], []
        for sequence in sequences:
            assert (sequence.model, sequence.rank) == (first.model, first.rank)
            allocator = self.allocators[sequence.rank]
            layout = KVLayout(
                self.specs[sequence.model], self.deployment.page_size, self.deployment.chunk_bytes
            )
            if sequence.request < 0:
                self._numbers += 1
                sequence.request = self._numbers
                pages = layout.pages_for(len(sequence.prompt) + sequence.new_tokens)
                pages -= len(sequence.shared)
                assert not allocator.shortage(sequence.model, pages), "too small a pool"
                sequence.pages = sequence.shared + allocator.take(sequence.model, pages)
                opens.append(
                    Open(
                        request=sequence.request,
                        prompt_len=len(sequence.prompt),
                        sampling=sequence.sampling,
                        logprobs=sequence.logprobs,
                    )
                )
            known = sequence.prompt + sequence.output
            end = min(len(known), sequence.computed + sequence.chunk)
            pages = max(sequence.paged, layout.pages_for(end + lease - 1))
            chunks += allocator.map(sequence.model, sequence.pages[:pages])
            rows.append(
                Row(
                    request=sequence.request,
                    start=sequence.computed,
                    tokens=known[sequence.computed : end],
                    pages=sequence.pages[sequence.paged : pages],
                    sample=end == len(known),
                    bitmask=bitmask,
                )
            )
            sequence.paged = pages
        self._steps += 1
        self.send(
            self.deployment.kv_pool_devices[first.rank].name,
            Step(
                step=self._steps,
                model=first.model,
                map_chunks=chunks,
                opens=opens,
                rows=rows,
                lease=lease,
            ),
        )
        return self._steps

    def take(self, sequences: Sequence[Generation], result: StepResult) -> None:
        """Add a result to the sequences of its step."""
        assert [s.request for s in sequences] == [r.request for r in result.rows]
        for sequence, row in zip(sequences, result.rows, strict=True):
            known = len(sequence.prompt) + len(sequence.output)
            sequence.computed = min(known, sequence.computed + sequence.chunk)
            assert (row.token >= 0) == (sequence.computed == known)
            self._take_row(sequence, row)

    def _take_row(self, sequence: Generation, row: RowResult) -> None:
        sequence.prompt_logprobs += row.prompt
        if row.token >= 0:
            sequence.output.append(row.token)
        if row.output is not None:
            sequence.output_logprobs.append(row.output)

    def generate(self, sequences: Iterable[Generation]) -> None:
        """:meth:`run`, then :meth:`release`."""
        waiting = list(sequences)
        self.run(waiting)
        self.release(waiting)

    def run(self, sequences: Iterable[Generation]) -> None:
        """Run sequences of any models and ranks to their end. All models and ranks step at once,
        with one step of each at a time."""
        flying: dict[int, list[Generation]] = {}
        busy: set[tuple[int, int]] = set()
        groups: dict[tuple[int, int], list[Generation]] = {}
        for sequence in sequences:
            groups.setdefault((sequence.rank, sequence.model), []).append(sequence)
        while True:
            for key, group in groups.items():
                batch = [sequence for sequence in group if not sequence.done]
                if batch and key not in busy:
                    busy.add(key)
                    flying[self.step(batch)] = batch
            if not flying:
                break
            _, message = self.receive()
            assert isinstance(message, StepResult), message
            batch = flying.pop(message.step)
            busy.remove((batch[0].rank, batch[0].model))
            self.take(batch, message)

    def release(self, sequences: Iterable[Generation]) -> None:
        for sequence in sequences:
            own = sequence.pages[len(sequence.shared) :]
            self.send(
                self.deployment.kv_pool_devices[sequence.rank].name,
                Release(
                    model=sequence.model,
                    requests=[sequence.request],
                    unmap_chunks=self.allocators[sequence.rank].free(sequence.model, own),
                ),
            )

    def wake(self, *models: int) -> dict[int, str | None]:
        """Have every device read the weights of models that it has a share of; returns the errors
        of those that could not be read."""
        waiting = set()
        for model in models:
            waiting |= {(device, model) for device in self._devices_of(model)}
            for device in self._devices_of(model):
                self.send(device, Wake(model=model))
        errors: dict[int, str | None] = dict.fromkeys(models)
        while waiting:
            device, message = self.receive()
            if isinstance(message, Woken):
                waiting.remove((device, message.model))
                errors[message.model] = errors[message.model] or message.error
            else:
                assert isinstance(message, Waking), message
        return errors

    def sleep(self, *models: int) -> None:
        """Have every device give up the weights of models."""
        waiting = set()
        for model in models:
            waiting |= {(device, model) for device in self._devices_of(model)}
            for device in self._devices_of(model):
                self.send(device, Sleep(model=model))
        while waiting:
            device, message = self.receive()
            assert isinstance(message, Slept), message
            waiting.remove((device, message.model))

    def add(self, path: Path, *devices: str, **options: Any) -> tuple[int, dict[str, str | None]]:
        """Have all devices, or those that are named, make ready for a further model. Return its
        number, and what each device has against it."""
        number = self.deployment.free_number()
        config = ModelConfig(name=f"{path.name}-{number}", path=str(path), **options)
        self.deployment = self.deployment.with_model(number, config)
        errors = self.tell(number, *devices)
        if not any(errors.values()):
            self.specs[number] = spec_of(config)
            self._bounds.add(self.deployment, number)
            size = self.deployment.page_size, self.deployment.chunk_bytes
            for allocator in self.allocators:
                allocator.add(number, KVLayout(self.specs[number], *size))
        return number, errors

    def tell(self, number: int, *devices: str) -> dict[str, str | None]:
        """Tell all devices, or those that are named, of a model that has come."""
        names = devices or tuple(self.processes)
        for name in names:
            self.send(name, AddModel(model=number, config=self.deployment.models[number]))
        errors: dict[str, str | None] = {}
        while len(errors) < len(names):
            device, message = self.receive()
            assert isinstance(message, Added) and message.model == number, message
            errors[device] = message.error
        return errors

    def remove(self, number: int) -> None:
        """Have every device let go of a model that sleeps and has no pages."""
        for name in self.processes:
            self.send(name, RemoveModel(model=number))
        waiting = set(self.processes)
        while waiting:
            device, message = self.receive()
            assert isinstance(message, Removed) and message.model == number, message
            waiting.remove(device)
        self.deployment = self.deployment.without_model(number)
        if self.specs.pop(number, None) is not None:
            for allocator in self.allocators:
                allocator.remove(number)
            self._bounds.remove(number)

    def _devices_of(self, model: int) -> list[str]:
        """Return the devices that have a share of a model."""
        deployment = self.deployment
        ffn = [deployment.weight_pool_devices[rank] for rank in deployment.ffn_ranks(model)]
        return list(dict.fromkeys(device.name for device in (*deployment.kv_pool_devices, *ffn)))

    def shutdown(self, timeout: float = 20.0, *, drain: bool = True) -> dict[str, int]:
        """Ask every device process to end and return their exit statuses."""
        for name in self.processes:
            self.send(name, Shutdown(drain=drain))
        return {name: process.wait(timeout) for name, process in self.processes.items()}

    def close(self) -> None:
        for process in self.processes.values():
            if process.poll() is None:
                process.kill()
            process.wait()
        self._kept.close()
        if self._lanes_fd is not None:
            os.close(self._lanes_fd)
            self._lanes_fd = None
        self._socket.close(linger=0)
        self._context.term()
        shutil.rmtree(self.runtime_dir, ignore_errors=True)

    def __enter__(self) -> DeviceDriver:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class DeviceFailed(Exception):
    """A device process cannot go on."""

    def __init__(self, failed: Failed) -> None:
        super().__init__(failed.message)
        self.failed = failed
