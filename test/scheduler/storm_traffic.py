"""Random deployments and requests for the simulator of faults, and what each request must yield."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from random import Random
from typing import Any

import msgspec
from crosspool.config.deployment import Deployment, ModelConfig
from crosspool.config.device import Device
from crosspool.config.errors import ConfigError
from crosspool.models.spec import ModelSpec
from crosspool.scheduler.request import Finish, GenerateRequest, Grammar, StopRules
from crosspool.scheduler.stopping import Stopping
from crosspool.transport.messages import Logprobs, Sampling
from crosspool.weightpool.placement import place
from simulation import (
    EOS,
    SimulatedRank,
    WordDecoder,
    _allows,
    bitmask_of,
    deployment,
    digest,
    first_allowed,
    spec,
)

MASKS = [bitmask_of(set(range(48, 58))), bitmask_of({*range(97, 123), EOS})]


def drawn(seed: int, prompt_len: int, position: int, chain: int) -> tuple[int, float]:
    """The token that a rank draws at ``position`` and its log-probability. ``chain`` is the digest
    of all tokens before it."""
    number = zlib.crc32(b"%d %d %d %d" % (seed, prompt_len, position, chain))
    token = EOS if number % 30 == 0 else 97 + number // 30 % 4 if number % 3 else number // 30 % 256
    return token, -(number % 1000) / 100


class StormRank(SimulatedRank):
    """Draws from what it finds in the request's pages."""

    def draw(self, request: int) -> tuple[int, float]:
        position, model = len(self.tokens[request]), self.model[request]
        page, slot = divmod(position - 1, self.layouts[model].page_size)
        _, chain = self.written[model][self.pages[request][page]][slot]
        return drawn(self.sampling[request].seed, self.prompt_len[request], position, chain)


class StormMatcher:
    """Allows digits, and from the third token on letters; complete after ``length`` tokens. It
    stays pending after tokens whose numbers are in ``slow``, until somebody sets ``pending``."""

    error = None

    def __init__(self, length: int, slow: set[int], on_pending: Callable[[StormMatcher], None]):
        self._length = length
        self._slow = slow
        self._on_pending = on_pending
        self._fed = 0
        self.pending = False
        self.accepted = True

    error: str | None = None

    def follow(self, output: Sequence[int]) -> None:
        for token in output:
            assert _allows(self._mask, token)
            self._fed += 1

    def feed(self, token: int) -> None:
        assert not self.pending
        self.accepted = _allows(self._mask, token)
        self._fed += 1
        if self._fed in self._slow:
            self.pending = True
            self._on_pending(self)

    @property
    def _mask(self) -> bytes:
        return MASKS[self._fed >= 2]

    def bitmask(self) -> bytes:
        assert not self.pending and not self.is_terminated
        return self._mask

    @property
    def is_terminated(self) -> bool:
        return self._fed == self._length


@dataclass
class StormGrammars:
    """Compiles at once, or after some time. The grammar's source is the matcher's length and the
    numbers of its slow tokens."""

    on_pending: Callable[[StormMatcher], None]
    on_compile: Callable[[Future[Any], StormMatcher], None]

    def compile(self, grammar: Grammar, output: Sequence[int] = ()) -> Future[Any]:
        future: Future[Any] = Future()
        made = matcher(grammar, self.on_pending)
        made.follow(output)
        self.on_compile(future, made)
        return future


def matcher(grammar: Grammar, on_pending: Callable[[StormMatcher], None]) -> StormMatcher:
    length, *slow = map(int, grammar.source.split())
    return StormMatcher(length, set(slow), on_pending)


SHAPES = ({}, {"head_dim": 12, "context": 90}, {"layers": 5, "head_dim": 14, "context": 60})


def random_deployment(random: Random) -> tuple[Deployment, dict[int, ModelSpec]]:
    models, ranks = random.choice([1, 1, 2, 3]), random.choice([1, 1, 2])
    fields: dict[str, Any] = {
        "kv_pool_bytes": ranks * random.choice([8, 12, 30]) * 4096,
        "max_running_requests": random.choice([2, 4, 8]),
        "chunked_prefill_size": random.choice([5, 8, 32]),
        "lanes": random.choice([1, 2]),
        "prefix_cache": random.random() < 0.8,
        "tbt_target_ms": random.choice([0.0, 40.0]),
        "queue_timeout": random.choice([8.0, 1e5, 1e5]),
        "watchdog_timeout": 60.0,
        "grammar_timeout": 1e4,
    }
    if random.random() < 0.5:
        fields |= {"loop": "resident", "lease_steps": random.choice([2, 7])}
    if random.random() < 0.5:
        fields |= {"promise": "growth", "growth_tokens": random.choice([1, 4, 9])}
    d = deployment(models, ranks=ranks, **fields)
    specs = {
        number: spec(**({"context": 120} | shape))
        for number, shape in enumerate(random.sample(SHAPES, models))
    }
    return with_weights(random, d, specs, tight=random.random() < 0.35), specs


