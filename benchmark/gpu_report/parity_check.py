"""The check that finds the first wrong stage: every stage of a step by plain calls and captured,
layer by layer.

Plain calls are held against the reference in torch, each stage given what the stage before it made
of the device's own numbers, so that errors do not add up; captured stages are held against plain
calls, bit for bit.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from crosspool.kernels.cuda_loop import GPUStage
from crosspool.ranks.gpu.inputs import HostInputs
from crosspool.ranks.gpu.lanes import make_stages
from crosspool.ranks.gpu.launch import words
from crosspool.ranks.gpu.model import GPUModel
from crosspool.ranks.gpu.scratch import LaneBuffers
from crosspool.ranks.gpu.stages import Stages
from crosspool.ranks.host.step_batch import RowSpan, StepBatch

from benchmark.gpu_report.bundled import PAGES, Reference, load
from benchmark.gpu_report.notes import Gravity, Notes
from benchmark.gpu_report.platform import Platform

_TOLERANCE = 1e-3
"""Largest difference from the reference, as a share of the reference's largest value, in
float32."""

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Step:
    """Rows of one step: sequences of new tokens, whose pages are their own."""

    sequences: list[list[int]]
    start: int
    feeds: bool
    """Whether the tokens are those that the step before chose."""

    @property
    def rows(self) -> int:
        return sum(map(len, self.sequences))


@dataclass
class Walk:
    """One way to run a step's stages, and what each of them made."""

    name: str
    model: GPUModel
    lane: LaneBuffers
    stages: Stages
    run: Callable[[GPUStage], None]
    memory: torch.Tensor
    made: dict[tuple[int, str, int], Tensors] = field(default_factory=dict)
    """Outputs by number of the step, stage and layer."""


def stage_parity(platform: Platform, notes: Notes) -> None:
    worst: dict[str, float] = {"captured": 0.0, "eager": 0.0}
    for name in platform.scale.models:
        for bucket in platform.scale.buckets:
            _Parity(platform, notes, name, bucket, worst).check()
    notes.headline("largest error of an eager stage, of the reference's range", worst["eager"], "")
    notes.headline("largest error of a captured stage, of the eager's", worst["captured"], "")


