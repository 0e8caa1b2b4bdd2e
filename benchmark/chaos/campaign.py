"""One run: the fault-free answers, calm traffic, traffic under faults, and what is left at the
end."""

from __future__ import annotations

import asyncio
import os
import random
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil

from benchmark.chaos.faults import VICTIMS, Fault, Injector, processes_titled
from benchmark.chaos.leftovers import Holdings, measure
from benchmark.chaos.traffic import Outcome, Traffic, questions
from benchmark.server import TINY_MODELS, Server

CALM = "none"
"""Kind under which pauses and outcomes before the first fault are counted."""
_HOLDER = VICTIMS["weights"]
_BACK_SECONDS = 60.0
"""Time for everything to be back after the last fault."""
_FIRST, _SECOND = "first core", "second core"
_PLACEMENTS = {
    "one-device": ([_FIRST], [_FIRST], "tp"),
    "two-devices": ([_FIRST], [_SECOND], "tp"),
    "tp": ([_FIRST], [_SECOND, _FIRST], "tp"),
    "ep": ([_FIRST], [_SECOND, _FIRST], "ep"),
    "two-attention-ranks": ([_FIRST, _SECOND], [_SECOND, _FIRST], "tp"),
}
"""Cores of the KV pool and of the weight pool, and how FFN ranks share weights."""
PLACEMENTS = tuple(_PLACEMENTS)


@dataclass(frozen=True)
class Plan:
    """What a run does. ``every``: mean time between two faults, in seconds."""

    seed: int
    seconds: float
    every: float
    kinds: Sequence[str]
    placement: str
    loop: str
    dtype: str
    clients: int = 20
    tokens: int = 150
    calm_seconds: float = 5.0


@dataclass
class Row:
    """What came of the faults of one kind."""

    kind: str
    faults: int = 0
    requests: int = 0
    """Requests that were open when a fault came."""
    outcomes: Counter[str] = field(default_factory=Counter)
    """Requests that ended after a fault and before the next one, by what came of them."""
    pauses: list[float] = field(default_factory=list)
    """Longest pause of any stream for each fault, in seconds; 0 where none was noted."""

    @property
    def median(self) -> float:
        return statistics.median(self.pauses) if self.pauses else 0.0

    @property
    def worst(self) -> float:
        return max(self.pauses, default=0.0)


@dataclass(frozen=True)
class Verdict:
    """What came of a run."""

    rows: list[Row]
    problems: list[str]
    """Everything that should not have happened, a line for each; empty after a good run."""
    before: Holdings
    after: Holdings


def pools(placement: str) -> tuple[list[str], list[str]]:
    """Return the devices of the KV pool and of the weight pool. Raises RuntimeError where the
    machine has too few cores."""
    kv, weights, _ = _PLACEMENTS[placement]
    cores = sorted(os.sched_getaffinity(0))
    if _SECOND in (*kv, *weights) and len(cores) < 2:
        raise RuntimeError(f"{placement} needs two cores")
    names = {_FIRST: f"cpu:{cores[0]}", _SECOND: f"cpu:{cores[-1]}"}
    return [names[one] for one in kv], [names[one] for one in weights]


def flags(placement: str, loop: str, dtype: str, kv_pool_bytes: str = "64MiB") -> list[str]:
    """Return the server's flags. Raises RuntimeError where the machine has too few cores."""
    kv, weights = pools(placement)
    return [
        *["--kv-pool-devices", ",".join(kv), "--weight-pool-devices", ",".join(weights)],
        *["--ffn-parallel", _PLACEMENTS[placement][2], "--kv-pool-bytes", kv_pool_bytes],
        *["--loop", loop, "--dtype", dtype, "--restart-limit", "1000"],
    ]


def run(plan: Plan, say: Callable[[str], object]) -> Verdict:
    """Run ``plan`` against a server of its own. ``say`` gets a line for every fault and for every
    request that is not as it should be, as they come."""
    words = flags(plan.placement, plan.loop, plan.dtype)
    with _folder_of_its_own() as folder, Server(words) as server:
        return asyncio.run(_Campaign(plan, server, folder, say).run())


