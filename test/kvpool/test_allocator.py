"""The page allocator against a model that counts every byte of every page, one by one."""

import time

import pytest
from crosspool.config.deployment import ConfigError
from crosspool.kvpool.allocator import PageAllocator
from crosspool.kvpool.bounds import Bounds
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
    """Checks every result of the allocator, and its counters after every call."""

    @initialize(
        budget=st.integers(6, 30),
        chunk_bytes=st.sampled_from([64, 96, 128]),
        page_bytes=st.lists(st.sampled_from([8, 24, 40, 64, 72, 200, 320]), min_size=1, max_size=3),
        bounds=st.none()
        | st.lists(st.tuples(st.integers(0, 3), st.integers(6, 30)), min_size=3, max_size=3),
    )
    def make(self, budget, chunk_bytes, page_bytes, bounds):
        models = len(page_bytes)
        self.chunk_bytes, self.page_bytes = chunk_bytes, page_bytes
        self.floors = [floor for floor, _ in bounds[:models]] if bounds else [0] * models
        self.ceilings = [ceiling for _, ceiling in bounds[:models]] if bounds else [99] * models
        # a page of 320 bytes has room beside other models' floors
        self.budget = max(budget, 6 + sum(self.floors))
        layouts = {n: KVLayout(model(size), 1, chunk_bytes) for n, size in enumerate(page_bytes)}
        self.allocator = (
            PageAllocator(
                self.budget,
                layouts,
                Bounds(self.budget, dict(enumerate(self.floors)), dict(enumerate(self.ceilings))),
            )
            if bounds
            else PageAllocator(self.budget, layouts)
        )
        self.pages = [self.budget * chunk_bytes // nbytes for nbytes in page_bytes]
        self.promised = [set() for _ in page_bytes]
        self.cached = [set() for _ in page_bytes]
        self.mapped = [set() for _ in page_bytes]

    def chunks_of(self, index, pages):
        size = self.page_bytes[index]
        return {byte // self.chunk_bytes for p in pages for byte in range(p * size, (p + 1) * size)}

    def taken(self, index):
        return self.promised[index] | self.cached[index]

    def free_chunks(self):
        used = (len(self.chunks_of(i, self.taken(i))) for i in range(len(self.pages)))
        return self.budget - sum(used)

    def may_promise(self, index, pages):
        chunks = [len(self.chunks_of(i, held)) for i, held in enumerate(self.promised)]
        chunks[index] = len(self.chunks_of(index, self.promised[index] | set(pages)))
        with_floors = sum(max(c, f) for c, f in zip(chunks, self.floors, strict=True))
        return chunks[index] <= self.ceilings[index] and with_floors <= self.budget

    def choice(self, index, count, taken):
        """Returns the pages that must be given up when ``taken`` cannot be promised, or None."""
        promised = self.chunks_of(index, self.promised[index])
        charged = self.chunks_of(index, taken)

        def price(page):
            chunks = self.chunks_of(index, [page])
            return 0 if chunks <= promised else 1 if chunks <= charged else 2

        free = sorted((p for p in range(self.pages[index]) if p not in taken), key=price)
        return free[:count] if len(free) >= count else None

    def possible(self, index, count, taken, free_chunks):
        pages = self.choice(index, count, taken)
        if pages is None:
            return None
        new = self.chunks_of(index, pages) - self.chunks_of(index, taken)
        return pages if len(new) <= free_chunks and self.may_promise(index, pages) else None

    @rule(data=st.data(), count=st.integers(1, 20))
    def take(self, data, count):
        index = data.draw(st.integers(0, len(self.pages) - 1))
        cached = [(i, p) for i, pages in enumerate(self.cached) for p in sorted(pages)]
        fits = self.possible(index, count, self.promised[index], self.budget) is not None
        assert self.allocator.fits(index, count) == fits
        while (short := self.allocator.shortage(index, count)) and cached:
            assert self.possible(index, count, self.taken(index), self.free_chunks()) is None
            # never more than are needed: without one of them it does not fit either
            short = min(short, len(cached))
            for _ in range(short):
                i, page = cached.pop(data.draw(st.integers(0, len(cached) - 1)))
                assert self.possible(index, count, self.taken(index), self.free_chunks()) is None
                self.give_back(i, [page])
        assert (short == 0) == fits, "what fits without cached pages is had once they are gone"
        expected = self.possible(index, count, self.taken(index), self.free_chunks())
        assert (expected is not None) == fits
        if expected is None:
            with pytest.raises(ValueError, match="cannot be promised now"):
                self.allocator.take(index, count)
            return
        assert self.allocator.take(index, count) == expected
        self.promised[index] |= set(expected)

    def give_back(self, index, pages):
        chunks = self.allocator.free(index, pages)
        self.promised[index] -= set(pages)
        self.cached[index] -= set(pages)
        left = self.chunks_of(index, self.taken(index))
        assert chunks == sorted(self.mapped[index] - left)
        self.mapped[index] -= set(chunks)

    def some(self, data, sets):
        index = data.draw(st.sampled_from([i for i, pages in enumerate(sets) if pages]))
        pages = data.draw(st.lists(st.sampled_from(sorted(sets[index])), max_size=25, unique=True))
        return index, pages

    @precondition(lambda self: any(self.promised))
    @rule(data=st.data())
    def map(self, data):
        index, pages = self.some(data, self.promised)
        chunks = self.allocator.map(index, pages)
        assert chunks == sorted(self.chunks_of(index, pages) - self.mapped[index])
        self.mapped[index] |= set(chunks)

    @precondition(lambda self: any(self.promised))
    @rule(data=st.data())
    def keep(self, data):
        index, pages = self.some(data, self.promised)
        self.allocator.keep(index, pages)
        self.promised[index] -= set(pages)
        self.cached[index] |= set(pages)

    @precondition(lambda self: any(self.cached))
    @rule(data=st.data())
    def hold(self, data):
        index, pages = self.some(data, self.cached)
        if not self.may_promise(index, pages):
            return
        self.allocator.hold(index, pages)
        self.promised[index] |= set(pages)
        self.cached[index] -= set(pages)

    @precondition(lambda self: any(self.promised) or any(self.cached))
    @rule(data=st.data())
    def free(self, data):
        index, pages = self.some(data, [self.taken(i) for i in range(len(self.pages))])
        self.give_back(index, pages)
        if pages:
            with pytest.raises(ValueError, match="free"):
                self.allocator.free(index, pages)

    @invariant()
    def counters(self):
        if not hasattr(self, "pages"):
            return
        assert self.allocator.free_chunks == self.free_chunks() >= 0
        for index in range(len(self.pages)):
            promised = len(self.chunks_of(index, self.promised[index]))
            charged = len(self.chunks_of(index, self.taken(index)))
            assert self.allocator.promised_chunks(index) == promised <= self.ceilings[index]
            assert self.allocator.cached_chunks(index) == charged - promised
            assert self.allocator.mapped_chunks(index) == len(self.mapped[index])
            assert self.mapped[index] <= self.chunks_of(index, self.taken(index))
            limit = min(self.ceilings[index], self.budget - sum(self.floors) + self.floors[index])
            capacity = limit * self.chunk_bytes // self.page_bytes[index]
            assert self.allocator.capacity(index) == capacity


AgainstBruteForce.TestCase.settings = settings(
    max_examples=60, stateful_step_count=30, deadline=None
)
TestAllocator = AgainstBruteForce.TestCase


def test_the_whole_budget_is_one_models_when_it_is_alone():
    layouts = {0: KVLayout(model(104), 16, 4096), 1: KVLayout(model(8), 16, 4096)}
    allocator = PageAllocator(13, layouts)
    everything = allocator.take(0, allocator.capacity(0))
    assert everything == list(range(13 * 4096 // (104 * 16)))
    assert not allocator.fits(1, 1)
    allocator.keep(0, everything)
    assert allocator.fits(1, 1) and allocator.shortage(1, 1)
    allocator.free(0, everything)
    assert allocator.free_chunks == 13
    assert len(allocator.take(1, allocator.capacity(1))) == 13 * 4096 // (8 * 16)


def test_a_floor_is_kept_from_others_promises_but_not_from_what_they_cache():
    layouts = dict.fromkeys(range(2), KVLayout(model(64), 1, 64))
    allocator = PageAllocator(10, layouts, Bounds(10, floors={0: 0, 1: 4}, ceilings={0: 10, 1: 10}))
    assert allocator.capacity(0) == 6 and not allocator.fits(0, 7)
    first = allocator.take(0, 6)
    assert not allocator.fits(0, 1) and allocator.fits(1, 4)
    allocator.keep(0, first)
    allocator.take(0, 4)
    assert allocator.free_chunks == 0 and allocator.fits(1, 4)
    assert allocator.shortage(1, 4) == 4


def test_a_ceiling_bounds_promises_only():
    layouts = dict.fromkeys(range(2), KVLayout(model(64), 1, 64))
    allocator = PageAllocator(10, layouts, Bounds(10, floors={0: 0, 1: 0}, ceilings={0: 3, 1: 10}))
    assert allocator.capacity(0) == 3
    for _ in range(3):
        allocator.keep(0, allocator.take(0, 3))
    assert allocator.cached_chunks(0) == 9 and not allocator.fits(0, 4)


def test_a_budget_without_one_page_names_the_field():
    with pytest.raises(ConfigError, match=r"kv_pool_bytes.*model 1"):
        PageAllocator(1, {0: KVLayout(model(8), 1, 64), 1: KVLayout(model(72), 1, 64)})


def test_taking_among_100k_pages_is_fast():
    layout = KVLayout(model(20_000), 10, 2 << 20)
    allocator = PageAllocator(10_000, dict.fromkeys(range(3), layout))
    assert allocator.capacity(0) > 100_000
    live, seconds = [], []
    for turn in range(200):
        model_index, count = turn % 3, 40 + turn
        begin = time.perf_counter()
        assert allocator.fits(model_index, count)
        live.append((model_index, allocator.take(model_index, count)))
        seconds.append(time.perf_counter() - begin)
        if turn % 2:
            index, pages = live.pop(turn // 3)
            allocator.keep(index, pages[::2])
            allocator.free(index, pages[1::2])
    assert sorted(seconds)[len(seconds) // 2] < 0.004


def test_models_come_and_go_while_others_have_pages():
    layouts = {3: KVLayout(model(64), 1, 64)}
    bounds = Bounds.without_floors(10, layouts)
    allocator = PageAllocator(10, layouts, bounds)
    others = allocator.take(3, 4)
    bounds.floors[260], bounds.ceilings[260] = 2, 10
    allocator.add(260, KVLayout(model(128), 1, 64))
    assert allocator.within_bounds()
    assert not allocator.fits(3, 5) and allocator.fits(3, 4), "the floor of the other counts"
    pages = allocator.take(260, 3)
    with pytest.raises(ValueError, match="model 260 has 3 pages"):
        allocator.remove(260)
    allocator.free(260, pages)
    allocator.remove(260)
    bounds.remove(260)
    assert allocator.fits(3, 6) and allocator.free_chunks == 6
    allocator.free(3, others)


def test_a_floor_that_others_have_taken_is_noticed():
    layouts = {0: KVLayout(model(64), 1, 64)}
    bounds = Bounds.without_floors(10, layouts)
    allocator = PageAllocator(10, layouts, bounds)
    allocator.take(0, 8)
    bounds.floors[1], bounds.ceilings[1] = 3, 10
    allocator.add(1, KVLayout(model(64), 1, 64))
    assert not allocator.within_bounds()
