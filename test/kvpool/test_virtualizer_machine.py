"""Both virtualizers through random maps and unmaps, and models that come and go: what is mapped
holds what was written, and every byte of the budget is in one place. The GPU's runs on the fake
driver, which refuses whatever the real one would, and fails at any call."""

from __future__ import annotations

import contextlib
import itertools

import pytest
import torch
from crosspool.kernels.cuda_driver import CudaError
from crosspool.kvpool.cuda_virtualizer import CudaVirtualizer
from crosspool.kvpool.mremap_virtualizer import MremapVirtualizer
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from support.fake_cuda_memory import OUT_OF_MEMORY, FakeCuda

CHUNK = 4 << 20
BUDGET = 7
RANGES = (9, 5)
MODELS = st.integers(0, len(RANGES) - 1)
CHUNKS = st.lists(st.integers(-1, max(RANGES)), max_size=5)


class Machine(RuleBasedStateMachine):
    """The same rules for both; ``written`` says what each mapped chunk holds."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = self.make()
        self.numbers = list(range(len(RANGES)))
        """The number of the model that has each range now."""
        self.written: list[dict[int, int]] = [{} for _ in RANGES]
        self.tensors = [
            self.pool.tensor(model, (chunks, CHUNK // 8), torch.int64)
            for model, chunks in enumerate(RANGES)
        ]
        self.stamp = 0

    def make(self):
        raise NotImplementedError

    @property
    def mapped(self) -> int:
        return sum(map(len, self.written))

    @rule(model=MODELS, chunks=CHUNKS)
    def map(self, model: int, chunks: list[int]) -> None:
        written = self.written[model]
        fits = (
            all(0 <= c < RANGES[model] and c not in written for c in chunks)
            and len(set(chunks)) == len(chunks)
            and self.mapped + len(chunks) <= BUDGET
        )
        if not fits:
            with pytest.raises(ValueError, match=f"model {self.numbers[model]}: "):
                self.pool.map(self.numbers[model], chunks)
            return
        self.pool.map(self.numbers[model], chunks)
        for chunk in chunks:
            self.write(model, chunk)

    @rule(model=MODELS, chunks=CHUNKS)
    def unmap(self, model: int, chunks: list[int]) -> None:
        written = self.written[model]
        if any(c not in written for c in chunks) or len(set(chunks)) != len(chunks):
            with pytest.raises(ValueError, match="not mapped"):
                self.pool.unmap(self.numbers[model], chunks)
            return
        self.pool.unmap(self.numbers[model], chunks)
        for chunk in chunks:
            del written[chunk]

    @rule(model=MODELS, data=st.data())
    def unmap_some(self, model: int, data: st.DataObject) -> None:
        if self.written[model]:
            self.unmap(model, data.draw(st.lists(st.sampled_from([*self.written[model]]))))

    @rule(model=MODELS)
    def another_comes(self, model: int) -> None:
        """Another model comes in the place of one, if that has nothing mapped."""
        number, chunks = self.numbers[model], RANGES[model]
        if self.written[model]:
            with pytest.raises(ValueError, match=f"model {number}: .* chunks are mapped"):
                self.pool.remove(number)
            return
        self.pool.remove(number)
        number = self.numbers[model] = 1 + max(self.numbers)
        self.pool.add(number, chunks * CHUNK - 5)
        self.tensors[model] = self.pool.tensor(number, (chunks, CHUNK // 8), torch.int64)

    def write(self, model: int, chunk: int) -> None:
        self.stamp += 1
        self.tensors[model][chunk, ::4096] = self.stamp
        self.written[model][chunk] = self.stamp

    @invariant()
    def chunks_hold_what_was_written(self) -> None:
        for tensor, written in zip(self.tensors, self.written, strict=True):
            for chunk, stamp in written.items():
                assert (tensor[chunk, ::4096] == stamp).all()

    @invariant()
    def bytes_are_counted(self) -> None:
        for model, written in enumerate(self.written):
            assert self.pool.mapped_bytes(self.numbers[model]) == len(written) * CHUNK
        assert self.pool.free_bytes == (BUDGET - self.mapped) * CHUNK
        assert self.pool.budget_bytes == BUDGET * CHUNK

    def teardown(self) -> None:
        self.pool.close()
        self.pool.close()


def ranges():
    return {model: chunks * CHUNK for model, chunks in enumerate(RANGES)}


class MremapMachine(Machine):
    def make(self) -> MremapVirtualizer:
        return MremapVirtualizer(BUDGET * CHUNK, CHUNK, ranges())


class CudaMachine(Machine):
    def make(self) -> CudaVirtualizer:
        self.driver = FakeCuda(total=10 * CHUNK)
        self.quiet = 0
        pool = CudaVirtualizer(self.driver, BUDGET * CHUNK, CHUNK, ranges())
        pool.quiesced = self.quiesced
        return pool

    @contextlib.contextmanager
    def quiesced(self):
        assert self.quiet == 0, "a loop is stopped twice"
        self.quiet += 1
        try:
            yield
        finally:
            self.quiet -= 1

    @precondition(lambda self: self.mapped < BUDGET)
    @rule(data=st.data(), call=st.sampled_from(["map", "set_access"]))
    def mapping_fails(self, data: st.DataObject, call: str) -> None:
        free = {
            model: [c for c in range(RANGES[model]) if c not in self.written[model]]
            for model in range(len(RANGES))
        }
        model = data.draw(st.sampled_from([m for m, chunks in free.items() if chunks]))
        most = min(BUDGET - self.mapped, len(free[model]))
        chunks = data.draw(
            st.lists(st.sampled_from(free[model]), min_size=1, max_size=most, unique=True)
        )
        ordered = sorted(chunks)
        runs = 1 + sum(b != a + 1 for a, b in itertools.pairwise(ordered))
        calls = len(chunks) if call == "map" else runs
        self.driver.fail[call] = data.draw(st.integers(0, calls - 1)), OUT_OF_MEMORY
        with pytest.raises(CudaError, match=f"{call}: {OUT_OF_MEMORY}"):
            self.pool.map(self.numbers[model], chunks)
        assert self.driver.fail == {}

    @precondition(lambda self: self.mapped > 0)
    @rule(data=st.data())
    def unmapping_fails(self, data: st.DataObject) -> None:
        model = data.draw(st.sampled_from([m for m, written in enumerate(self.written) if written]))
        chunks = data.draw(
            st.lists(st.sampled_from([*self.written[model]]), min_size=1, unique=True)
        )
        done = data.draw(st.integers(0, len(chunks) - 1))
        self.driver.fail["unmap"] = done, "CUDA_ERROR_UNKNOWN"
        with pytest.raises(CudaError, match="unmap: CUDA_ERROR_UNKNOWN"):
            self.pool.unmap(self.numbers[model], chunks)
        for chunk in chunks[:done]:
            del self.written[model][chunk]

    @rule(model=MODELS, call=st.sampled_from(["reserve", "free_reservation"]))
    def coming_fails(self, model: int, call: str) -> None:
        if self.written[model]:
            return
        self.driver.fail[call] = 0, OUT_OF_MEMORY
        with pytest.raises(CudaError, match=f"{call}: {OUT_OF_MEMORY}"):
            if call == "reserve":
                self.pool.add(1 + max(self.numbers), CHUNK)
            else:
                self.pool.remove(self.numbers[model])

    @invariant()
    def the_driver_agrees(self) -> None:
        driver = self.driver
        assert driver.used == BUDGET * CHUNK
        assert len(driver.mappings) == self.mapped
        assert driver.accessible_bytes == self.mapped * CHUNK
        assert all(memory.mappings <= 1 for memory in driver.handles.values())
        assert len(driver.handles) == BUDGET

    def teardown(self) -> None:
        super().teardown()
        assert self.driver.is_clean


MremapMachine.TestCase.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)
CudaMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
TestMremap = MremapMachine.TestCase
TestCuda = CudaMachine.TestCase
