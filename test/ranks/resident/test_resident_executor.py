"""The resident loop against the host loop: the same tokens in float32, whatever the batch, the
placement and the sampling; and its order of things."""

from __future__ import annotations

import dataclasses
import itertools
import time
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
import pytest
import torch
from crosspool.kernels.engine import EngineError
from crosspool.ranks.sampler import adjusts
from crosspool.transport.data_path import DispatchHeader
from crosspool.transport.messages import Logprobs, Recall, Release, Row, Sampling, Step, StepResult
from crosspool.transport.shared_memory import SharedMemoryTransport
from make_random_checkpoint import make_random_checkpoint
from support.families import SHAPES
from support.machine import CORES, GREEDY, Machine, Stream

FIRST, SECOND = f"cpu:{CORES[0]}", f"cpu:{CORES[-1]}"
PLACEMENTS: dict[str, dict[str, Any]] = {
    "one device": {},
    "one core": {"kv": FIRST, "weights": [FIRST]},
    "two devices": {"kv": FIRST, "weights": [SECOND]},
    "two FFN ranks, TP": {"kv": FIRST, "weights": [FIRST, SECOND]},
    "two FFN ranks, EP": {"kv": FIRST, "weights": [FIRST, SECOND], "ffn_parallel": "ep"},
}
VOCAB = 160
DEMO = Path(__file__).parents[3] / "python" / "crosspool" / "demo"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("families")
    return [
        make_random_checkpoint(family, folder / name, {"vocab_size": VOCAB} | shape, "float32", 5)
        for name, (family, shape) in SHAPES.items()
    ]


@pytest.fixture(scope="module")
def pair(checkpoints: list[Path]) -> list[Path]:
    """A GQA model and a MLA model."""
    names = list(SHAPES)
    return [checkpoints[names.index(name)] for name in ("qwen3-yarn-window", "v3-groups-q-lora")]


def streams(models: int, new_tokens: int = 12, **fields: Any) -> list[Stream]:
    """Makes ragged prompts for each model, some of several chunks, so that prompts and decode
    rows mix."""
    random = np.random.default_rng(3)
    return [
        Stream(
            model,
            [int(token) for token in random.integers(0, VOCAB, length)],
            new_tokens + length % 3,
            chunk=7,
            **fields,
        )
        for model in range(models)
        for length in (19, 1, 8, 30)
    ]


def generated(
    loop: Literal["host", "resident"],
    models: list[Path],
    of: list[Stream],
    lease: int = 1,
    **fields: Any,
) -> list[Stream]:
    """Returns what the loop makes of copies of the streams."""
    copies = [dataclasses.replace(s, output=[], results=[], pages=[]) for s in of]
    with Machine(models, loop=loop, **fields) as machine:
        machine.generate(copies, lease)
        assert (machine.results_taken > machine.steps_sent) == (lease > 1)
        assert machine.first.executor.quiet
    return copies


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_greedy_tokens_equal_the_host_loops(placement: str, checkpoints: list[Path]) -> None:
    if len(CORES) == 1 and placement not in ("one device", "one core"):
        pytest.skip("needs two cores")
    of, fields = streams(len(checkpoints)), PLACEMENTS[placement]
    host = generated("host", checkpoints, of, **fields)
    resident = generated("resident", checkpoints, of, **fields)
    assert [s.output for s in resident] == [s.output for s in host]
    assert len({tuple(s.output[-4:]) for s in host}) > len(host) // 2


SAMPLINGS = [
    GREEDY,
    Sampling(temperature=1.3, top_k=1),
    Sampling(temperature=1.0, seed=1),
    Sampling(temperature=0.7, top_k=5, seed=2),
    Sampling(temperature=1.5, top_p=0.8, seed=2**63 + 5),
    Sampling(temperature=1.2, top_k=50, top_p=0.95, min_p=0.05, seed=4),
    Sampling(temperature=1.1, min_p=0.2, seed=-7),
    Sampling(temperature=0.9, frequency_penalty=0.7, presence_penalty=0.3, seed=6),
    Sampling(temperature=0.0, repetition_penalty=1.4),
    Sampling(temperature=1.0, logit_bias={3: 4.0, 9: -50.0}, seed=8),
    Sampling(temperature=1.0, min_new_tokens=4, stop_token_ids=(1, 2), seed=9),
]


