"""Checks with a resident loop over a bundled model: what can be done beside it, and many steps."""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from crosspool.kernels.cuda_loop import CudaLoop
from crosspool.kernels.residency import ResidencyError

from benchmark.gpu_lanes import Lanes, Row
from benchmark.gpu_report.bundled import PAGES, Reference, load, prompts
from benchmark.gpu_report.child import watched
from benchmark.gpu_report.notes import Gravity, Notes
from benchmark.gpu_report.platform import Platform
from benchmark.gpu_report.watchdog import beside

_STREAMS = 40
"""More than a device has connections."""
_LANES = 8


@contextlib.contextmanager
def resident(
    platform: Platform, notes: Notes, *, lanes: int = 1, kv: torch.Tensor | None = None
) -> Iterator[Lanes]:
    """Lanes of the first bundled model under a resident loop."""
    scale, name = platform.scale, platform.scale.models[0]
    notes.at("makes a resident loop", model=name)
    with (
        Lanes(
            [load(platform, name, kv)],
            lanes=lanes,
            buckets=scale.buckets,
            device=platform.device,
            resident=True,
            lease=scale.new_tokens,
            join=platform.join,
        ) as made,
        watched(notes, made.loop, [name]),
    ):
        yield made


def beside_the_loop(platform: Platform, notes: Notes) -> None:
    """What the server must not do while a loop is resident, unless it returns here."""
    from benchmark.gpu_report.late_kernel import add_one

    kept: list[Any] = []
    device = platform.device
    with resident(platform, notes) as lanes:
        loop, host = lanes.loop, lanes.host
        assert isinstance(loop, CudaLoop)

        def on_stream(call: Callable[[], Any]) -> Callable[[], None]:
            def run() -> None:
                with host.beside():
                    kept.append(call())
                host.synchronize()

            return run

        calls: dict[str, Callable[[], object]] = {
            "a kernel of torch": on_stream(lambda: torch.ones(8, device=device) + 1),
            "device allocation": lambda: kept.append(
                torch.empty(256 << 20, dtype=torch.uint8, device=device)
            ),
            "pinned allocation": lambda: kept.append(
                torch.empty(64 << 20, dtype=torch.uint8, pin_memory=True)
            ),
            "load of a Triton kernel": on_stream(lambda: add_one(device)),
        }
        for name, call in calls.items():
            beside(notes, loop, name, call)


def guard(platform: Platform, notes: Notes) -> None:
    """Asks for page-locked memory while a loop is resident, and while it is off the device."""
    with resident(platform, notes) as lanes:
        loop, host = lanes.loop, lanes.host
        try:
            host.full((16,), 0, torch.int32)
        except ResidencyError as error:
            notes.fact("refused beside the loop", str(error))
        else:
            what = "page-locked memory is given beside a resident loop, where it may wait for ever"
            notes.finding(Gravity.ERROR, what)
        with loop.quiesced():
            host.full((16,), 0, torch.int32)
        notes.fact("given with the loop off the device", True)


def streams(platform: Platform, notes: Notes) -> None:
    """Counts the streams of torch that wait for the loop's end, because they share a connection
    with a lane."""
    shared = []
    with resident(platform, notes, lanes=_LANES) as lanes:  # each of its own streams is probed
        made = [torch.cuda.Stream() for _ in range(_STREAMS)]
        one = torch.ones(8, device=platform.device)
        ended = []
        for stream in made:
            with torch.cuda.stream(stream):
                one.add_(1)
                event = torch.cuda.Event()
                event.record(stream)
                ended.append(event)
        deadline = time.monotonic() + 3.0
        while time.monotonic() < deadline and not all(event.query() for event in ended):
            time.sleep(0.01)
        shared = [number for number, event in enumerate(ended) if not event.query()]
        with lanes.loop.quiesced():
            platform.synchronize()
    notes.fact("streams that wait behind the loop", shared, of=_STREAMS)
    notes.headline("streams of torch that wait behind the loop", len(shared), f"of {_STREAMS}")
    if shared:
        notes.finding(Gravity.WAITS, f"streams {shared} of torch's share a connection with a lane")


