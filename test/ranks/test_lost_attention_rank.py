"""An attention rank that is lost after any number of steps: the scheduler's core has its requests
computed again by another one, and they yield what they yield without the loss."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from crosspool.kernels.isa import default_isa
from crosspool.scheduler.core import SchedulerCore
from crosspool.scheduler.protocols import ModelTools
from crosspool.scheduler.request import GenerateRequest, Grammar, Output, StopRules
from crosspool.transport.messages import (
    Logprobs,
    Recall,
    Release,
    Sampling,
    Step,
    StepResult,
    TokenLogprobs,
)
from make_random_checkpoint import make_random_checkpoint
from support.families import SHAPES
from support.machine import GREEDY, Machine

VOCAB = 160
SAMPLINGS = [
    GREEDY,
    Sampling(temperature=1.0, seed=1),
    Sampling(temperature=0.7, top_k=5, seed=2),
    Sampling(temperature=1.5, top_p=0.8, seed=2**63 + 5),
    Sampling(temperature=0.9, frequency_penalty=0.7, presence_penalty=0.3, seed=6),
    Sampling(temperature=0.0, repetition_penalty=1.4),
    Sampling(temperature=1.0, logit_bias={3: 4.0, 9: -50.0}, seed=8),
]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A GQA model with a window, and a MLA model."""
    folder = tmp_path_factory.mktemp("lost")
    return [
        make_random_checkpoint(
            SHAPES[name][0], folder / name, {"vocab_size": VOCAB} | SHAPES[name][1], "float32", 5
        )
        for name in ("qwen3-yarn-window", "v3-groups-q-lora")
    ]