@contextmanager
def _folder_of_its_own() -> Iterator[Path]:
    """Have servers make their runtime folders in a folder where no other server makes any."""
    before = os.environ.get("TMPDIR")
    with TemporaryDirectory(prefix="chaos-") as folder:
        os.environ["TMPDIR"] = folder
        try:
            yield Path(folder)
        finally:
            if before is None:
                del os.environ["TMPDIR"]
            else:
                os.environ["TMPDIR"] = before


class _Campaign:
    def __init__(
        self, plan: Plan, server: Server, folder: Path, say: Callable[[str], object]
    ) -> None:
        self._plan = plan
        self._server = server
        self._folder = folder
        self._say = say
        self._launcher = server.processes()["crosspool::launcher"]
        self._traffic = Traffic(
            server.url, questions(TINY_MODELS, plan.tokens), plan.clients, plan.seed
        )
        self._faults: list[Fault] = []
        self._titles = server.processes().keys()

    def _missing(self) -> set[str]:
        return self._titles - self._server.processes().keys()

    async def _renew_devices(self) -> None:
        """Kill the devices whose holders of weights are away: these come back with the devices'
        next processes, and not before."""
        for title in await asyncio.to_thread(self._missing):
            if title.startswith(_HOLDER):
                device = title.replace(_HOLDER, VICTIMS["device"])
                for _, process in processes_titled(self._launcher, device):
                    process.kill()

    async def run(self) -> Verdict:
        plan, traffic = self._plan, self._traffic
        await traffic.learn()
        await self._under_traffic(plan.calm_seconds)
        calm = len(traffic.outcomes)
        problems = await self._settle("after calm traffic")
        before = await asyncio.to_thread(measure, self._launcher, self._folder)
        rng = random.Random(plan.seed)
        injector = Injector(self._launcher, rng, plan.kinds)
        await self._under_traffic(plan.seconds, injector)
        problems += await self._settle("after the faults")
        await self._renew_devices()
        problems += await self._settle("after devices were renewed")
        after = await asyncio.to_thread(measure, self._launcher, self._folder)
        problems += after.growth(before)
        rows, told = judge(traffic.outcomes, self._faults)
        if not calm:
            problems.append("no request ended without faults")
        return Verdict(rows, [*told, *problems], before, after)

    async def _under_traffic(self, seconds: float, injector: Injector | None = None) -> None:
        """Return when ``seconds`` are over, every answer is there and nothing is slow any more."""
        traffic = asyncio.create_task(self._traffic.run())
        looking = None if injector is None else asyncio.create_task(self._look(injector))
        try:
            end = time.monotonic() + seconds
            while time.monotonic() < end and not traffic.done() and self._lives():
                if injector is None:
                    await asyncio.sleep(min(0.1, max(0.0, end - time.monotonic())))
                else:
                    await self._wait_and_inject(injector, end)
            if injector is not None:
                await injector.settle()
        finally:
            if looking is not None:
                looking.cancel()
            self._traffic.end()
            await traffic

    async def _look(self, injector: Injector) -> None:
        """Tell ``injector`` whenever everything is back."""
        while True:
            if await asyncio.to_thread(self._is_whole):
                injector.all_back()
            await asyncio.sleep(0.3)

    def _is_whole(self) -> bool:
        try:
            if any(not title.startswith(_HOLDER) for title in self._missing()):
                return False
            return self._server.request("GET", "/health?strict=1")[0] == 200
        except (OSError, psutil.Error):
            return False

    def _lives(self) -> bool:
        return bool(self._launcher.is_running() and self._launcher.status() != "zombie")

    async def _wait_and_inject(self, injector: Injector, end: float) -> None:
        wait = injector.rng.expovariate(1 / self._plan.every)
        await asyncio.sleep(min(wait, max(0.0, end - time.monotonic())))
        if time.monotonic() < end and (fault := injector.inject()) is not None:
            self._faults.append(fault)
            self._say(f"{fault.kind}: {fault.process} ({fault.pid})")

    async def _settle(self, when: str) -> list[str]:
        """Wait until every process is back, nothing is computed and the KV pool is empty; return
        what is not so in time."""
        deadline = time.monotonic() + _BACK_SECONDS
        while True:
            problem = await asyncio.to_thread(self._unsettled)
            if problem is None:
                return []
            if time.monotonic() > deadline:
                return [f"{when}: {problem}"]
            await asyncio.sleep(0.3)

    def _unsettled(self) -> str | None:
        if not self._lives():
            return f"the server has ended: {self._server.log[-2000:]}"
        try:
            if missing := [t for t in self._missing() if not t.startswith(_HOLDER)]:
                return f"{', '.join(missing)} are not back"
            code, text = self._server.request("GET", "/health?strict=1")
            if code != 200:
                return f"/health?strict=1 answers {code}: {text}"
            status = self._server.status()
            busy = [m["name"] for m in status["models"] if m["waiting"] or m["running"]]
            if busy:
                return f"requests of {', '.join(busy)} are still there"
            if any(rank["promised_bytes"] for rank in status["ranks"]):
                return f"KV memory is still promised: {status['ranks']}"
            code, text = self._server.manage("/flush_cache")
            if code != 200:
                return f"/flush_cache answers {code}: {text}"
            pools = self._server.request("GET", "/crosspool/pools")[1]
            if any(pool["free_bytes"] != pool["budget_bytes"] for pool in pools):
                return f"the KV pool is not empty: {pools}"
        except OSError as error:
            return f"{type(error).__name__}: {error}"
        return None


