"""Prompt chunks keep other requests' time between tokens to the target, on a device whose steps
take time: lanes take turns part by part, and what a part costs is set by the test."""

from collections import defaultdict, deque
from itertools import pairwise

import pytest
from simulation import Simulation, deployment, request, spec

LAYERS = 4
PAGE = 4
TARGET = 0.05
CLOSE = 1.1 * TARGET
"""The bound once costs have changed, when those of a model that has made no step without a prompt
since are only half known."""


def never_ending(tokens):
    return 7


class Device:
    """Computes the simulation's steps on one rank while the virtual clock goes on."""

    def __init__(self, models, *, lanes=2, step=0.003, token=0.0005, chunk=0.0, most=512):
        d = deployment(
            models,
            lanes=lanes,
            tbt_target_ms=1e3 * TARGET,
            page_size=PAGE,
            chunked_prefill_size=most,
            kv_pool_bytes=8192 * 4096,
            max_running_requests=64,
            prefix_cache=False,
        )
        self.sim = Simulation(d, [spec(context=4096)] * models, never_ending)
        self.step, self.token, self.chunk = step, token, chunk
        """Seconds of a step, of a prompt token, and of a prompt chunk of any length."""
        self.times = defaultdict(list)
        """Times at which each request got its tokens."""
        self.chunks = []
        """(time, model, prompt tokens) of every step that took some, as they end."""
        self._left = {}
        self._turns = deque()

    @property
    def now(self):
        return self.sim.now

    def add(self, *requests):
        self.sim.add(*requests)

    def seconds(self, step):
        tokens = self.prompt_tokens(step)
        return self.step + self.token * tokens + (self.chunk if tokens else 0.0)

    def prompt_tokens(self, step):
        known = self.sim.ranks[0].prompt_len
        return sum(len(row.tokens) for row in step.rows if row.start < known[row.request])

    def run(self, until):
        """Computes part after part until ``until()`` is true."""
        while not until():
            self.part()

    def part(self):
        at_work = self.sim.ranks[0].steps[: self.sim.deployment.lanes]
        assert at_work, "the device has nothing to do"
        for step in at_work:
            if step.step not in self._left:
                self._left[step.step] = LAYERS
                self._turns.append(step)
        step = self._turns.popleft()
        self.sim.now += self.seconds(step) / LAYERS
        self._left[step.step] -= 1
        if self._left[step.step]:
            self._turns.append(step)
            return
        if tokens := self.prompt_tokens(step):
            self.chunks.append((self.now, step.model, tokens))
        self.sim.answer(index=at_work.index(step))
        for rid in self.sim.outputs:
            done = len(self.sim.tokens(rid))
            self.times[rid] += [self.now] * (done - len(self.times[rid]))

    def answers(self, model, at_once=1):
        """Adds requests that generate for ever, and runs until each has its first token."""
        names = [f"answer{model}-{i}" for i in range(at_once)]
        self.add(*(request(n, PAGE, 3000, model=model, stream=True) for n in names))
        self.run(lambda: all(self.sim.tokens(name) for name in names))
        return names

    def longest_gap(self, since, rids=None):
        times = self.times if rids is None else {rid: self.times[rid] for rid in rids}
        return max(b - a for t in times.values() for a, b in pairwise(t) if a >= since)


def mean(chunks):
    return sum(tokens for _, _, tokens in chunks) / len(chunks)


def flood(models, each, tokens=400, name="prompt"):
    return [
        request(f"{name}{m}-{i}", tokens, 8, model=m, stream=True)
        for m in range(models)
        for i in range(each)
    ]


