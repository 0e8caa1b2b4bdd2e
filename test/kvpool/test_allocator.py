"""The page allocator against a model that counts every byte of every page, one by one."""

import time

import pytest
from crosspool.config.deployment import ConfigError
from crosspool.kvpool.allocator import PageAllocator
from crosspool.kvpool.layout import KVLayout
from crosspool.models.spec import DenseFFN, GQASpec, ModelSpec, RopeSpec
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule


def model(bytes_per_token: int) -> ModelSpec:
    """A one-layer model with that many bytes of KV per token (a multiple of 8)."""
    head_dim = bytes_per_token // 8
    return ModelSpec(
        family="test",
        hidden=8,
        vocab=8,
        context=1024,
        dtype="float32",
        norm_eps=1e-6,
        tied_embeddings=False,
        attention=GQASpec(
            q_heads=1,
            kv_heads=1,
            head_dim=head_dim,
            scale=1.0,
            rope=RopeSpec(dim=head_dim, interleaved=False),
        ),
        ffn=(DenseFFN(intermediate=8),),
        eos_token_ids=(0,),
    )


class AgainstBruteForce(RuleBasedStateMachine):
    """Every answer of the allocator, and its counters after every call."""

    @initialize(
        budget=st.integers(6, 30),
        chunk_bytes=st.sampled_from([64, 96, 128]),
        page_bytes=st.lists(st.sampled_from([8, 24, 40, 64, 72, 200, 320]), min_size=1, max_size=3),
    )
    def make(self, budget, chunk_bytes, page_bytes):
        self.budget, self.chunk_bytes, self.page_bytes = budget, chunk_bytes, page_bytes
        layouts = [KVLayout(model(nbytes), 1, chunk_bytes) for nbytes in page_bytes]
        self.allocator = PageAllocator(budget, layouts)
        self.pages = [budget * chunk_bytes // nbytes for nbytes in page_bytes]
        self.live = []
        self.mapped = [set() for _ in page_bytes]

    def chunks_of(self, index, pages):
        size = self.page_bytes[index]
        return {byte // self.chunk_bytes for p in pages for byte in range(p * size, (p + 1) * size)}

    def reserved(self, index):
        return self.chunks_of(index, [p for r in self.live if r.model == index for p in r.pages])

    def free_chunks(self):
        return self.budget - sum(len(self.reserved(i)) for i in range(len(self.pages)))

    def expected(self, index, count):
        """The pages that must be given, or None."""
        taken = {p for r in self.live if r.model == index for p in r.pages}
        reserved = self.reserved(index)
        free = [p for p in range(self.pages[index]) if p not in taken]
        free.sort(key=lambda p: (not self.chunks_of(index, [p]) <= reserved, p))
        if len(free) < count:
            return None
        new = self.chunks_of(index, free[:count]) - reserved
        return free[:count] if len(new) <= self.free_chunks() else None

    @rule(data=st.data(), count=st.integers(1, 20))
    def reserve(self, data, count):
        index = data.draw(st.integers(0, len(self.pages) - 1))
        expected = self.expected(index, count)
        assert self.allocator.can_reserve(index, count) == (expected is not None)
        reservation = self.allocator.reserve(index, count)
        if expected is None:
            assert reservation is None
            return
        assert reservation is not None
        assert reservation.model == index
        assert reservation.pages == expected
        self.live.append(reservation)

    @precondition(lambda self: self.live)
    @rule(data=st.data(), count=st.integers(0, 25))
    def chunks_to_map(self, data, count):
        reservation = data.draw(st.sampled_from(self.live))
        chunks = self.allocator.chunks_to_map(reservation, count)
        mapped = self.mapped[reservation.model]
        wanted = self.chunks_of(reservation.model, reservation.pages[:count])
        assert chunks == sorted(wanted - mapped)
        mapped |= set(chunks)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def release(self, data):
        reservation = data.draw(st.sampled_from(self.live))
        self.live.remove(reservation)
        chunks = self.allocator.release(reservation)
        mapped = self.mapped[reservation.model]
        assert chunks == sorted(mapped - self.reserved(reservation.model))
        mapped -= set(chunks)
        with pytest.raises(ValueError, match="released"):
            self.allocator.release(reservation)

    @invariant()
    def counters(self):
        if not hasattr(self, "live"):
            return
        assert self.allocator.free_chunks == self.free_chunks() >= 0
        for index, pages in enumerate(self.pages):
            held = [p for r in self.live if r.model == index for p in r.pages]
            assert len(set(held)) == len(held)
            assert self.allocator.capacity(index) == pages
            assert self.allocator.free_pages(index) == pages - len(held)
            assert self.allocator.reserved_chunks(index) == len(self.reserved(index))
            assert self.allocator.mapped_chunks(index) == len(self.mapped[index])
            assert self.mapped[index] <= self.reserved(index)


AgainstBruteForce.TestCase.settings = settings(
    max_examples=60, stateful_step_count=30, deadline=None
)
TestAllocator = AgainstBruteForce.TestCase


def test_the_whole_budget_is_one_models_when_it_is_alone():
    layouts = [KVLayout(model(104), 16, 4096), KVLayout(model(8), 16, 4096)]
    allocator = PageAllocator(13, layouts)
    everything = allocator.reserve(0, allocator.capacity(0))
    assert everything.pages == list(range(13 * 4096 // (104 * 16)))
    assert allocator.reserve(1, 1) is None
    allocator.release(everything)
    assert allocator.free_chunks == 13
    assert allocator.reserve(1, allocator.capacity(1)) is not None


def test_a_budget_without_one_page_names_the_field():
    with pytest.raises(ConfigError, match=r"kv_pool_bytes.*model 1"):
        PageAllocator(1, [KVLayout(model(8), 1, 64), KVLayout(model(72), 1, 64)])


def test_no_pages_are_no_reservation():
    with pytest.raises(ValueError, match="at least one"):
        PageAllocator(4, [KVLayout(model(8), 1, 64)]).reserve(0, 0)


def test_a_reservation_of_another_allocator_is_refused():
    layouts = [KVLayout(model(8), 1, 64)]
    foreign = PageAllocator(4, layouts).reserve(0, 1)
    allocator = PageAllocator(4, layouts)
    with pytest.raises(ValueError, match="not the allocator's"):
        allocator.chunks_to_map(foreign, 1)


def test_reserving_among_100k_pages_is_fast():
    layout = KVLayout(model(20_000), 10, 2 << 20)
    allocator = PageAllocator(10_000, [layout] * 3)
    assert allocator.capacity(0) > 100_000
    live, seconds = [], []
    for turn in range(200):
        begin = time.perf_counter()
        live.append(allocator.reserve(turn % 3, 40 + turn))
        seconds.append(time.perf_counter() - begin)
        if turn % 2:
            allocator.release(live.pop(turn // 3))
    assert all(reservation is not None for reservation in live)
    assert sorted(seconds)[len(seconds) // 2] < 0.002