def with_weights(
    random: Random, d: Deployment, specs: dict[int, ModelSpec], tight: bool
) -> Deployment:
    """``d`` with FFN ranks, the first sometimes in the process of attention rank 0. If ``tight``,
    budgets hold each model, but maybe not all, and models differ in when they are kept."""
    first = d.kv_pool_devices[0] if random.random() < 0.3 else Device("cuda:8")
    devices = (first, Device("cuda:9"))[: random.choice([1, 2])]
    d = msgspec.structs.replace(d, weight_pool_devices=devices)
    if not tight:
        return d
    options = {
        "keep": ["demand"] * 8 + ["asleep", "pinned"],
        "ttl": [None, None, 2.0],
        "priority": [0, 0, 1],
        "weight_pool_devices": [None, None, devices[:1]],
        "kv_pool_devices": [None, None, d.kv_pool_devices[:1]],
    }
    models = {
        number: msgspec.structs.replace(
            m, **{name: random.choice(those) for name, those in options.items()}
        )
        for number, m in d.models.items()
    }
    d = msgspec.structs.replace(d, models=models, residency_quantum=random.choice([0.2, 1.0, 5.0]))
    needed = {
        "weight_pool_bytes": [list(of.values()) for of in place(d, specs).weight_bytes],
        "attention_weight_bytes": [list(place(d, specs).attention_bytes.values())]
        * len(d.kv_pool_devices),
    }
    for name, ranks in needed.items():
        least, most = max(map(max, ranks)), max(map(sum, ranks))
        share = random.choice([most, least, random.randint(least, most)])
        d = msgspec.structs.replace(d, **{name: share * len(ranks)})
    try:
        place(d, specs)
    except ConfigError:  # the pinned models do not fit together
        models = {
            number: msgspec.structs.replace(model, keep="demand")
            for number, model in d.models.items()
        }
        d = msgspec.structs.replace(d, models=models)
    return d


def random_model(random: Random, name: str, d: Deployment) -> tuple[ModelConfig, ModelSpec]:
    """A model that comes while others are served."""
    config = ModelConfig(
        name=name,
        path="/none",
        keep=random.choice(["demand", "demand", "asleep", "pinned"]),
        ttl=random.choice([None, None, 2.0]),
        kv_floor_bytes=random.choice([0, 0, 0, 2 * 4096]),
        weight_pool_devices=random.choice([None, None, d.weight_pool_devices[:1]]),
        kv_pool_devices=random.choice([None, None, d.kv_pool_devices[-1:]]),
    )
    return config, spec(**({"context": 120} | random.choice(SHAPES)))


def random_requests(random: Random, number: int, model: int) -> Any:
    """A request for a model, or several with one prompt; ``number`` is the first one's."""
    length = random.choice([random.randint(1, 6), random.randint(1, 40)])
    family = random.randrange(3)  # prompts of one family begin alike
    prompt = [(family or number + i) % 256 for i in range(length)]
    prompt[-1] = number % 256
    new: int | None = random.choice([0, 1, random.randint(2, 12), random.randint(2, 12)])
    kind = random.choice(["plain", "plain", "stop", "logprobs", "logprobs", "grammar"])
    if kind == "plain" and random.random() < 0.05:
        new = None
    logprobs = Logprobs()
    if kind == "logprobs":
        logprobs = Logprobs(output=random.random() < 0.7, prompt_start=random.randrange(-1, length))
    source = " ".join(map(str, [random.randint(1, 8), *random.sample(range(1, 9), 3)]))
    stream = random.random() < 0.6
    minimum = random.choice([0, 0, 3])
    return [
        GenerateRequest(
            rid=f"{number + n}",
            model=model,
            input_ids=prompt,
            sampling=Sampling(seed=number + n),
            stop=StopRules(
                max_new_tokens=new,
                min_new_tokens=min(minimum, new or 0),
                stop_strings=("ab", "dca") if kind == "stop" else (),
                stop_token_ids=frozenset({98}) if kind == "stop" else frozenset(),
                ignore_eos=random.random() < 0.2,
            ),
            logprobs=logprobs,
            grammar=Grammar(kind="regex", source=source) if kind == "grammar" else None,
            stream=stream,
        )
        for n in range(random.choice([1, 1, 1, 3]))
    ]


@dataclass(frozen=True)
class Expected:
    """What a request yields when nothing fails."""

    tokens: list[int]
    logprobs: list[float]
    finish: Finish


def expected(r: GenerateRequest, spec: ModelSpec, max_tokens: int) -> Expected:
    most, length = r.stop.max_new_tokens, len(r.input_ids)
    limit = max_tokens if most is None else min(length + most, spec.context)
    stopping = Stopping(r.stop, spec, limit - length, WordDecoder(), r.input_ids)
    if r.grammar is not None:
        stopping.matcher = matcher(r.grammar, lambda it: setattr(it, "pending", False))
    chain = 0
    for token in r.input_ids:
        chain = digest(chain, token)
    tokens: list[int] = []
    logprobs: list[float] = []
    finish = Finish(kind="length") if limit == length else None
    while finish is None:
        token, logprob = drawn(r.sampling.seed, length, length + len(tokens), chain)
        bitmask = stopping.bitmask()
        if bitmask is not None and not _allows(bitmask, token):
            token = first_allowed(bitmask)
        tokens.append(token)
        logprobs.append(logprob)
        chain = digest(chain, token)
        stopping.feed(token)
        finish = stopping.after(token)
    return Expected(tokens, logprobs, finish)
