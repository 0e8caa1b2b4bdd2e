"""What a device process holds: the ranks of one device, and what it tells about them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Protocol

import psutil

from crosspool.config.deployment import Deployment, ModelConfig
from crosspool.config.device import Device
from crosspool.observability.trace import LaneEvent
from crosspool.ranks.executor import Executor
from crosspool.ranks.kv_rank import KVRank, ListsTensors
from crosspool.transport.data_path import LinkCounters
from crosspool.transport.inspection import (
    DeviceCounters,
    DeviceEvents,
    DevicePools,
    ExpertCounts,
    InspectWhat,
    LinkCounts,
    RankInfo,
    Report,
    TensorInfo,
)
from crosspool.transport.messages import Added, Removed, Slept, Waking, Woken

ModelNews = Waking | Woken | Slept | Added | Removed
"""What a device tells of a model."""


class Counted(Protocol):
    """The part of a link that is inspected."""

    attention_rank: int
    lane: int
    ffn_rank: int

    @property
    def counters(self) -> LinkCounters: ...


class HostsFFN(Protocol):
    """What the FFN ranks of all engines have in common."""

    rank: int

    @property
    def parts(self) -> Mapping[int, ListsTensors]:
        """The parts that lie on the rank, by the model."""

    @property
    def links(self) -> Sequence[Counted]:
        """The rank's ends of the lanes of all attention ranks."""


class Traces(Protocol):
    """Records lane events: see :class:`~crosspool.observability.trace.LaneTrace`."""

    def start(self) -> None: ...

    def stop(self) -> list[LaneEvent]: ...


class DeviceModels(Protocol):
    """The models that a device knows, and those whose weights it has; both come and go while others
    are in use."""

    @property
    def configs(self) -> Mapping[int, ModelConfig]:
        """The models that the device knows."""

    def resident(self) -> list[int]:
        """Returns the models whose weights the device has."""

    def add(self, model: int, config: ModelConfig) -> None:
        """Begins to make ready for a further model, which is asleep then."""

    def remove(self, model: int) -> None:
        """Begins to let go of a model, which is asleep and has no mapped chunks, or which the
        device does not know."""

    def wake(self, model: int) -> None:
        """Begins to read the weights of a model."""

    def sleep(self, model: int) -> None:
        """Begins to give up the weights of a model."""

    def news(self) -> list[ModelNews]:
        """Returns what there is to tell since the last call."""

    @property
    def busy(self) -> bool:
        """Whether there will be news soon, of which only :meth:`news` tells."""


class UsesExperts(Protocol):
    """Where the routed experts of models are in memory on demand."""

    def counts(self, model: int, name: str) -> ExpertCounts | None:
        """Returns what has happened to the experts of a model, which is called ``name``; None if
        they are not there."""


@dataclass(frozen=True)
class FixedModels:
    """The models of a device on which none sleeps, and to which none comes."""

    configs: Mapping[int, ModelConfig]
    held: Sequence[int]
    """Those that the device has a share of."""
    _news: list[ModelNews] = field(default_factory=list)

    def resident(self) -> list[int]:
        return list(self.held)

    def add(self, model: int, config: ModelConfig) -> None:
        error = "no model can come to a GPU while the server runs"
        self._news.append(Added(model=model, error=error))

    def remove(self, model: int) -> None:
        if model in self.configs:
            raise RuntimeError(f"model {model} cannot leave this device")
        self._news.append(Removed(model=model))

    def wake(self, model: int) -> None:
        raise RuntimeError(f"model {model} never sleeps on this device")

    def sleep(self, model: int) -> None:
        raise RuntimeError(f"model {model} cannot sleep on this device")

    def news(self) -> list[ModelNews]:
        news = list(self._news)
        self._news.clear()
        return news

    @property
    def busy(self) -> bool:
        return False


