"""The host loop: drives the lanes of one device layer by layer from Python.

A lane carries one batch. It is *ready* when its next attention part (or piece of LM head) can be
computed, that is at its beginning and whenever all FFN ranks of its batch's model have replied to
its dispatch. One call of :meth:`HostLoop.run` picks the next ready thing in rotation, lanes and
dispatches to this device's FFN rank alike, and computes it: with both pools on one device the lanes
take turns part by part, and with the pools apart the other lane's attention runs while one lane
waits.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch

from crosspool.observability.trace import LaneTrace, Part
from crosspool.ranks.executor import PeerDoorbell, QueuedExecutor
from crosspool.ranks.host.attention_rank import AttentionRank, Batch
from crosspool.ranks.host.ffn_rank import FFNRank
from crosspool.ranks.host.lm_head import LMHead
from crosspool.transport.data_path import AttentionLink, DispatchHeader, FFNLink
from crosspool.transport.messages import Release, Step, StepResult


class Lane:
    """One of an attention rank's lanes, and the batch on it.

    ``links``: the lane's links, by FFN rank; ``ffn_ranks``: those that share each model there is at
    any time; ``epoch``: the incarnation of the attention rank, which no other one of it has had."""

    def __init__(
        self,
        index: int,
        links: Sequence[AttentionLink],
        ffn_ranks: Mapping[int, Sequence[int]],
        rank: AttentionRank,
        *,
        epoch: int,
        trace: LaneTrace,
    ) -> None:
        self.index = index
        self._links = links
        self._ffn_ranks = ffn_ranks
        self.batch: Batch | None = None
        self._rank = rank
        self._epoch = epoch
        self._trace = trace
        self._layer = 0
        self._dispatched = False
        self._head: LMHead | None = None

    def links(self, model: int) -> list[AttentionLink]:
        """The links to the FFN ranks of a model."""
        return [self._links[rank] for rank in self._ffn_ranks[model]]

    def take(self, batch: Batch) -> None:
        """Puts a batch on the free lane."""
        self.batch = batch
        self._layer = 0
        self._dispatched = False
        self._head = None

    def is_free_for(self, model: int) -> bool:
        """Whether a batch of the model may be put on the lane: there is none, and no dispatch of
        this attention rank's predecessor still waits for its reply."""
        return self.batch is None and all(link.free for link in self.links(model))

    @property
    def ready(self) -> bool:
        if self.batch is None:
            return False
        return not self._dispatched or all(link.ready() for link in self.links(self.batch.model))

    def advance(self) -> StepResult | None:
        """Computes the ready part. After the last one, returns the result and is free."""
        batch = self.batch
        assert batch is not None
        links = self.links(batch.model)
        start = self._trace.now()
        if self._dispatched:
            refused = [link.take_refusal() for link in links]
            shape, dtype = batch.residual.shape, batch.residual.dtype
            partials = [
                link.combine(shape, dtype)
                for link, no in zip(links, refused, strict=True)
                if not no
            ]
            if any(refused):
                self.batch = None
                return StepResult(step=batch.step, rows=[], refused=True)
            self._rank.combine(batch, partials)
            self._dispatched = False
            self._layer += 1
        if self._layer < self._rank.specs[batch.model].layers:
            hidden = self._rank.attend(batch, self._layer)
            header = DispatchHeader(
                epoch=self._epoch, model=batch.model, layer=self._layer, rows=hidden.shape[0]
            )
            for link in links:
                link.dispatch(header, hidden)
            self._dispatched = True
            self._record(batch, "attention", self._layer, hidden.shape[0], start)
            return None
        if self._head is None:
            self._head = LMHead(batch, self._rank.parts[batch.model], self._rank.specs[batch.model])
        rows, result = self._head.advance()
        self._record(batch, "lm_head", -1, rows, start)
        if result is not None:
            self.batch = None
            self._head = None
        return result

    def _record(self, batch: Batch, part: Part, layer: int, rows: int, start: int) -> None:
        if self._trace.on:
            self._trace.record(
                role="attention",
                rank=self._rank.rank,
                attention_rank=self._rank.rank,
                lane=self.index,
                step=batch.step,
                model=batch.model,
                layer=layer,
                part=part,
                rows=rows,
                start_ns=start,
            )