def test_every_sampling_equals_the_host_loops(pair: list[Path]) -> None:
    """All requests are in one batch, with and without log-probabilities, some under a grammar:
    rows that native code samples stand beside rows that Python samples."""
    random = np.random.default_rng(9)
    allowed = np.packbits(random.random(VOCAB) < 0.3, bitorder="little").tobytes()
    of = []
    for model in range(len(pair)):
        for i, sampling in enumerate(SAMPLINGS):
            prompt = [int(token) for token in random.integers(0, VOCAB, 3 + i)]
            logprobs = Logprobs(output=i % 4 == 3, prompt_start=2 if i % 5 == 4 else -1, top=2)
            of.append(Stream(model, prompt, 10, sampling, logprobs, chunk=4))
            if i % 3 == 0:
                of.append(Stream(model, prompt, 6, sampling, bitmask=allowed))
    host, resident = generated("host", pair, of), generated("resident", pair, of)
    for theirs, ours in zip(host, resident, strict=True):
        assert ours.output == theirs.output, ours.sampling
        for expected, found in zip(theirs.results, ours.results, strict=True):
            assert (found.output is None) == (expected.output is None)
            if expected.output is not None and found.output is not None:
                assert found.output.logprob == pytest.approx(expected.output.logprob, abs=1e-4)
            assert len(found.prompt) == len(expected.prompt)
            for a, b in zip(found.prompt, expected.prompt, strict=True):
                assert (a.token, a.logprob) == (b.token, pytest.approx(b.logprob, abs=1e-4))
    assert len({tuple(s.output) for s in host}) > len(host) // 2


def test_what_crosses_is_counted_as_by_the_host_loop(pair: list[Path]) -> None:
    placement = "two FFN ranks, TP" if len(CORES) > 1 else "one device"
    counted: dict[str, Any] = {}
    for loop in ("host", "resident"):
        with Machine(pair, loop=loop, **PLACEMENTS[placement]) as machine:  # type: ignore[arg-type]
            machine.generate(streams(len(pair), 3))
            answers = [msgspec.to_builtins(device.counters()) for device in machine.devices]
            for answer in answers:
                for ends in (answer["links"], answer["served"]):
                    # Which lane a step takes is a matter of time.
                    ends[:] = sorted(
                        (
                            e["attention_rank"],
                            e["ffn_rank"],
                            e["dispatch_bytes"] == e["combine_bytes"],
                        )
                        for e in ends
                    )
            totals = [
                sum(link.counters.rows for lane in machine.first.links for link in lane),
                sum(link.counters.combine_bytes for lane in machine.first.links for link in lane),
                sum(link.counters.dispatches for lane in machine.first.links for link in lane),
            ]
            counted[loop] = (answers, totals)
    assert counted["host"] == counted["resident"]


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose LM head is worked on in several pieces, of columns and of rows."""
    shape = {"vocab_size": 100_000, "num_hidden_layers": 2}
    return make_random_checkpoint("qwen3_moe", tmp_path_factory.mktemp("wide"), shape, "float32", 5)


def test_the_lm_head_comes_in_pieces(wide: Path, pair: list[Path]) -> None:
    """The other lane runs between the pieces, and they add up to the whole."""
    prompt = [int(token) for token in np.random.default_rng(1).integers(0, 100_000, 150)]
    asked = Logprobs(prompt_start=1)
    long = Stream(0, prompt, 1, logprobs=asked)
    models = [wide, pair[1]]
    (host,) = generated("host", models, [long])
    with Machine(models, loop="resident") as machine:
        machine.first.trace.start()
        other = Stream(1, [1, 2, 3], 1)
        steps = [machine.step([long]), machine.step([other])]
        for step in steps:
            machine.submit(step)
        for result in machine.results(2):
            machine.take([long if result.step == steps[0].step else other], result)
        events = machine.first.trace.stop()
    assert long.output == host.output
    expected, found = host.results[0].prompt, long.results[0].prompt
    assert [p.token for p in found] == prompt[1:]
    assert [p.logprob for p in found] == pytest.approx([p.logprob for p in expected], abs=1e-3)
    heads = [e for e in events if e.part == "lm_head" and e.model == 0]
    assert len(heads) >= 6
    assert sum({e.rows for e in heads}) >= 100
    between = [e for e in events if e.model == 1 and e.start_ns > heads[0].end_ns]
    assert between
    assert between[0].end_ns < heads[-1].start_ns


def test_a_batch_that_ends_is_replaced_at_once(checkpoints: list[Path]) -> None:
    """Lanes share nothing: while the deeper model's step goes on, the other lane takes the next
    step without the host's help."""
    names = list(SHAPES)
    deep = checkpoints[names.index("qwen3-tied-dense-between")]
    shallow = checkpoints[names.index("olmoe")]
    with Machine([shallow, deep, shallow], loop="resident", kv=FIRST, weights=[FIRST]) as machine:
        for _ in range(50):
            of = [Stream(model, list(range(1, 40)), 1) for model in (0, 1, 2)]
            machine.first.trace.start()
            steps = [machine.step([s]) for s in of]
            for step in steps:
                machine.submit(step)
            submitted = time.monotonic_ns()
            machine.results(3)
            events = machine.first.trace.stop()
            # On a busy machine the host may be late with the second step, and say nothing of us.
            if submitted < events[0].end_ns:
                break
        else:
            pytest.skip("this machine is too busy: a step's first part was always over")
    assert [spec.layers for spec in machine.specs.values()] == [2, 4, 2]
    spans = {
        step.step: [e for e in events if e.role == "attention" and e.step == step.step]
        for step in steps
    }
    first, second, third = (spans[step.step] for step in steps)
    assert third[0].lane == first[0].lane != second[0].lane
    assert first[-1].end_ns <= third[0].start_ns < second[-1].start_ns
    # And they took turns, from the second part on, when both had work.
    together = [e for e in events if e.start_ns < first[-1].end_ns]
    lanes = [e.lane for e in together[1:12]]
    assert all(a != b for a, b in itertools.pairwise(lanes)), lanes