@dataclass
class _Sequence:
    """A sequence whose tokens are known, and how far a lane has come with it."""

    known: list[int]
    prompt: int
    pages: list[int]
    position: int = 0

    @property
    def left(self) -> int:
        """Steps that it still has."""
        return len(self.known) - 1 - self.position

    def due(self, steps: int) -> list[int | None]:
        """Tokens that the next steps must choose; None within the prompt, where any is right."""
        ends = range(self.position + 1, self.position + 1 + steps)
        return [self.known[end] if end >= self.prompt else None for end in ends]


class _Lane:
    """Sequences of one lane, a random part of which goes on with every step."""

    def __init__(
        self, lane: int, known: list[tuple[list[int], int]], most: int, rng: random.Random
    ) -> None:
        self.lane, self.known, self.rng = lane, known, rng
        each = PAGES // 2 // most
        first = lane * (PAGES // 2)
        self.sequences = [
            self._new(list(range(first + i * each, first + (i + 1) * each))) for i in range(most)
        ]
        self.flying: list[_Sequence] = []
        self.due: list[list[int | None]] = []

    def push(self, lanes: Lanes, longest_lease: int) -> None:
        rng = self.rng
        self.sequences = [s if s.left else self._new(s.pages) for s in self.sequences]
        self.flying = rng.sample(self.sequences, rng.randint(1, len(self.sequences)))
        # In a lease the device feeds back what it chose, which is right from a prompt's end on.
        fed = all(s.position >= s.prompt - 1 for s in self.flying)
        most = min(longest_lease, *(s.left for s in self.flying)) if fed else 1
        lease = rng.choice((1, 1, 1, most))
        rows = [Row([s.known[s.position]], s.position, s.pages) for s in self.flying]
        lanes.push(self.lane, 0, rows, lease=lease)
        self.due = [s.due(lease) for s in self.flying]

    def take(self, tokens: list[list[int]]) -> str:
        """Takes the tokens [steps][rows] of what was pushed; returns what is wrong with the first
        wrong one."""
        wrong = ""
        for row, (sequence, due) in enumerate(zip(self.flying, self.due, strict=True)):
            for step, expected in enumerate(due):
                if expected not in (None, tokens[step][row]) and not wrong:
                    wrong = (
                        f"chose {tokens[step][row]} at position {sequence.position + step}, the "
                        f"reference {expected}"
                    )
            sequence.position += len(due)
        return wrong

    def _new(self, pages: list[int]) -> _Sequence:
        self.rng.shuffle(pages)
        return _Sequence(*self.rng.choice(self.known), pages)


def many_steps(platform: Platform, notes: Notes) -> None:
    """Steps on two lanes, single ones and leases, of rows, positions, pages and tokens that change
    every time; each must choose the reference's tokens."""
    scale, name = platform.scale, platform.scale.models[0]
    rng = random.Random(5)
    notes.at("computes the reference", model=name)
    known = _known(platform, name)
    done = wrong = told = 0
    began = time.monotonic()
    with resident(platform, notes, lanes=2) as lanes:
        most = min(4, scale.buckets[-1])
        own = [_Lane(lane, known, most, rng) for lane in (0, 1)]
        for lane in own:
            lane.push(lanes, scale.new_tokens)
        while done < scale.steps:
            if done >= told:
                notes.at(f"step {done} of {scale.steps}", model=name)
                told += max(1, scale.steps // 20)
            number, tokens = lanes.pop()
            said = own[number].take(tokens.tolist())
            if said and not wrong:
                notes.finding(Gravity.WRONG, f"step {done}: {said}", model=name, lane=number)
            wrong += bool(said)
            done += len(tokens)
            own[number].push(lanes, scale.new_tokens)
        for _ in own:
            lanes.pop()
    notes.fact("steps", done, wrong=wrong, seconds=round(time.monotonic() - began, 1))
    notes.headline("steps whose inputs changed every time", done, f"steps, {wrong} wrong")


def _known(platform: Platform, name: str) -> list[tuple[list[int], int]]:
    """Sequences of the reference: prompt and greedy tokens; and the prompt's length."""
    scale = platform.scale
    found = []
    for prompt in prompts(2 * scale.prompts, scale.prompt_tokens):
        chosen = Reference(platform, name).greedy(prompt, scale.new_tokens)
        found.append((prompt + chosen, len(prompt)))
    return found
