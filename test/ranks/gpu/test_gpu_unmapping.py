"""No chunk of the KV pool is unmapped before the resident loop has told of the end of the last step
that may touch it: over the fake drivers of graphs and of memory, with leases, stop tokens and
releases of requests that still run."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

import pytest
from support.packages import installed

if not installed("triton"):
    pytest.skip("triton is not installed", allow_module_level=True)
pytest.importorskip("msgspec", reason="msgspec is not installed (the messages of a step)")

from crosspool.ranks.executor import QueuedExecutor
from crosspool.transport.messages import Logprobs, Open, Release, Row, Sampling, Step
from support import fake_cuda_graphs
from support.fake_resident import FakeResident
from support.one_gpu import LEASE, PAGE_SIZE, PAGES, VOCAB
from support.stepping_gpu import CHUNKS_OF_PAGE, MODELS, SteppingGPU

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="stages are called on CPU tensors"
)
REQUESTS = 60
STOP = 5


@pytest.fixture(scope="module")
def fake(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeResident]:
    if fake_cuda_graphs.COMPILER is None:
        pytest.skip("no C++ compiler")
    made = FakeResident(tmp_path_factory.mktemp("fake_cuda"))
    yield made
    assert made.cuda.live == 0 and made.cuda.violations == []
    made.cuda.close()


@pytest.fixture(params=["quiesced", "resident"])
def gpu(fake: FakeResident, request: pytest.FixtureRequest) -> Iterator[SteppingGPU]:
    """Memory is mapped and unmapped while the loop is off the device, or while it is on it."""
    draw = random.Random(3)
    made = SteppingGPU(fake, lambda: draw.randrange(1, VOCAB))
    if request.param == "quiesced":
        made.pool.quiesced = made.executor.quiesced
    yield made
    made.close()
    assert made.driver.is_clean


class Requests:
    """Requests of random lengths. Each is opened with a step, takes some more, and is released,
    often before the step that was sent last has ended."""

    def __init__(self, gpu: SteppingGPU) -> None:
        self.gpu, self.draw = gpu, random.Random(7)
        self.free = [list(range(PAGES)) for _ in range(MODELS)]
        self.live: dict[int, tuple[int, list[int], int]] = {}
        """Model, pages and known tokens of each request."""
        self.steps = self.results = self.leased = self.released_under_way = 0
        self.running: dict[int, int] = {}
        """Steps under way, and their requests."""

    def run(self) -> None:
        number = 0
        while number < REQUESTS or self.live:
            idle = [r for r in self.live if r not in self.running.values()]
            choice = self.draw.random()
            if number < REQUESTS and len(self.live) < 3 and choice < 0.5:
                number += 1
                self._open(number)
            elif idle and choice < 0.7:
                self._go_on(self.draw.choice(idle))
            elif self.live and choice < 0.85:
                self._release(self.draw.choice(sorted(self.live)))
            for result in self.gpu.executor.run(0.0):
                self.results += 1
                self.leased += result.more
                if not result.more:
                    self.running.pop(result.step, None)
        while self.running or not self.gpu.executor.quiet:
            for result in self.gpu.executor.run(0.0):
                self.running.pop(result.step, None)

    def _open(self, request: int) -> None:
        model, length = self.draw.randrange(MODELS), self.draw.randint(1, 8)
        pages = [self._take(model) for _ in range(-(-(length + LEASE) // PAGE_SIZE))]
        stops = (STOP,) if self.draw.random() < 0.5 else ()
        self.live[request] = model, pages, length
        opened = Open(
            request=request,
            prompt_len=length,
            sampling=Sampling(temperature=0.0, stop_token_ids=stops),
            logprobs=Logprobs(),
        )
        self._send(request, 0, length, pages, [opened])

    def _go_on(self, request: int) -> None:
        model, pages, known = self.live[request]
        more: list[int] = []
        while (len(pages) + len(more)) * PAGE_SIZE < known + 1 + LEASE:
            if len(pages) + len(more) == PAGES // 3:
                return self._release(request)
            more.append(self._take(model))
        self.live[request] = model, pages + more, known + 1
        self._send(request, known, 1, more, [])

    def _send(
        self, request: int, start: int, rows: int, pages: list[int], opens: list[Open]
    ) -> None:
        self.steps += 1
        self.running[self.steps] = request
        row = Row(request=request, start=start, tokens=[1] * rows, pages=pages, sample=True)
        self.gpu.executor.submit(
            Step(
                step=self.steps,
                model=self.live[request][0],
                map_chunks=_chunks(pages),
                opens=opens,
                rows=[row],
                lease=LEASE if rows == 1 else 1,
            )
        )

    def _release(self, request: int) -> None:
        model, pages, _ = self.live.pop(request)
        self.free[model] += pages
        self.released_under_way += request in self.running.values()
        self.gpu.executor.submit(
            Release(model=model, requests=[request], unmap_chunks=_chunks(pages))
        )

    def _take(self, model: int) -> int:
        pages = self.free[model]
        return pages.pop(self.draw.randrange(len(pages)))


def _chunks(pages: list[int]) -> list[int]:
    return [page * CHUNKS_OF_PAGE + i for page in pages for i in range(CHUNKS_OF_PAGE)]


def test_chunks_are_unmapped_behind_the_last_step_that_used_them(gpu: SteppingGPU) -> None:
    requests = Requests(gpu)
    requests.run()
    assert requests.released_under_way > REQUESTS // 4 and requests.leased > REQUESTS
    assert sum(gpu.pool.mapped_bytes(model) for model in range(MODELS)) == 0
    assert gpu.driver.violations == [] and gpu.faults == []


def test_a_release_that_waits_for_no_step_would_be_seen(
    gpu: SteppingGPU, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The order is broken on purpose: releases act at once."""
    in_order = QueuedExecutor.submit

    def submit(self: QueuedExecutor, operation: Step | Release) -> None:
        if isinstance(operation, Release) and not self._queue:
            self._attention.release(operation)
        else:
            in_order(self, operation)

    monkeypatch.setattr(QueuedExecutor, "submit", submit)
    Requests(gpu).run()
    assert any("under a kernel" in said for said in gpu.driver.violations)
    assert any("touched unmapped memory" in said for said in gpu.faults)