@pytest.mark.parametrize("lanes", [1, 2, 4])
@pytest.mark.parametrize("models", range(1, 7))
def test_time_between_tokens_keeps_to_the_target_while_prompts_flood_in(models, lanes):
    device = Device(models, lanes=lanes)
    answers = [name for m in range(models) for name in device.answers(m, at_once=2)]
    prompts = flood(models, each=max(2, 6 // models))
    device.add(*prompts)
    warm = device.now + 0.5
    device.run(lambda: all(device.sim.finished(r.rid) for r in prompts))
    assert device.longest_gap(warm, answers) <= TARGET + 1e-9
    # what the steps of those who answer leave of the time goes to prompts
    begin, end = warm, device.chunks[-1][0]
    read = sum(tokens for at, _, tokens in device.chunks if begin < at <= end)
    assert read * device.token >= 0.4 * (1 - models * device.step / TARGET) * (end - begin)


@pytest.mark.parametrize("models", [1, 3, 6])
def test_without_a_target_chunks_push_the_time_between_tokens_far_over_it(models):
    device = Device(models)
    device.sim.core._ranks[0].budget._target = 0.0
    answers = [name for m in range(models) for name in device.answers(m)]
    device.add(*flood(models, each=2))
    begin = device.now
    device.run(lambda: device.now > begin + 2)
    assert device.longest_gap(begin, answers) > 3 * TARGET


def test_prompts_go_on_page_by_page_where_the_steps_alone_exceed_the_target():
    device = Device(6, step=0.02)
    answers = [name for m in range(6) for name in device.answers(m)]
    prompts = flood(6, each=1, tokens=60)
    device.add(*prompts)
    warm = device.now + 1
    device.run(lambda: all(device.sim.finished(r.rid) for r in prompts))
    assert {tokens for at, _, tokens in device.chunks if at > warm} == {PAGE}
    assert device.longest_gap(warm, answers) <= 6 * device.step + PAGE * device.token + 1e-9


def test_nobody_answers_so_a_chunk_is_full():
    device = Device(2)
    device.add(*flood(2, each=1, tokens=1200))
    device.run(lambda: any(device.times.values()))
    assert [tokens for _, _, tokens in device.chunks[:4]] == [512] * 4


def test_the_first_chunk_beside_an_answer_is_one_page_and_a_model_s_cost_is_its_own():
    device = Device(3)
    device.answers(0)
    at = len(device.chunks)
    device.add(request("first", 800, 8, model=1, stream=True))
    device.run(lambda: device.sim.finished("first"))
    sizes = [tokens for _, _, tokens in device.chunks[at:]]
    assert sizes[0] == PAGE
    assert max(sizes[:4]) >= 40, "and it grows within a few steps"
    at = len(device.chunks)
    device.add(request("second", 800, 8, model=2, stream=True))
    device.run(lambda: device.sim.finished("second"))
    assert device.chunks[at][2] == PAGE


@pytest.mark.parametrize("slower", [0.25, 3.0])
def test_chunks_follow_a_device_that_changes_its_speed(slower):
    device = Device(3)
    answers = [name for m in range(2) for name in device.answers(m)]
    device.add(*flood(3, each=6, tokens=1000))
    device.run(lambda: len(device.chunks) > 40)
    before = mean(device.chunks[-10:])
    device.step, device.token = device.step * slower, device.token * slower
    changed = device.now
    device.run(lambda: device.now > changed + 3)
    assert device.longest_gap(changed + 1.5, answers) <= CLOSE
    after = mean([chunk for chunk in device.chunks if chunk[0] > changed + 1.5])
    assert after > 2 * before if slower < 1 else after < before / 2
    assert after >= 0.5 * (TARGET - 4 * device.step) / device.token


def test_chunks_are_long_where_short_ones_take_most_of_the_time_too():
    """So it is where a few tokens are enough to need every expert."""
    device = Device(2, token=0.0002, chunk=0.02)
    answers = device.answers(0)
    device.add(*flood(2, each=4, tokens=1000))
    warm = device.now + 1
    device.run(lambda: device.now > warm + 2)
    room = TARGET - 2 * device.step - device.chunk
    assert mean([c for c in device.chunks if c[0] > warm]) > 0.7 * room / device.token
    assert device.longest_gap(warm, answers) <= CLOSE


def test_batches_that_grow_leave_less_for_prompts():
    """The cost of a step is learnt as it is, whatever the number of its rows."""
    device = Device(2)
    answers = device.answers(0, at_once=8)
    device.add(*flood(2, each=4, tokens=600))
    device.run(lambda: len(device.chunks) > 20)
    before = mean(device.chunks[-10:])
    device.step = 0.015
    changed = device.now
    device.run(lambda: device.now > changed + 2)
    assert mean(device.chunks[-10:]) < 0.7 * before
    assert device.longest_gap(changed + 1.5, answers) <= CLOSE