class _Parity:
    def __init__(
        self, platform: Platform, notes: Notes, name: str, bucket: int, worst: dict[str, float]
    ) -> None:
        self.platform, self.notes, self.name, self.bucket = platform, notes, name, bucket
        self.worst = worst
        self.reference = Reference(platform, name)
        model = load(platform, name)
        other = dataclasses.replace(model, kv=model.kv.clone())
        self.eager = self._walk("eager", model)
        self.captured = self._walk("captured", other)

    def check(self) -> None:
        """Steps: each row a sequence's first token; then the chosen tokens fed back; then one prompt
        over all rows."""
        first = [[7 + row] for row in range(self.bucket)]
        steps = [Step(first, 0, False), Step(first, 1, True)]
        if self.bucket > 1:
            steps.append(Step([list(range(20, 20 + self.bucket))], 0, False))
        wrong: set[str] = set()
        for number, step in enumerate(steps):
            for walk in (self.eager, self.captured):
                self._inputs(walk, step)
                before: Tensors = {}
                for stage, layer in self._order(step):
                    where = self._where(stage, layer)
                    self.notes.at(f"{walk.name} stage", **where)
                    self._set(walk, layer)
                    walk.run(stage)
                    self.platform.synchronize()
                    made = self._outputs(walk, stage, step)
                    walk.made[number, stage.name, layer] = made
                    if walk is self.eager:
                        expected = self._expected(step, stage, layer, before, made)
                        self._compare("eager", made, expected, where, wrong, number)
                    else:
                        expected = self.eager.made[number, stage.name, layer]
                        self._compare("captured", made, expected, where, wrong, number)
                    before = before | made

    def _walk(self, name: str, model: GPUModel) -> Walk:
        places, stages = make_stages([model], [self.bucket], 1, self.bucket, self.platform.device)
        own = stages[0, 0, 0]
        pinned = self.platform.is_gpu
        memory = torch.zeros(own.layout.elements, dtype=torch.int32, pin_memory=pinned)
        calls: Mapping[GPUStage, Callable[[], None]] = own.calls
        if name == "captured":
            self.notes.at("capture", model=self.name, bucket=self.bucket)
            graphs = self.platform.capture(places, stages)
            for graph in graphs.values():
                self.platform.instantiate(graph)
            calls = {key[2]: graph.replay for key, graph in graphs.items()}
        return Walk(name, model, places[0], own, lambda stage: calls[stage](), memory)

    def _inputs(self, walk: Walk, step: Step) -> None:
        """Writes the step's inputs and the lane's words, as a loop does."""
        host = HostInputs(walk.stages.layout, walk.memory)
        if not step.feeds:
            host["temperature"].fill(0.0)
            host["wanted_rows"].fill(0)
            row = 0
            for number, tokens in enumerate(step.sequences):
                for i, token in enumerate(tokens):
                    host["tokens"][row] = token
                    host["positions"][row] = step.start + i
                    host["row_sequences"][row] = number
                    row += 1
                host["wanted_rows"][number] = row - 1
                pages = _pages(step, number)
                host.page_table[number, : len(pages)] = pages
            host.close(len(step.sequences), len(_pages(step, 0)), len(step.sequences))
        walk.lane.words.copy_(words(walk.memory.data_ptr(), step.rows, int(step.feeds)))

    def _set(self, walk: Walk, layer: int) -> None:
        walk.lane.layer.fill_(max(0, layer))
        self.platform.synchronize()

    def _order(self, step: Step) -> Iterator[tuple[GPUStage, int]]:
        """Stages of a step with their layers; -1: none."""
        yield (GPUStage.FEED if step.feeds else GPUStage.EMBED), -1
        for layer, moe in enumerate(self.eager.model.kinds):
            yield GPUStage.ATTENTION, layer
            yield (GPUStage.MOE_FFN if moe else GPUStage.DENSE_FFN), layer
        yield GPUStage.HEAD, -1

    def _outputs(self, walk: Walk, stage: GPUStage, step: Step) -> Tensors:
        s, rows, wanted = walk.stages.scratch, step.rows, len(step.sequences)
        found = {
            GPUStage.EMBED: {"residual": s.residual[:rows], "partial": s.partial[:rows]},
            GPUStage.FEED: {"residual": s.residual[:rows], "partial": s.partial[:rows]},
            GPUStage.ATTENTION: {"residual": s.residual[:rows], "payload": s.payload[:rows]},
            GPUStage.DENSE_FFN: {"partial": s.partial[:rows]},
            GPUStage.MOE_FFN: {"partial": s.partial[:rows]},
            GPUStage.HEAD: {"logits": s.logits[:wanted], "chosen": walk.lane.chosen[:wanted]},
        }[stage]
        return {name: tensor.cpu().clone() for name, tensor in found.items()}

    def _expected(
        self, step: Step, stage: GPUStage, layer: int, before: Tensors, made: Tensors
    ) -> Tensors:
        """What the reference makes of what the device had before the stage."""
        reference = self.reference
        if stage in (GPUStage.EMBED, GPUStage.FEED):
            tokens = [token for of in step.sequences for token in of]
            if step.feeds:
                tokens = self.eager.made[0, "HEAD", -1]["chosen"].tolist()
            residual = reference.attention.embed(torch.tensor(tokens))
            return {"residual": residual, "partial": torch.zeros_like(residual)}
        if stage == GPUStage.ATTENTION:
            summed = before["residual"] + before["partial"]
            batch = self._batch(step)
            residual, payload = reference.attention.attend(layer, summed, batch, reference.kv)
            return {"residual": residual, "payload": payload}
        if stage == GPUStage.HEAD:
            last = torch.tensor([len(of) for of in step.sequences]).cumsum(0) - 1
            logits = reference.attention.logits((before["residual"] + before["partial"])[last])
            return {"logits": logits, "chosen": made["logits"].argmax(1).int()}
        return {"partial": reference.ffn.forward(layer, before["payload"])}

    def _batch(self, step: Step) -> StepBatch:
        spans, positions, row = [], [], 0
        for number, tokens in enumerate(step.sequences):
            pages = torch.tensor(_pages(step, number))
            spans.append(RowSpan(row, len(tokens), step.start, pages))
            positions += range(step.start, step.start + len(tokens))
            row += len(tokens)
        return StepBatch(torch.tensor(positions), spans)

    def _where(self, stage: GPUStage, layer: int) -> dict[str, object]:
        where: dict[str, object] = {"model": self.name, "stage": stage.name, "bucket": self.bucket}
        return where | ({"layer": layer} if layer >= 0 else {})

    def _compare(
        self,
        way: str,
        made: Tensors,
        expected: Tensors,
        where: dict[str, object],
        wrong: set[str],
        step: int,
    ) -> None:
        """Notes checksums and the error; the first wrong stage of each way is a finding."""
        error = max(_error(made[name], expected[name]) for name in made)
        self.worst[way] = max(self.worst[way], error)
        self.notes.fact(
            f"{way} stage", f"{_checksum(made):08x}", **where, step=step, error=f"{error:.2g}"
        )
        limit = _TOLERANCE if way == "eager" else 0.0
        if error > limit and way not in wrong:
            wrong.add(way)
            against = "the reference" if way == "eager" else "the same stage by a plain call"
            self.notes.finding(
                Gravity.WRONG,
                f"the first wrong {way} stage: it differs from {against} by {error:.2g} of its "
                f"largest value, in step {step}",
                **where,
            )


def _pages(step: Step, sequence: int) -> list[int]:
    """Pages of a sequence: its share of all."""
    each = PAGES // len(step.sequences)
    return list(range(sequence * each, (sequence + 1) * each))


def _error(made: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference as a share of the largest expected value; infinite where a value is not a
    number."""
    difference = (made.double() - expected.double()).abs().max().item()
    scale = max(expected.double().abs().max().item(), 1e-6)
    return difference / scale if difference == difference else float("inf")


def _checksum(tensors: Tensors) -> int:
    total = 0
    for name in sorted(tensors):
        total = zlib.crc32(tensors[name].contiguous().numpy().tobytes(), total)
    return total
