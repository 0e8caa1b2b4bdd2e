"""The simulator of faults finds nothing in many seeds, replays each exactly, and finds and names
bugs that are planted in the core."""

import heapq
import os
import subprocess
import sys
from dataclasses import replace
from itertools import chain
from pathlib import Path

import pytest
import storm
from crosspool.scheduler.budgets import Budgets
from crosspool.scheduler.core import SchedulerCore
from crosspool.scheduler.fleet_changes import FleetChanges
from crosspool.scheduler.held_weights import HeldWeights
from crosspool.scheduler.promise_rules import Growth
from crosspool.scheduler.promises import Promises
from crosspool.scheduler.queues import WaitingQueue
from crosspool.scheduler.rank_state import RankState
from crosspool.scheduler.residency import ResidencyPolicy
from crosspool.scheduler.sequence import Sequence
from crosspool.transport.messages import Step
from msgspec import structs
from support.marks import slow_but

SEEDS = 10_000
PARTS = 4
SEEDS_FOR_A_BUG = 2000


@pytest.mark.parametrize("part", slow_but([0], range(PARTS)))
def test_every_request_ends_as_if_nothing_had_failed(part):
    seen = storm.Counter()
    for seed in range(part * SEEDS // PARTS, (part + 1) * SEEDS // PARTS):
        seen += storm.run(seed).counts
    assert seen["attention losses"] > SEEDS // PARTS // 2
    assert seen["FFN losses"] > SEEDS // PARTS // 4
    assert seen["losses while away"] > SEEDS // PARTS // 10
    assert seen["scheduler losses"] > SEEDS // PARTS // 5
    assert seen["requests replayed"] > SEEDS // PARTS
    assert seen["finished"] > 5 * seen["aborted"]
    assert seen["finished"] > 5 * seen["refused"]
    assert seen["wakes"] > SEEDS // PARTS // 2 and seen["sleeps"] > SEEDS // PARTS // 2
    assert seen["early steps"] > SEEDS // PARTS // 5
    assert seen["failed wakes"] > SEEDS // PARTS // 30
    assert seen["models come"] > SEEDS // PARTS // 5
    assert seen["models refused"] > SEEDS // PARTS // 30
    assert seen["finished"] > 5 * seen["unloaded"] > SEEDS // PARTS // 2


def program(*words: str, hashes: str = "0") -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parent), "PYTHONHASHSEED": hashes}
    return subprocess.run(
        [sys.executable, "-m", "storm", *words],
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_a_seed_replays_exactly():
    logs = [program("--first", "17", "--seeds", "4", "--log", hashes=h).stdout for h in "12"]
    first, second = ("".join(log.splitlines(keepends=True)[:-1]) for log in logs)
    assert first.count("notice") >= 2
    assert first == second


def test_the_program_tells_what_it_has_run():
    done = program("--seeds", "5")
    assert done.returncode == 0, done.stderr
    assert "5 seeds" in done.stdout and "s of processor time" in done.stdout
    assert program("--hours", "0.0002").returncode == 0


def test_the_program_fails_with_the_seed(monkeypatch, capsys):
    monkeypatch.setattr(RankState, "is_late", lambda self, result: False)
    monkeypatch.setattr(sys, "argv", ["storm", "--seeds", str(SEEDS_FOR_A_BUG)])
    assert storm.main() == 1
    told = capsys.readouterr().err
    seed = int(told.split()[1].rstrip(","))
    with pytest.raises(storm.Failure) as again:
        storm.run(seed)
    assert str(again.value) == told.strip()
    monkeypatch.undo()
    storm.run(seed)


# --- planted bugs: each puts a wrong method in the place of a right one


def freed_twice(patch):
    reclaim = RankState.reclaim

    def wrong(self):
        ended = list(self._ended)
        reclaim(self)
        self._ended += [seq for seq in ended if seq.replayed]

    patch.setattr(RankState, "reclaim", wrong)


def freed_after_the_loss(patch):
    lose = RankState.lose

    def wrong(self):
        ended = list(self._ended)
        ended += [s for flight in self.flights.values() for s in flight.sequences if s.over]
        lost = lose(self)
        self._ended += ended
        return lost

    patch.setattr(RankState, "lose", wrong)


def delivered_twice(patch):
    lose_rank = Sequence.lose_rank

    def wrong(self):
        lose_rank(self)
        self._delivered = max(self.prompt_len, self._delivered - 1)

    patch.setattr(Sequence, "lose_rank", wrong)


def never_delivered(patch):
    lose_rank = Sequence.lose_rank

    def wrong(self):
        self._delivered = max(self._delivered, len(self.tokens))
        lose_rank(self)

    patch.setattr(Sequence, "lose_rank", wrong)


def out_of_order(patch):
    drain = SchedulerCore.drain_messages

    def wrong(self):
        messages = drain(self)
        steps = [message for message in messages if isinstance(message[1], Step)]
        return [m if m not in steps else steps.pop() for m in messages]

    patch.setattr(SchedulerCore, "drain_messages", wrong)


def made_again(patch):
    """The steps that the rank had not ended are sent to the next incarnation as they were."""
    drain, restore, lose = (
        SchedulerCore.drain_messages,
        SchedulerCore.restore_attention_rank,
        SchedulerCore.lose_attention_rank,
    )

    def drained(self):
        messages = drain(self)
        if stale := self.__dict__.pop("stale", []):
            messages += stale if stale[0][0] in [rank for rank, _ in messages] else []
        self.__dict__.setdefault("sent", []).extend(messages)
        return messages

    def lost(self, rank):
        flying = {flight.step for flight in self._ranks[rank].flights.values()}
        sent = self.__dict__.pop("sent", [])
        self.kept = [(r, m) for r, m in sent if r == rank and getattr(m, "step", -1) in flying]
        lose(self, rank)

    def restored(self, rank):
        self.stale = self.kept
        restore(self, rank)

    patch.setattr(SchedulerCore, "drain_messages", drained)
    patch.setattr(SchedulerCore, "lose_attention_rank", lost)
    patch.setattr(SchedulerCore, "restore_attention_rank", restored)


def still_cached(patch):
    """The prefix cache of a dead rank lives on, with its pages."""
    forget, lose = Promises.forget, RankState.lose

    def unmapped(self):
        if not hasattr(self, "allocator"):
            return forget(self)
        for model in self.allocator._models.values():
            model.mapped[:] = False
        return self._unmap.clear()

    def wrong(self):
        seqs = {seq.number: seq for seq in self._ended}
        for flight in self.flights.values():
            seqs |= {seq.number: seq for seq in flight.sequences}
        for running in self.running.values():
            seqs |= running
        for seq in seqs.values():
            self.promises.take_back(seq)
        return lose(self)

    patch.setattr(Promises, "forget", unmapped)
    patch.setattr(RankState, "lose", wrong)


def lost_in_the_queue(patch):
    give_back = WaitingQueue.give_back
    patch.setattr(
        WaitingQueue,
        "give_back",
        lambda self, seqs: give_back(self, [seq for seq in seqs if not seq.has_output]),
    )
    lose_rank = Sequence.lose_rank

    def keeps_its_output(self):
        length = self.prefill_len
        lose_rank(self)
        self.prefill_len = length

    patch.setattr(Sequence, "lose_rank", keeps_its_output)


def refused_after_all(patch):
    def wrong(self, seqs):
        for seq in seqs:
            self._ready[seq.number] = seq
            heapq.heappush(self._order, seq.number)

    patch.setattr(WaitingQueue, "give_back", wrong)


def forgets_the_undecided(patch):
    lose = SchedulerCore.lose_attention_rank

    def wrong(self, rank):
        lose(self, rank)
        self._following.clear()

    patch.setattr(SchedulerCore, "lose_attention_rank", wrong)


def takes_late_results(patch):
    patch.setattr(RankState, "is_late", lambda self, result: False)


def watches_on(patch):
    patch.setattr(SchedulerCore, "lose_ffn_rank", lambda self, rank: None)


def asks_for_prompts_again(patch):
    patch.setattr(Sequence, "_wanted", property(lambda self: self.request.logprobs))


def promises_for_the_prompt(patch):
    counts = Growth.counts
    patch.setattr(
        Growth,
        "counts",
        lambda self, seq, held, tokens: counts(
            self, seq, held, tokens if seq.pages else seq.prompt_len
        ),
    )


def waits_for_itself(patch):
    patch.setattr(Sequence, "has_output", property(lambda s: len(s.tokens) > s.prompt_len))


def is_not_noticed(patch):
    patch.setattr(RankState, "restore", lambda self: setattr(self, "away", False))


def sleeps_under_steps(patch):
    orders = HeldWeights.orders
    patch.setattr(HeldWeights, "orders", lambda self, in_flight: orders(self, frozenset()))


def wakes_beside_what_leaves(patch):
    def wrong(self, models, device=None):
        return [] if device is not None else crowded(self, models)

    crowded = Budgets.crowded
    patch.setattr(Budgets, "crowded", wrong)


def steps_of_what_sleeps(patch):
    patch.setattr(ResidencyPolicy, "barred", lambda self, device: frozenset())


def forgets_what_died_while_waking(patch):
    patch.setattr(HeldWeights, "lose", lambda self, device: self._away.add(device))

    def wrong(self, device, models, resident):
        self._away.discard(device)
        self._held[device] = dict.fromkeys(resident, "present") | self._held[device]
        self.changed()

    patch.setattr(HeldWeights, "restore", wrong)


def never_gives_way(patch):
    order = ResidencyPolicy._order
    patch.setattr(ResidencyPolicy, "_order", lambda self, now: order(self, now - 100.0))


def caches_what_was_refused(patch):
    """Pages of a step that was refused count as computed."""
    refuse = RankState.take_refusal

    def wrong(self, result):
        flight = self._flight_of(result)
        rows = [
            structs.replace(row, start=seq.computed)
            for seq, row in zip(flight.sequences, flight.rows, strict=True)
        ]
        self.flights[flight.model] = replace(flight, rows=rows)
        return refuse(self, result)

    patch.setattr(RankState, "take_refusal", wrong)


def forgets_who_waits_for_a_failed_wake(patch):
    patch.setattr(SchedulerCore, "_end_model", lambda self, model, finish: None)


def is_let_go_with_its_pages(patch):
    patch.setattr(RankState, "has_left", lambda self, model: not self.running[model])


def is_let_go_with_its_weights(patch):
    orders = FleetChanges.orders
    patch.setattr(FleetChanges, "orders", lambda self, holds: orders(self, lambda *_: False))


def thinks_that_all_is_known(patch):
    restore = FleetChanges.restore

    def wrong(self, device, models):
        restore(self, device, {*models, *self._models})

    patch.setattr(FleetChanges, "restore", wrong)


def wakes_what_is_unknown(patch):
    restore = HeldWeights.restore
    patch.setattr(
        HeldWeights,
        "restore",
        lambda self, device, models, resident: restore(self, device, self._models, resident),
    )


def forgets_a_refusal(patch):
    added = FleetChanges.added

    def wrong(self, device, model, error):
        if error is None:
            added(self, device, model, error)

    patch.setattr(FleetChanges, "added", wrong)


TRIED_FIRST = {
    "never_delivered": 657,
    "caches_what_was_refused": 1504,
    "is_let_go_with_its_pages": 296,
    "wakes_what_is_unknown": 449,
}
"""Seeds that showed these bugs, which took longest to be found. Should one not show its bug any
more, others do."""


@pytest.mark.parametrize(
    ("plant", "name"),
    [
        (freed_twice, "some of pages .* are free"),
        (freed_after_the_loss, "some of pages .* are free"),
        (delivered_twice, "a token is delivered twice"),
        (never_delivered, "a token is missing|a request ends wrongly"),
        (out_of_order, "a step came out of order"),
        (made_again, "a step came out of order"),
        (still_cached, "a page counts as cached that was not computed here"),
        (lost_in_the_queue, "a request is lost"),
        (refused_after_all, "an admitted request is refused"),
        (forgets_the_undecided, "requests have not ended|requests wait for ever"),
        (takes_late_results, "a result of unknown step"),
        (watches_on, "the server would end: .* has not finished step|again and again"),
        (asks_for_prompts_again, "the prompt's log-probabilities (are wrong|come twice)"),
        (promises_for_the_prompt, "a promise is too small"),
        (waits_for_itself, "requests run, but no step is under way"),
        (is_not_noticed, "a request waits though a rank is idle"),
        (sleeps_under_steps, "weights are given up under a step"),
        (wakes_beside_what_leaves, "more weights than the budget"),
        (steps_of_what_sleeps, "a step of a model that sleeps|a rank that does not serve"),
        (
            forgets_what_died_while_waking,
            "has not finished step|nothing goes on|wait for ever|sleeps that is not awake",
        ),
        (never_gives_way, "a model waits though there is room for it"),
        (caches_what_was_refused, "that was not computed here|wrong KV|are free|a gap"),
        (
            forgets_who_waits_for_a_failed_wake,
            "nothing goes on|requests wait for ever|is idle|again and again",
        ),
        (is_let_go_with_its_pages, "a model is removed with (chunks|requests)"),
        (is_let_go_with_its_weights, "a model leaves with its weights"),
        (
            thinks_that_all_is_known,
            "that the (rank|device) does not know|wait for ever|nothing",
        ),
        (wakes_what_is_unknown, "a model is woken that the device does not know"),
        (forgets_a_refusal, "a model neither comes nor is refused"),
    ],
)
def test_a_planted_bug_is_found_and_named(monkeypatch, plant, name):
    plant(monkeypatch)
    with pytest.raises(storm.Failure, match=name):
        first = TRIED_FIRST.get(plant.__name__, 0)
        for seed in chain([first], range(SEEDS_FOR_A_BUG)):
            storm.run(seed)
