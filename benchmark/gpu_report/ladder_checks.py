"""The ladder: greedy tokens of the bundled models against the reference, by four ways to run a step,
each of which needs more of CUDA than the one before it."""

from __future__ import annotations

from typing import Any

import torch
from crosspool.ranks.gpu.launch import EagerLauncher
from crosspool.ranks.gpu.loop import HostLaunchedLoop
from crosspool.ranks.gpu.model import GPUModel

from benchmark.gpu_lanes import Join, Lanes, Row
from benchmark.gpu_report.bundled import PAGE_SIZE, PAGES, Reference, load, prompts
from benchmark.gpu_report.child import watched
from benchmark.gpu_report.notes import Gravity, Notes
from benchmark.gpu_report.platform import Platform
from benchmark.gpu_whole import WholeStep, whole_model


def eager_steps(platform: Platform, notes: Notes) -> None:
    """Every stage is a plain call."""
    _by_lanes(platform, notes, _eager_join, resident=False)


def captured_steps(platform: Platform, notes: Notes) -> None:
    """The host launches the captured graph of every stage."""
    _by_lanes(platform, notes, platform.join, resident=False)


def resident_steps(platform: Platform, notes: Notes) -> None:
    """The device launches the captured graph of every stage."""
    _by_lanes(platform, notes, platform.join, resident=True)


def whole_step(platform: Platform, notes: Notes) -> None:
    """The host launches a whole step as one graph, of one row: a prompt goes in token by token."""
    for name in platform.scale.models:
        notes.at("captures a whole step", model=name)
        model = load(platform, name)
        with whole_model(model, 1, PAGES * PAGE_SIZE - 1, platform.device) as step:
            _against_reference(
                platform, notes, name, lambda prompt, step=step: _whole(platform, step, prompt)
            )


def _eager_join(
    models: Any, lanes: Any, stages: Any, buckets: Any, *, resident: bool
) -> HostLaunchedLoop:
    assert not resident
    return HostLaunchedLoop(models, len(lanes), EagerLauncher(lanes, stages))


def _by_lanes(platform: Platform, notes: Notes, join: Join, *, resident: bool) -> None:
    scale = platform.scale
    notes.at("loads the models and captures their stages")
    models: list[GPUModel] = [load(platform, name) for name in scale.models]
    with (
        Lanes(
            models,
            lanes=1,
            buckets=scale.buckets,
            device=platform.device,
            resident=resident,
            lease=scale.new_tokens,
            join=join,
        ) as lanes,
        watched(notes, lanes.loop, scale.models),
    ):
        for index, name in enumerate(scale.models):
            _against_reference(
                platform,
                notes,
                name,
                lambda prompt, index=index: _leased(lanes, index, prompt, scale.new_tokens),
            )


def _leased(lanes: Lanes, model: int, prompt: list[int], count: int) -> list[int]:
    """A prompt's step, and one leased step for the other tokens."""
    lanes.push(0, model, [Row(prompt, 0, range(PAGES))])
    _, first = lanes.pop()
    known = [int(first[0, 0])]
    if count > 1:
        lanes.push(0, model, [Row(known, len(prompt), range(PAGES))], lease=count - 1)
        _, more = lanes.pop()
        known += more[:, 0].tolist()
    return known


def _whole(platform: Platform, step: WholeStep, prompt: list[int]) -> list[int]:
    known = list(prompt)
    for position in range(len(prompt) + platform.scale.new_tokens - 1):
        step.inputs["tokens"][0] = known[position]
        step.inputs["positions"][0] = position
        step.run()
        platform.synchronize()
        if position >= len(prompt) - 1:
            known.append(int(step.chosen[0]))
    return known[len(prompt) :]


def _against_reference(platform: Platform, notes: Notes, name: str, greedy: Any) -> None:
    """Notes how many of a model's tokens are the reference's; the first wrong one is a finding."""
    scale, right, total = platform.scale, 0, 0
    told = False
    for number, prompt in enumerate(prompts(scale.prompts, scale.prompt_tokens)):
        expected = Reference(platform, name).greedy(prompt, scale.new_tokens)
        notes.at(f"prompt {number}", model=name)
        found = greedy(prompt)
        same = [one == other for one, other in zip(found, expected, strict=True)]
        right, total = right + sum(same), total + len(same)
        if not all(same) and not told:
            at = same.index(False)
            notes.finding(
                Gravity.WRONG,
                f"token {at} after prompt {number} is {found[at]}, the reference's is "
                f"{expected[at]}",
                model=name,
            )
            told = True
    notes.fact("tokens that are the reference's", f"{right} of {total}", model=name)
