"""The prefix cache against a dictionary of prefixes: 10^5 random operations."""

from dataclasses import dataclass, field
from random import Random

import pytest
from crosspool.scheduler.prefix_cache import Entry, PageKeys, PrefixCache
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from support.marks import slow_but

PAGE = 2
MODELS = 3
NAMESPACES = (("", ""), ("salt", ""), ("", "salt"))
Prefix = tuple[int, tuple[str, str], tuple[int, ...]]
"""Model, namespace and all tokens up to the end of a page."""


@dataclass(eq=False)
class Live:
    """A request that runs: it reads ``path`` and has written ``own`` behind it."""

    model: int
    namespace: tuple[str, str]
    tokens: tuple[int, ...]
    path: list[Entry]
    own: list[int]
    used: list[Prefix] = field(default_factory=list)
    """The path that the naive model expects."""

    def prefixes(self, first=0):
        return [
            (self.model, self.namespace, self.tokens[: (page + 1) * PAGE])
            for page in range(first, len(self.tokens) // PAGE)
        ]

    def keys(self, first=0):
        keys = PageKeys(PAGE)
        keys.extend(self.tokens[:1])
        keys.extend(self.tokens[1:])
        assert len(keys) == len(self.tokens)
        return keys[first:]


class AgainstADictionary(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.cache = PrefixCache()
        self.pages: dict[Prefix, int] = {}
        self.last_use: dict[Prefix, int] = {}
        self.live: list[Live] = []
        self.fresh = 0
        """Pages are numbered as they are taken; none is given twice."""
        self.free: set[int] = set()
        self.clock = self.operations = self.given_up = self.hits = 0

    # --- operations

    @rule(
        model=st.integers(0, MODELS - 1),
        namespace=st.sampled_from(NAMESPACES),
        tokens=st.lists(st.integers(0, 1), min_size=1, max_size=13).map(tuple),
    )
    def come(self, model, namespace, tokens):
        self.operations += 1
        request = Live(model, namespace, tokens, [], [])
        known = []
        for prefix in request.prefixes():
            if prefix not in self.pages:
                break
            known.append(prefix)
        before = self.idle()
        request.path = self.cache.match(model, namespace, request.keys())
        assert self.idle() == before, "a match alone changes nothing"
        assert [entry.page for entry in request.path] == [self.pages[p] for p in known]
        self.hits += bool(known)
        request.used = known
        self.cache.use(request.path)
        for _ in request.prefixes(len(known)):
            request.own.append(self.fresh)
            self.fresh += 1
        self.live.append(request)

    @precondition(lambda self: self.live)
    @rule(index=st.integers(0, 1000))
    def prefill_lands(self, index):
        self.operations += 1
        request = self.live[index % len(self.live)]
        at = len(request.path)
        self.cache.grow(
            request.model, request.namespace, request.path, request.keys(at), request.own
        )
        for prefix in request.prefixes(at):
            if prefix in self.pages:
                break
            self.pages[prefix] = request.own.pop(0)
            request.used.append(prefix)
        assert [entry.page for entry in request.path] == [self.pages[p] for p in request.used]

    @precondition(lambda self: self.live)
    @rule(index=st.integers(0, 1000), computed=st.integers(0, 7))
    def go(self, index, computed):
        """Ends a request of which ``computed`` own pages were computed."""
        self.operations += 1
        self.clock += 1
        request = self.live.pop(index % len(self.live))
        own = request.own[:computed]
        at = len(request.path)
        became_idle, spare = self.cache.leave(
            request.model, request.namespace, request.path, request.keys(at)[: len(own)], own
        )
        mine = request.prefixes()[: at + len(own)]
        twins = []
        for prefix, page in zip(mine[at:], own, strict=True):
            if prefix in self.pages:
                twins.append(page)
            else:
                self.pages[prefix] = page
        for prefix in mine:
            self.last_use[prefix] = self.clock
        assert spare == twins
        new = [p for p in mine if not self.in_use(p)]
        new_pages = {self.pages[p] for p in new}
        assert set(became_idle) <= new_pages and len(set(became_idle)) == len(became_idle)
        # what is idle now and was before, was idle under somebody else's page
        others = new_pages - set(became_idle)
        assert others.isdisjoint(own) and others.isdisjoint(self.pages[p] for p in request.used)
        self.take_back(spare + request.own[computed:])

    @rule(count=st.integers(0, 5))
    def give_up(self, count):
        self.operations += 1
        for _ in range(count):
            victim = self.least_recently_used()
            dropped = self.cache.give_up(1)
            if victim is None:
                assert dropped == []
                return
            assert dropped == [(victim[0], self.pages[victim])]
            self.given_up += 1
            self.drop([victim])

    @rule(model=st.none() | st.integers(0, MODELS - 1))
    def flush(self, model):
        self.operations += 1
        victims = [p for p in self.pages if model in (None, p[0]) and not self.in_use(p)]
        dropped = self.cache.flush(model)
        assert sorted(dropped) == sorted((p[0], self.pages[p]) for p in victims)
        self.drop(victims)

    # --- the naive model

    def in_use(self, prefix):
        return any(prefix in request.used for request in self.live)

    def least_recently_used(self):
        """The entry used longest ago among those that nobody uses and nothing follows."""
        followed = {(m, n, tokens[:-PAGE]) for m, n, tokens in self.pages}
        idle = [p for p in self.pages if p not in followed and not self.in_use(p)]
        return min(idle, key=lambda p: self.last_use[p], default=None)

    def drop(self, victims):
        self.take_back([self.pages.pop(prefix) for prefix in victims])

    def take_back(self, pages):
        assert self.free.isdisjoint(pages), "freed twice"
        self.free.update(pages)
        for request in self.live:
            assert self.free.isdisjoint(request.own), "freed while in use"

    def idle(self):
        """(model, page) of every idle entry, least recently used first."""
        return [(entry.model, entry.page) for entry in self.cache._idle]

    @invariant()
    def no_page_is_lost_or_has_two_owners(self):
        held = [page for request in self.live for page in request.own]
        cached = list(self.pages.values())
        assert len(held) + len(cached) + len(self.free) == self.fresh
        assert len({*held, *cached, *self.free}) == self.fresh
        idle = sorted((p[0], page) for p, page in self.pages.items() if not self.in_use(p))
        assert sorted(self.idle()) == idle
        assert len(self.cache._roots) == len({p[:2] for p in self.pages})

    def teardown(self):
        while self.live:
            self.go(0, 7)
        self.flush(None)
        self.no_page_is_lost_or_has_two_owners()
        assert not self.pages and len(self.free) == self.fresh


AgainstADictionary.TestCase.settings = settings(
    derandomize=True, max_examples=60, stateful_step_count=50, deadline=None
)
TestPrefixCache = AgainstADictionary.TestCase


@pytest.mark.parametrize("seed", slow_but([0], range(4)))
def test_10_to_the_5_operations(seed):
    """Four times 25,000; most of them with dozens of requests at work and hundreds of entries."""
    random = Random(seed)
    machine = AgainstADictionary()
    while machine.operations < 25_000:
        kind = random.random()
        crowd = len(machine.live)
        if kind < 0.4 and crowd < 24:
            length = random.randint(1, 13)
            model = random.choice((0, 0, 0, 1, 2))
            # two tokens, and one of them seldom: many prompts begin alike
            tokens = tuple(int(random.random() < 0.15) for _ in range(length))
            machine.come(model, random.choice(NAMESPACES), tokens)
        elif kind < 0.6 and crowd:
            machine.prefill_lands(random.randrange(crowd))
        elif kind < 0.9 and crowd:
            machine.go(random.randrange(crowd), random.randint(0, 7))
        elif kind < 0.999:
            machine.give_up(random.randint(0, 4))
        else:
            machine.flush(random.choice((None, 0, 1, 2)))
        if machine.operations % 10 == 0:
            machine.no_page_is_lost_or_has_two_owners()
    assert machine.hits > 2_000 and machine.given_up > 2_000
    machine.teardown()


def test_a_long_prompts_pages_are_matched_and_left_quickly():
    keys = PageKeys(16)
    keys.extend(range(128_000))
    cache = PrefixCache()
    pages = list(range(8_000))
    cache.leave(0, ("", ""), [], keys[:], pages)
    path = cache.match(0, ("", ""), keys[:])
    assert [entry.page for entry in path] == pages
    assert cache.match(0, ("", ""), keys[1:]) == []
    assert cache.give_up(3) == [(0, 7_999), (0, 7_998), (0, 7_997)]