@dataclass
class DeviceRanks:
    """The ranks of one device, what drives them, and their links."""

    deployment: Deployment
    device: Device
    executor: Executor
    attention: KVRank[Any, Any] | None
    ffn: HostsFFN | None
    links: Sequence[Sequence[Counted]]
    """Links of the attention rank, indexed [lane][FFN rank]."""
    trace: Traces
    resources: contextlib.ExitStack
    """Memory and threads that :meth:`close` gives back."""
    models: DeviceModels
    experts: UsesExperts | None = None

    def infos(self) -> list[RankInfo]:
        """Returns what :class:`~crosspool.transport.messages.Ready` tells of the ranks."""
        infos = []
        if self.attention is not None:
            infos.append(
                RankInfo(
                    role="attention",
                    rank=self.attention.rank,
                    weight_bytes=_weight_bytes(self.attention.parts.values()),
                    kv_bytes=self.attention.budget_bytes,
                )
            )
        if self.ffn is not None:
            infos.append(
                RankInfo(
                    role="ffn",
                    rank=self.ffn.rank,
                    weight_bytes=_weight_bytes(self.ffn.parts.values()),
                    kv_bytes=0,
                )
            )
        return infos

    def inspect(self, what: InspectWhat) -> Report:
        """Returns the reply to :class:`~crosspool.transport.messages.Inspect`."""
        match what:
            case "tensors":
                return Report(tensors=list(self.tensors()))
            case "pools":
                return Report(pools=[self.pools()])
            case "counters":
                return Report(counters=[self.counters()])
            case "trace_start":
                self.trace.start()
                return Report(trace_start=[self.device.name])
            case "trace_stop":
                events = DeviceEvents(device=self.device.name, events=self.trace.stop())
                return Report(trace_stop=[events])

    def close(self) -> None:
        """Ends the executor and gives memory back; no tensor of it may be touched afterwards."""
        self.resources.close()

    def tensors(self) -> Iterator[TensorInfo]:
        """Every tensor of the ranks."""
        if self.attention is not None:
            for model, attention in self.attention.parts.items():
                yield from self._listed("attention", self.attention.rank, model, attention)
        if self.ffn is not None:
            for model, ffn in self.ffn.parts.items():
                yield from self._listed("ffn", self.ffn.rank, model, ffn)

    def pools(self) -> DevicePools:
        """KV memory of the attention rank."""
        rss = psutil.Process().memory_info().rss
        if self.attention is None:
            return DevicePools(device=self.device.name, rss_bytes=rss)
        virtualizer = self.attention.virtualizer
        return DevicePools(
            device=self.device.name,
            mapped_bytes={
                config.name: virtualizer.mapped_bytes(model)
                for model, config in self.models.configs.items()
            },
            free_bytes=virtualizer.free_bytes,
            budget_bytes=self.attention.budget_bytes,
            rss_bytes=rss,
        )

    def counters(self) -> DeviceCounters:
        """Steps and requests of the attention rank, and what crossed the links of both ranks."""
        attention, served = self.attention, [] if self.ffn is None else self.ffn.links
        return DeviceCounters(
            device=self.device.name,
            steps=0 if attention is None else attention.steps,
            requests=0 if attention is None else attention.requests,
            links=[_counted(link) for lane in self.links for link in lane],
            served=[_counted(link) for link in served],
            experts=list(self._expert_counts()),
        )

    def _expert_counts(self) -> Iterator[ExpertCounts]:
        if self.experts is None:
            return
        for index, model in self.models.configs.items():
            if (counts := self.experts.counts(index, model.name)) is not None:
                yield counts

    def _listed(
        self, role: Literal["attention", "ffn"], rank: int, model: int, part: ListsTensors
    ) -> Iterator[TensorInfo]:
        for listing in part.tensors():
            yield TensorInfo(
                device=self.device.name,
                role=role,
                rank=rank,
                model=self.models.configs[model].name,
                **asdict(listing),
            )


def _counted(link: Counted) -> LinkCounts:
    return LinkCounts(
        attention_rank=link.attention_rank,
        lane=link.lane,
        ffn_rank=link.ffn_rank,
        **asdict(link.counters),
    )


def _weight_bytes(parts: Iterable[ListsTensors]) -> int:
    return sum(listing.bytes for part in parts for listing in part.tensors())
