"""A device process without weights: it speaks the control path and answers steps with tokens that
a script chooses, so that everything above the ranks can be tested alone."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from crosspool.config.deployment import Deployment, load
from crosspool.config.device import Device
from crosspool.observability.trace import LaneEvent
from crosspool.transport.device_socket import DeviceSocket
from crosspool.transport.inspection import (
    DeviceCounters,
    DeviceEvents,
    DevicePools,
    LinkCounts,
    RankInfo,
    Report,
    TensorInfo,
)
from crosspool.transport.messages import (
    PROTOCOL_VERSION,
    Added,
    AddModel,
    Failed,
    Inspect,
    Inspected,
    Open,
    Ready,
    Release,
    Removed,
    RemoveModel,
    Row,
    RowResult,
    Shutdown,
    Sleep,
    Slept,
    Step,
    StepResult,
    ToDevice,
    TokenLogprobs,
    Wake,
    Woken,
)

Script = Callable[[int, list[int], int], int]
"""(model, tokens of the sequence so far, prompt length) -> next token."""


@dataclass
class FakeRequest:
    model: int
    open: Open
    tokens: list[int] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)


def logprob_of(token: int) -> float:
    """The log-probability that a fake device reports for a token."""
    return -0.5 - (token % 97) / 100


class FakeDevice(threading.Thread):
    """``script`` chooses tokens; where a grammar's bitmask forbids its choice, the smallest
    allowed token is taken. ``step_seconds``: how long each step takes; ``incarnation``: 2 for the
    one that takes the place of the first."""

    def __init__(
        self,
        deployment: Deployment,
        name: str,
        script: Script,
        step_seconds: float = 0.0,
        incarnation: int = 1,
    ) -> None:
        super().__init__(name=f"fake device {name}", daemon=True)
        self._deployment = deployment
        self._device = name
        self._incarnation = incarnation
        self._models = deployment.names
        self.refuses: str | None = None
        """Why it takes no further model; None while it does."""
        self.adding_seconds = 0.0
        """How long it takes to make ready for a further model."""
        self._script = script
        self.step_seconds = step_seconds
        self._requests: dict[int, FakeRequest] = {}
        self._pages: dict[tuple[int, int], list[int]] = {}
        """Tokens written to each page, indexed [model, page]."""
        self._stop_event = threading.Event()
        self.failure: str | None = None
        """Set it to make the device report Failed and fall silent."""
        self.received: list[ToDevice] = []

    def run(self) -> None:
        socket = DeviceSocket(self._deployment.control_address, self._device, self._incarnation)
        try:
            socket.send(self._ready())
            while not self._stop_event.is_set():
                if self.failure is not None:
                    socket.send(Failed(device=self._device, message=self.failure))
                    return
                socket.wait(0.01)
                # one at a time: while several models run, there is always a next one
                if (message := socket.receive()) is not None:
                    self.received.append(message)
                    self._handle(socket, message)
        finally:
            socket.close()

    def again(self) -> FakeDevice:
        """The device that takes the place of this one. It reads which models there are."""
        deployment = load(self._deployment.file)
        return FakeDevice(
            deployment, self._device, self._script, self.step_seconds, self._incarnation + 1
        )

    def stop(self) -> None:
        self._stop_event.set()
        self.join(10)

    def _ready(self) -> Ready:
        ranks = []
        d = self._deployment
        pools: tuple[tuple[Literal["attention", "ffn"], tuple[Device, ...]], ...] = (
            ("attention", d.kv_pool_devices),
            ("ffn", d.weight_pool_devices),
        )
        for role, devices in pools:
            for rank, device in enumerate(devices):
                if device.name == self._device:
                    kv = d.kv_pool_bytes // len(d.kv_pool_devices) if role == "attention" else 0
                    ranks.append(RankInfo(role=role, rank=rank, weight_bytes=1 << 20, kv_bytes=kv))
        return Ready(
            version=PROTOCOL_VERSION,
            device=self._device,
            pid=0,
            ranks=ranks,
            models=list(self._models),
            resident=list(self._models),
        )

    def _handle(self, socket: DeviceSocket, message: ToDevice) -> None:
        match message:
            case Step():
                self._stop_event.wait(self.step_seconds)
                for opened in message.opens:
                    self._requests[opened.request] = FakeRequest(message.model, opened)
                rows = [self._row(row) for row in message.rows]
                socket.send(StepResult(step=message.step, rows=rows))
            case Release():
                for number in message.requests:
                    self._requests.pop(number, None)
            case Wake():
                socket.send(Woken(model=message.model))
            case Sleep():
                socket.send(Slept(model=message.model))
            case AddModel():
                time.sleep(self.adding_seconds)
                if self.refuses is None:
                    self._models[message.model] = message.config.name
                socket.send(Added(model=message.model, error=self.refuses))
            case RemoveModel():
                self._models.pop(message.model, None)
                socket.send(Removed(model=message.model))
            case Inspect():
                report = self._report(message.what)
                socket.send(Inspected(id=message.id, device=self._device, report=report))
            case Shutdown():
                self._stop_event.set()

    def _row(self, row: Row) -> RowResult:
        request = self._requests[row.request]
        size = self._deployment.page_size
        request.pages += row.pages
        if not request.tokens:  # what lies before its first row, it shares
            for page in request.pages[: row.start // size]:
                request.tokens += self._pages[request.model, page]
        assert len(request.tokens) == row.start
        request.tokens += row.tokens
        for index in range(row.start // size, len(request.pages)):
            tokens = request.tokens[index * size : (index + 1) * size]
            self._pages[request.model, request.pages[index]] = tokens
        wanted = request.open.logprobs
        prompt = []
        if wanted.prompt_start >= 0:
            for position in range(row.start, row.start + len(row.tokens)):
                if wanted.prompt_start <= position < request.open.prompt_len:
                    prompt.append(self._logprobs(request, request.tokens[position], position))
        if not row.sample:
            return RowResult(request=row.request, prompt=prompt)
        token = self._script(request.model, list(request.tokens), request.open.prompt_len)
        if row.bitmask is not None and not row.bitmask[token // 8] >> token % 8 & 1:
            token = next(t for t in range(8 * len(row.bitmask)) if row.bitmask[t // 8] >> t % 8 & 1)
        output = self._logprobs(request, token, len(request.tokens)) if wanted.output else None
        return RowResult(request=row.request, token=token, output=output, prompt=prompt)

    def _logprobs(self, request: FakeRequest, token: int, position: int) -> TokenLogprobs:
        wanted = request.open.logprobs
        if position == 0:
            return TokenLogprobs(token=token, logprob=None, top=[], token_ids=[])
        value = logprob_of(token)
        return TokenLogprobs(
            token=token,
            logprob=value,
            top=[(value - i, (token + i) % 100) for i in range(wanted.top)],
            token_ids=[(logprob_of(t), t) for t in wanted.token_ids],
        )

    def _report(self, what: str) -> Report:
        match what:
            case "tensors":
                first = next(iter(self._models.values()))
                router = TensorInfo(
                    device=self._device, role="ffn", rank=0, model=first, layer=0,
                    key="router", name="router", shape=(2,), dtype="float32", bytes=8,
                )  # fmt: skip
                return Report(tensors=[router])
            case "pools":
                pools = DevicePools(
                    device=self._device,
                    mapped_bytes=dict.fromkeys(self._models.values(), 0),
                    free_bytes=1,
                    budget_bytes=1,
                    rss_bytes=1,
                )
                return Report(pools=[pools])
            case "counters":
                link = LinkCounts(
                    attention_rank=0, lane=0, ffn_rank=0, dispatches=1, rows=3, dispatch_bytes=300,
                    combine_bytes=600,
                )  # fmt: skip
                return Report(counters=[DeviceCounters(device=self._device, links=[link])])
            case "trace_start":
                return Report(trace_start=[self._device])
        events = [
            LaneEvent(
                role="ffn", rank=0, attention_rank=0, lane=0, step=-1, model=model, layer=0,
                part="ffn", rows=1, start_ns=start, end_ns=start + 1,
            )
            for model, start in ((1, 2), (0, 1))
        ]  # fmt: skip
        return Report(trace_stop=[DeviceEvents(device=self._device, events=events)])