class Alternating:
    """A grammar that allows one half of the vocabulary and then the other, in turn."""

    pending, error, accepted, is_terminated = False, None, True, False

    def __init__(self) -> None:
        self.turn = 0

    def feed(self, token: int) -> None:
        self.accepted = token % 2 == self.turn % 2
        self.turn += 1

    def bitmask(self) -> bytes:
        return bytes([0x55, 0xAA][self.turn % 2] for _ in range(VOCAB // 8))


class Grammars:
    def compile(self, grammar: Grammar, output: Sequence[int] = ()) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(Alternating())
        return future


class Silent:
    """A tokenizer whose tokens have no text."""

    def decode(self, ids: list[int]) -> str:
        return ""


def requests(models: int) -> list[GenerateRequest]:
    random = np.random.default_rng(9)
    made = []
    for model, (i, sampling) in itertools.product(range(models), enumerate(SAMPLINGS)):
        made.append(
            GenerateRequest(
                rid=f"{model}-{i}",
                model=model,
                input_ids=[int(token) for token in random.integers(0, VOCAB, 3 + 5 * i)],
                sampling=sampling,
                stop=StopRules(
                    max_new_tokens=8 + i % 3, min_new_tokens=2 * (i % 2), ignore_eos=i % 3 == 0
                ),
                logprobs=Logprobs(
                    output=i % 3 == 1, prompt_start=2 if i % 2 == 0 else -1, top=2, token_ids=(7,)
                ),
                grammar=Grammar(kind="regex", source="") if i in (2, 4) else None,
                stream=i % 2 == 0,
            )
        )
    return made


class Served:
    """The core over a real attention rank, which is another one after each loss."""

    def __init__(
        self, models: list[Path], loop: Literal["host", "resident"], **fields: Any
    ) -> None:
        settings = {"chunked_prefill_size": 16, "tbt_target_ms": 0.0, "lanes": 2} | fields
        self._start = lambda: Machine(models, loop=loop, **settings)
        self.machine = self._start()
        self.core = SchedulerCore(
            self.machine.deployment,
            {
                number: ModelTools(spec=spec, decoder=Silent(), grammars=Grammars())
                for number, spec in self.machine.specs.items()
            },
            lambda: 0.0,
        )
        self.outputs: dict[str, list[Output]] = defaultdict(list)
        self._results: list[StepResult] = []
        """Results that the core has not taken yet."""

    def run(self, made: Iterable[GenerateRequest], losses: Iterable[int] = ()) -> int:
        """Serves the requests; the rank is lost after each number of results in ``losses``. Returns
        how many results there were."""
        for request in made:
            self.core.add(request)
        for taken in itertools.count():
            self._schedule()
            if taken in losses:
                self._lose()
            if not self.core.snapshot().ranks[0].steps_in_flight:
                return taken
            self._results = self._results or self.machine.results(1)
            self.core.on_result(0, self._results.pop(0))
        raise AssertionError

    def _schedule(self) -> None:
        self.core.schedule()
        for _, message in self.core.drain_messages():
            executor = self.machine.first.executor
            if isinstance(message, Recall):
                executor.recall(message)
            else:
                assert isinstance(message, Step | Release)
                executor.submit(message)
        for output in self.core.drain_outputs():
            self.outputs[output.rid].append(output)

    def _lose(self) -> None:
        while not self.machine.first.executor.quiet:
            for device in self.machine.devices:
                device.executor.run(0.01)
        self.machine.close()
        self._results.clear()
        self.core.lose_attention_rank(0)
        self._schedule()
        self.machine = self._start()
        self.core.restore_attention_rank(0)
        self._schedule()

    def yielded(self, rid: str) -> tuple[Any, list[TokenLogprobs], list[TokenLogprobs]]:
        """(tokens and end, log-probabilities of the output, of the prompt)."""
        outputs = self.outputs[rid]
        assert [o.finish is None for o in outputs] == [True] * (len(outputs) - 1) + [False]
        tokens = [token for output in outputs for token in output.token_ids]
        output = [p for output in outputs for p in output.output_logprobs]
        return (tokens, outputs[-1].finish), output, outputs[0].prompt_logprobs


def served(
    models: list[Path], loop: Literal["host", "resident"], losses: Iterable[int], **fields: Any
) -> tuple[Served, int]:
    it = Served(models, loop, **fields)
    results = it.run(requests(len(models)), losses)
    it.machine.close()
    return it, results


def close(found: list[TokenLogprobs], expected: list[TokenLogprobs]) -> bool:
    return len(found) == len(expected) and all(
        a.token == b.token
        and a.logprob == (b.logprob and pytest.approx(b.logprob, abs=1e-4))
        and [t for _, t in a.top] == [t for _, t in b.top]
        and [p for p, _ in a.top] == pytest.approx([p for p, _ in b.top], abs=1e-4)
        and [p for p, _ in a.token_ids] == pytest.approx([p for p, _ in b.token_ids], abs=1e-4)
        for a, b in zip(found, expected, strict=True)
    )


@pytest.mark.parametrize(
    ("loop", "lease", "stride"), [("host", 1, 7), ("resident", 1, 5), ("resident", 5, 4)]
)
def test_tokens_and_log_probabilities_are_the_same(
    pair: list[Path], loop: Literal["host", "resident"], lease: int, stride: int
) -> None:
    calm, results = served(pair, loop, (), lease_steps=lease)
    made = requests(len(pair))
    assert len({str(calm.yielded(r.rid)[0][0]) for r in made}) > len(made) - 3
    every = [[after] for after in range(0, results, stride)]
    again = [list(range(0, 2 * results, 7)), [3, 4, 5, 6]]  # lost while it is computed again
    for losses in [*every, *again]:
        stormy, _ = served(pair, loop, losses, lease_steps=lease)
        for request in made:
            ended, output, prompt = stormy.yielded(request.rid)
            expected = calm.yielded(request.rid)
            assert ended == expected[0], (losses, request)
            assert close(output, expected[1]) and close(prompt, expected[2]), (losses, request)
    counts = stormy.core.snapshot().models
    assert all(model.replayed_requests and model.replayed_tokens for model in counts)


_NOT_WITH_TILES = pytest.mark.skipif(default_isa() == "amx", reason="tiles round otherwise")


@pytest.mark.parametrize(
    ("loop", "dtype", "kv_cache_dtype"),
    [
        pytest.param("resident", "bfloat16", "auto", marks=_NOT_WITH_TILES),
        pytest.param("resident", "bfloat16", "fp8_e4m3", marks=_NOT_WITH_TILES),
        pytest.param("resident", "bfloat16", "fp8_e5m2", marks=_NOT_WITH_TILES),
        ("host", "bfloat16", "auto"),
        ("host", "bfloat16", "fp8_e4m3"),
        ("host", "float32", "auto"),
    ],
)
def test_they_are_the_same_to_the_bit(
    tmp_path: Path, loop: Literal["host", "resident"], dtype: str, kv_cache_dtype: str
) -> None:
    """A row comes out the same in a chunk of any length and alone, be it of a model with a window,
    with latent attention, or with experts that are chosen by sigmoids."""
    shape = {"vocab_size": VOCAB, "max_position_embeddings": 512, "num_hidden_layers": 2}
    names = ["mixtral"] if loop == "resident" else ["qwen3-yarn-window", "v3-groups-q-lora"]
    families = {"mixtral": ("mixtral", {}), **SHAPES}
    paths = [
        make_random_checkpoint(
            families[name][0], tmp_path / name, families[name][1] | shape, dtype, 5
        )
        for name in names
    ]
    _check_bits(paths, loop, kv_cache_dtype)


@pytest.mark.parametrize(
    ("loop", "dtype"),
    [
        pytest.param("resident", "bfloat16", marks=_NOT_WITH_TILES),
        ("host", "float32"),
    ],
)
def test_recurrent_states_are_the_same_to_the_bit(
    tmp_path: Path, loop: Literal["host", "resident"], dtype: str
) -> None:
    shape = SHAPES["qwen3-next"][1] | {"vocab_size": VOCAB, "max_position_embeddings": 512}
    path = make_random_checkpoint("qwen3_next", tmp_path / "model", shape, dtype, 5)
    _check_bits([path], loop, "auto")


def _check_bits(paths: list[Path], loop: Literal["host", "resident"], kv_cache_dtype: str) -> None:
    """Asserts that losses change no bit of what six requests of each model yield."""
    random = np.random.default_rng(2)
    made = [
        GenerateRequest(
            rid=f"{model}-{i}",
            model=model,
            input_ids=[int(token) for token in random.integers(0, VOCAB, 245 + 9 * i)],
            sampling=Sampling(temperature=0.8 * (i % 2), seed=i),
            stop=StopRules(max_new_tokens=24, ignore_eos=True),
            logprobs=Logprobs(output=True, top=5),
        )
        for model in range(len(paths))
        for i in range(6)
    ]

    def yielded(losses: list[int]) -> list[Any]:
        it = Served(
            paths, loop, chunked_prefill_size=96, chunks_per_model=8, kv_cache_dtype=kv_cache_dtype
        )
        it.run(made, losses)
        it.machine.close()
        return [it.yielded(request.rid) for request in made]

    calm = yielded([])
    for losses in ([18], [33], [40, 60, 84]):
        assert yielded(losses) == calm, losses


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8_e4m3", "fp8_e5m2"])
@pytest.mark.parametrize("loop", ["host", "resident"])
def test_cached_prefixes_give_the_same_tokens(
    pair: list[Path], loop: Literal["host", "resident"], kv_cache_dtype: str
) -> None:
    """Rows that the prefix cache holds are those that the prompt would be computed to."""
    random = np.random.default_rng(2)
    prompts = [random.integers(0, VOCAB, 40).tolist() for _ in pair]
    made = [
        GenerateRequest(
            rid=f"{model}-{i}",
            model=model,
            input_ids=[*prompt[: 40 - 8 * (i % 2)], *([7, i] * (i % 2))],
            sampling=Sampling(temperature=0.8 * (i % 2), seed=i),
            stop=StopRules(max_new_tokens=10, ignore_eos=True),
        )
        for model, prompt in enumerate(prompts)
        for i in range(4)
    ]
    found: dict[bool, list[Any]] = {}
    for prefix_cache in (False, True):
        it = Served(pair, loop, prefix_cache=prefix_cache, kv_cache_dtype=kv_cache_dtype)
        for request in made:
            it.run([request])
        it.machine.close()
        found[prefix_cache] = [it.yielded(request.rid)[0] for request in made]
        cached = [model.cached_tokens for model in it.core.snapshot().models]
        assert all(tokens > 60 for tokens in cached) if prefix_cache else not any(cached)
    assert found[True] == found[False]
