"""What must hold in the simulator of faults after every turn of the scheduler."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING, Any

from crosspool.scheduler.rank_state import RankState
from crosspool.scheduler.sequence import Sequence

if TYPE_CHECKING:
    from storm import Storm


class Broken(AssertionError):
    """Something is wrong; ``details`` say where."""

    def __init__(self, what: str, details: object) -> None:
        super().__init__(f"{what}: {details}")


def require(holds: bool, what: str, details: object) -> None:
    if not holds:
        raise Broken(what, details)


def check(storm: Storm) -> None:
    """Raises Broken where a request or a page is not where it belongs, or somebody waits without
    need."""
    core: Any = storm.core
    known = [seq.request.rid for seq in core._requests()]
    require(len(known) == len(set(known)), "a request is in two places", known)
    lost = storm.open - set(known)
    require(not lost, "a request is lost", lost)
    for rank in core._ranks:
        if rank.away:
            held = rank.flights or any(rank.running.values()) or rank._ended
            require(not held, "a rank that is away has requests", rank.index)
        else:
            _check_work(storm, rank)
        _check_pages(rank)
    for queue in core._queues.values():
        for seq in chain(queue._ready.values(), (seq for seq, _ in queue._compiling.values())):
            require(seq.deadline > storm.now, "a request waits past its deadline", seq.number)
    for rank in core._ranks:
        idle = not (rank.away or rank.flights or any(rank.running.values()) or rank._ended)
        if idle:
            for model, queue in core._queues.items():
                waits = queue.head is not None and model not in rank.barred
                require(not waits, "a request waits though a rank is idle", model)
    _check_turns(storm)


def _check_turns(storm: Storm) -> None:
    """Who has waited longest for its weights waits for room that others may keep for now, or does
    not fit beside those that are pinned."""
    residency: Any = storm.core._residency
    models = residency._models
    waiting = [
        (it.waits_since, n)
        for n, it in models.items()
        if it.waits_since is not None and not residency.refusal(n, storm.now)
    ]
    if not waiting:
        return
    _, first = min(waiting)
    keep = {
        number
        for number, it in models.items()
        if it.wanted
        and (
            it.keep == "pinned"
            or it.asked
            or (
                number in residency._work
                and (it.awake_since is None or storm.now < it.awake_since + residency._quantum)
            )
        )
    }
    stays = residency._budgets.crowded(keep | {first})
    require(bool(stays), "a model waits though there is room for it", first)
    wanted = {number for number, it in models.items() if it.wanted}
    require(not residency._budgets.crowded(wanted), "more is wanted than fits", wanted)


def _check_work(storm: Storm, rank: RankState) -> None:
    if rank.flights:
        return
    running = [seq for of_model in rank.running.values() for seq in of_model.values()]
    held = rank.barred | rank.early
    able = [seq for seq in running if seq.model not in held and not seq.undecided]
    if len(able) < len(running):  # who waits for pages may wait for one of the others to end
        able = [seq for seq in able if seq.number not in rank.paused[seq.model]]
    require(not able, "requests run, but no step is under way", [seq.request.rid for seq in able])


def _check_pages(rank: RankState) -> None:
    """Promised pages are those of the requests that run or are in a step, each with one owner or
    in the prefix cache; cached ones are those that nobody uses."""
    allocator: Any = rank.promises.allocator
    seqs: dict[int, Sequence] = {}
    for running in rank.running.values():
        seqs |= running
    for flight in rank.flights.values():
        seqs |= {seq.number: seq for seq in flight.sequences}
    models = list(rank.running)
    own: dict[int, list[int]] = {model: [] for model in models}
    shared: dict[int, set[int]] = {model: set() for model in models}
    for seq in seqs.values():
        own[seq.model] += seq.pages[len(seq.path) :]
        shared[seq.model] |= {entry.page for entry in seq.path}
        if not seq.over:
            reached = seq.computed if rank.promises.rule.grows else seq.limit
            require(rank.promises.holds(seq, reached), "a promise is too small", seq.number)
    cache: Any = rank.promises._cache
    idle: dict[int, set[int]] = {model: set() for model in models}
    for entry in cache._idle if cache else ():
        idle[entry.model].add(entry.page)
    free = allocator.budget_chunks
    for model in models:
        pages = allocator._pages_of(model)
        mine = set(own[model])
        require(len(mine) == len(own[model]), "a page has two owners", own[model])
        require(not mine & shared[model], "a shared page has an owner", mine & shared[model])
        require(not idle[model] & (mine | shared[model]), "a page in use counts as idle", model)
        promised = len(mine | shared[model])
        require(pages.promised.size == promised, "promised pages belong to nobody", model)
        cached = pages.taken.size - promised
        require(cached == len(idle[model]), "cached pages are not in the cache", model)
        free -= pages.taken.chunks
    require(allocator.free_chunks == free, "the chunks do not add up", free)