def test_operations_keep_their_order(pair: list[Path]) -> None:
    """A release waits for the step of its model before it, and holds up the step behind it."""
    with Machine(pair, loop="resident") as machine:
        assert machine.first.attention is not None
        of = [Stream(0, list(range(60)), 1), Stream(1, [1, 2], 1)]
        first, second = (machine.step([s]) for s in of)
        machine.submit(first)
        machine.submit(Release(model=0, requests=[of[0].request], unmap_chunks=[0, 1]))
        machine.submit(second)
        pool = machine.first.attention.virtualizer
        assert not machine.first.executor.quiet
        assert not machine.first.executor.drained
        assert [result.step for result in machine.results(2)] == [first.step, second.step]
        assert pool.mapped_bytes(0) == 0
        assert pool.mapped_bytes(1) == 2 * machine.deployment.chunk_bytes
        assert machine.first.attention.requests == 1
        assert machine.first.executor.quiet
        assert machine.first.executor.drained


@pytest.mark.parametrize(
    ("tokens", "pages", "message"),
    [
        (list(range(9)), [0, 1], "request 7 has pages for 8 tokens, not for 9"),
        ([VOCAB], [0], f"a token outside the vocabulary of {VOCAB}"),
        ([1], [10_000_000], "a page outside the"),
        ([1] * 600, list(range(150)), "600 token rows; 1 to 576 fit"),
    ],
)
def test_a_step_that_makes_no_sense_is_refused(
    pair: list[Path], tokens: list[int], pages: list[int], message: str
) -> None:
    with Machine(pair[:1], loop="resident") as machine:
        opened = machine.step([Stream(0, [1], 1)]).opens[0]
        open7 = type(opened)(request=7, prompt_len=600, sampling=GREEDY, logprobs=Logprobs())
        row = Row(request=7, start=0, tokens=tokens, pages=pages, sample=True)
        with pytest.raises(RuntimeError, match=message):
            machine.submit(Step(step=1, model=0, map_chunks=[0], opens=[open7], rows=[row]))


# --- leases


@pytest.mark.parametrize("lanes", [1, 2])
@pytest.mark.parametrize("placement", ["one device", "two FFN ranks, TP"])
def test_leases_give_the_same_tokens(placement: str, lanes: int, pair: list[Path]) -> None:
    """Ragged batches, greedy and drawn; three models, so that leases share lanes."""
    if len(CORES) == 1 and placement != "one device":
        pytest.skip("needs two cores")
    models, fields = [*pair, pair[0]], {**PLACEMENTS[placement], "lanes": lanes}
    of = streams(len(models), 14)
    for i, s in enumerate(of):
        s.sampling = SAMPLINGS[i % 7]
    host = generated("host", models, of, **fields)
    resident = generated("resident", models, of, lease=5, **fields)
    assert [s.output for s in resident] == [s.output for s in host]


@pytest.mark.parametrize("sampling", SAMPLINGS[7:])
def test_what_python_must_see_is_not_leased(sampling: Sampling, pair: list[Path]) -> None:
    """Penalties, bias, and min_new_tokens as long as it bars something are not leased."""
    of = [Stream(0, [1, 2, 3], 9, sampling), Stream(0, [4], 9)]
    (host, _), copies = generated("host", pair[:1], of), [dataclasses.replace(s) for s in of]
    with Machine(pair[:1], loop="resident") as machine:
        first = machine.step(copies, 3)
        machine.submit(first)
        (result,) = machine.results(1)
        assert not result.more
        machine.take(copies, result)
        machine.generate(copies, 4)
    assert copies[0].output == host.output