class HostLoop(QueuedExecutor[AttentionRank, Batch]):
    """The :class:`~crosspool.ranks.executor.Executor` in Python. It ends every lease after its
    first step.

    A device without an attention rank has neither ``attention`` nor ``links`` ([lane][FFN rank]),
    one without an FFN rank has no ``ffn``. ``ffn_ranks``: the FFN ranks that share each model that
    there is at any time. ``doorbell``: None when no peer lives on another device."""

    def __init__(
        self,
        attention: AttentionRank | None,
        links: Sequence[Sequence[AttentionLink]],
        ffn: FFNRank | None,
        *,
        ffn_ranks: Mapping[int, Sequence[int]],
        doorbell: PeerDoorbell | None,
        serves_peers: bool,
        trace: LaneTrace,
    ) -> None:
        super().__init__(attention, polls_peers=serves_peers)
        self._lanes = []
        if attention is not None:
            epoch = time.time_ns()
            for index, of_lane in enumerate(links):
                self._lanes.append(
                    Lane(index, of_lane, ffn_ranks, attention, epoch=epoch, trace=trace)
                )
        self._doorbell = doorbell
        self._results: list[StepResult] = []
        self._held: dict[int, list[Step | Release]] = {}
        """By model that sleeps, the operations that wait for it."""
        self._refusing: set[int] = set()
        """Of these, the models whose weights could not be read."""
        self._served = -math.inf
        self._sources: deque[Callable[[], bool]] = deque(
            partial(self._advance, lane) for lane in self._lanes
        )
        if ffn is not None:
            self._sources.extend(partial(self._serve, ffn, link) for link in ffn.links)

    @torch.inference_mode()
    def submit(self, operation: Step | Release) -> None:
        waiting = self._held.get(operation.model)
        if waiting is None or (isinstance(operation, Release) and not waiting):
            super().submit(operation)
        else:
            waiting.append(operation)
            if operation.model in self._refusing:
                self._refuse_waiting(operation.model)

    def has(self, model: int) -> bool:
        return bool(self._held.get(model)) or super().has(model)

    def forget(self, model: int) -> None:
        """A model is gone, which slept."""
        del self._held[model]
        self._refusing.discard(model)

    def hold(self, model: int) -> None:
        """Lets the operations of a model wait from now on, since its weights go or are read."""
        self._held.setdefault(model, [])
        self._refusing.discard(model)

    def resume(self, model: int) -> None:
        """Carries out what has waited for a model's weights."""
        for operation in self._held.pop(model, []):
            self.submit(operation)

    def refuse(self, model: int) -> None:
        """Ends the steps that have waited for a model's weights, and those that were sent before
        the scheduler knew that none come."""
        self._refusing.add(model)
        self._refuse_waiting(model)

    @torch.inference_mode()
    def _refuse_waiting(self, model: int) -> None:
        waiting = self._held[model]
        for operation in waiting:
            if isinstance(operation, Step):
                assert self._attention is not None
                self._attention.begin(operation)  # its chunks are mapped, whatever becomes of it
                self._results.append(StepResult(step=operation.step, rows=[], refused=True))
            else:
                super().submit(operation)
        waiting.clear()

    @torch.inference_mode()
    def run(self, timeout: float) -> list[StepResult]:
        self._begin_queued()
        if not self._run_next_ready() and self._doorbell is not None:
            self._doorbell.wait(timeout)
        results, self._results = self._results, []
        return results

    @property
    def quiet(self) -> bool:
        return super().quiet and not self._results

    def _begin(self, attention: AttentionRank, step: Step) -> Batch | None:
        lane = next((lane for lane in self._lanes if lane.is_free_for(step.model)), None)
        if lane is None:
            return None
        batch = attention.begin(step)
        lane.take(batch)
        return batch

    def _last_served(self) -> float:
        return self._served

    def _run_next_ready(self) -> bool:
        for _ in range(len(self._sources)):
            self._sources.rotate(-1)
            if self._sources[-1]():
                return True
        return False

    def _serve(self, ffn: FFNRank, link: FFNLink) -> bool:
        served = ffn.serve(link)
        if served:
            self._served = time.monotonic()
        return served

    def _advance(self, lane: Lane) -> bool:
        if not lane.ready:
            return False
        result = lane.advance()
        if result is not None:
            del self._flights[result.step]
            self._results.append(result)
        return True