def judge(outcomes: Sequence[Outcome], faults: Sequence[Fault]) -> tuple[list[Row], list[str]]:
    """Return a row for each kind of fault, and a line for each request that is not as it should be.

    A pause belongs to the first fault that came while it lasted, or else to the last before it. A
    request that ends belongs to the last fault before its end. A request may be cut only by a fault
    of an HTTP process while it was open, or shortly before."""
    rows = {kind: Row(kind) for kind in [CALM, *dict.fromkeys(fault.kind for fault in faults)]}
    longest = [0.0 for _ in faults]
    problems = []
    for outcome in outcomes:
        before = [fault for fault in faults if fault.began <= outcome.done]
        row = rows[before[-1].kind if before else CALM]
        open_at = [fault for fault in before if fault.ends_after(outcome.sent)]
        kind = outcome.kind
        if kind == "cut" and not any(fault.cuts for fault in open_at):
            kind = "failed"
        row.outcomes[kind] += 1
        if kind in ("failed", "wrong", "inexact"):
            during = Counter(fault.kind for fault in open_at) or {"no fault": 1}
            told = ", ".join(f"{count} {name}" for name, count in during.items())
            problems.append(f"{kind} ({told}): {outcome.question}: {outcome.note}")
        for begin, end in outcome.pauses if kind != "cut" else ():
            index = _blamed(faults, begin, end)
            if index is None:
                rows[CALM].pauses.append(end - begin)
            else:
                longest[index] = max(longest[index], end - begin)
    for fault, pause in zip(faults, longest, strict=True):
        row = rows[fault.kind]
        row.faults += 1
        row.requests += sum(o.sent <= fault.began <= o.done for o in outcomes)
        row.pauses.append(pause)
    return list(rows.values()), problems


def _blamed(faults: Sequence[Fault], begin: float, end: float) -> int | None:
    """The index of the fault to which a pause belongs; None: it was over before the first."""
    within = [i for i, fault in enumerate(faults) if begin <= fault.began <= end]
    before = [i for i, fault in enumerate(faults) if fault.began < begin]
    return within[0] if within else before[-1] if before else None