def test_a_stop_token_ends_a_lease(pair: list[Path]) -> None:
    (free,) = generated("host", pair[:1], [Stream(0, [1, 2, 3], 30, Sampling(seed=3))])
    stop = free.output[11]
    first = free.output.index(stop)
    sampling = Sampling(seed=3, stop_token_ids=(VOCAB - 1, stop))
    with Machine(pair[:1], loop="resident") as machine:
        stopped = Stream(0, [1, 2, 3], 30, sampling)
        machine.submit(machine.step([stopped], 30))
        results = machine.results(first + 1)
        assert [result.more for result in results] == [True] * first + [False]
        for result in results:
            machine.take([stopped], result)
        assert machine.first.executor.quiet
    assert stopped.output == free.output[: first + 1]


def test_others_come_in_between(pair: list[Path]) -> None:
    """On one lane, a lease gives way to another model's step, and ends when it is recalled or
    when something of its model is released."""
    # Many rows on one core, so that a lease does not end before this thread takes its results.
    fields: dict[str, Any] = {"lanes": 1, "chunks_per_model": 16} | PLACEMENTS["one core"]
    with Machine(pair, loop="resident", **fields) as machine:

        def begin() -> Step:
            lease = machine.step([Stream(0, [i], 900) for i in range(24)], 800)
            machine.submit(lease)
            assert all(result.more for result in machine.results(3))
            return lease

        def until(step: int) -> list[StepResult]:
            results = machine.results(1)
            while not any(result.step == step and not result.more for result in results):
                results += machine.results(1)
            return results

        ended, short = Stream(0, [7], 1), Stream(1, [4], 1)
        machine.submit(machine.step([ended]))
        machine.take([ended], machine.results(1)[0])

        lease = begin()
        other = machine.step([short])
        machine.submit(other)
        results = until(other.step)
        assert [result.step for result in results if not result.more] == [other.step]
        machine.first.executor.recall(Recall(step=lease.step))
        recalled = until(lease.step)
        assert machine.first.executor.quiet
        machine.first.executor.recall(Recall(step=lease.step))  # it has ended
        assert len(results) + len(recalled) < 700

        lease = begin()
        machine.submit(Release(model=0, requests=[ended.request], unmap_chunks=[]))
        assert len(until(lease.step)) < 700
        assert machine.first.executor.quiet


@pytest.mark.skipif(len(CORES) == 1, reason="needs two cores")
def test_a_dispatch_that_breaks_the_protocol_ends_the_loop(pair: list[Path]) -> None:
    with Machine(pair, loop="resident", **PLACEMENTS["two devices"]) as machine:
        assert machine.fd is not None
        link = SharedMemoryTransport(
            machine.fd, machine.deployment, machine.deployment.kv_pool_devices[0]
        ).attention_link(1, 0)
        link.dispatch(DispatchHeader(epoch=0, model=1, layer=0, rows=3), torch.zeros(3, 7))
        ffn = machine.devices[1].executor
        with pytest.raises(EngineError, match="3 rows of 28 bytes to layer 0 of model 1"):
            for _ in range(100):
                ffn.run(0.1)


@pytest.mark.parametrize("name", ["tiny-qwen3-moe", "tiny-deepseek-v2", "tiny-glm4-moe-lite"])
def test_bundled_models_write_what_the_host_loop_writes(name: str) -> None:
    random = np.random.default_rng(2)
    of = [
        Stream(0, [int(token) for token in random.integers(20, 250, 5 + 2 * i)], 64)
        for i in range(20)
    ]
    fields: dict[str, Any] = {"dtype": "float32", "chunks_per_model": 6}
    host = generated("host", [DEMO / name], of, **fields)
    resident = generated("resident", [DEMO / name], of, **fields)
    assert [s.output for s in resident] == [s.output for s in host]


def test_bfloat16_stays_as_close_to_float32_as_the_host_loop(checkpoints: list[Path]) -> None:
    """Both round at the same places; the sums in between differ in their order."""
    everything = Logprobs(prompt_start=0, token_ids=tuple(range(VOCAB)))
    of = streams(len(checkpoints), 1, logprobs=everything)

    def distributions(streams: list[Stream]) -> torch.Tensor:
        rows = [p for s in streams for r in s.results for p in r.prompt if p.logprob is not None]
        return torch.tensor([[value for value, _ in p.token_ids] for p in rows])

    exact = distributions(generated("host", checkpoints, of))
    host = distributions(generated("host", checkpoints, of, dtype="bfloat16"))
    resident = distributions(generated("resident", checkpoints, of, dtype="bfloat16"))
    theirs, ours = (host - exact).abs().mean(), (resident - exact).abs().mean()
    assert 0 < ours < 1.2 * theirs
    assert (resident - host).abs().mean() < theirs


def test_samplings_cover_both_sides() -> None:
    """Some of SAMPLINGS are native code's, some Python's."""
    from crosspool.ranks.sampler import SamplingRow

    changed = [adjusts(SamplingRow(s, [1], 5)) for s in SAMPLINGS]
    assert any(changed)
    assert not all(changed)
