"""The sampler against row-by-row float64 implementations, and the statistics of its draw."""

import math

import numpy as np
import pytest
import torch
from crosspool.ranks.sampler import SamplingRow, sample, token_logprobs, uniform
from crosspool.transport.messages import Sampling

VOCAB = 97


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def reference_adjusted(logits, row, eos=()):
    """Applies the rules in SGLang's order: frequency, presence, min tokens; repetition; grammar;
    bias."""
    x = logits.astype(np.float64).copy()
    s = row.sampling
    for token in row.output:
        x[token] -= s.frequency_penalty
    for token in set(row.output):
        x[token] -= s.presence_penalty
    if len(row.output) < s.min_new_tokens:
        for token in {*s.stop_token_ids, *eos}:
            x[token] = -math.inf
    for token in set(row.output):
        x[token] = (
            x[token] * s.repetition_penalty if x[token] < 0 else x[token] / s.repetition_penalty
        )
    if row.bitmask is not None:
        words = np.frombuffer(row.bitmask, dtype="<i4")
        for token in range(len(x)):
            if not (int(words[token // 32]) >> (token % 32)) & 1:
                x[token] = -math.inf
    for token, bias in s.logit_bias.items():
        x[token] += bias
    return x


def reference_distribution(logits, row, eos=()):
    """The filtered, renormalised distribution in float64: [vocab]."""
    s = row.sampling
    x = reference_adjusted(logits, row, eos) / s.temperature
    p = np.exp(x - x.max())
    p /= p.sum()
    order = np.argsort(-p, kind="stable")
    kept = np.zeros_like(p)
    before = 0.0
    for rank, token in enumerate(order):
        if s.top_k > 0 and rank >= s.top_k:
            break
        if before > s.top_p:
            break
        if p[token] < s.min_p * p[order[0]]:
            break
        kept[token] = p[token]
        before += p[token]
    return kept / kept.sum()


def mask_of(allowed, vocab=VOCAB):
    words = np.zeros((vocab + 31) // 32, dtype=np.uint32)
    for token in allowed:
        words[token // 32] |= np.uint32(1 << (token % 32))
    return words.astype("<u4").tobytes()


def random_logits(rows, seed=0, vocab=VOCAB, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, vocab, generator=generator) * scale


ADJUSTMENTS = [
    SamplingRow(Sampling(temperature=0, frequency_penalty=1.5), [3, 3, 3, 7], 9),
    SamplingRow(Sampling(temperature=0, presence_penalty=1.9), [5, 11, 5], 9),
    SamplingRow(Sampling(temperature=0, repetition_penalty=1.8), list(range(40)), 50),
    SamplingRow(Sampling(temperature=0, repetition_penalty=0.5), list(range(40, 60)), 50),
    SamplingRow(
        Sampling(
            temperature=0, frequency_penalty=0.7, presence_penalty=-0.4, repetition_penalty=1.3
        ),
        [i % 30 for i in range(75)],
        90,
    ),
    SamplingRow(Sampling(temperature=0, logit_bias={13: 50.0, 14: -5.0}), [], 4),
    SamplingRow(Sampling(temperature=0), [], 4, mask_of({31, 32, 64, 96})),
    SamplingRow(Sampling(temperature=0, logit_bias={1: 80.0}), [], 4, mask_of({31, 96})),
]


def test_greedy_is_argmax_and_leaves_the_logits_alone():
    logits = random_logits(6)
    before = logits.clone()
    rows = [SamplingRow(Sampling(temperature=0, seed=i), [1, 2], 5) for i in range(5)]
    rows.append(SamplingRow(Sampling(temperature=1.0, top_k=1), [], 5))
    assert sample(logits, rows, ()).tolist() == logits.argmax(-1).tolist()
    rows[0] = ADJUSTMENTS[0]
    rows[1] = SamplingRow(Sampling(temperature=0.7, top_k=5), [], 5)
    sample(logits, rows, ())
    assert torch.equal(logits, before)


@pytest.mark.parametrize("seed", range(6))
def test_adjustments_against_reference(seed):
    logits = random_logits(len(ADJUSTMENTS), seed)
    expected = [
        int(reference_adjusted(line, row).argmax())
        for line, row in zip(logits.numpy(), ADJUSTMENTS, strict=True)
    ]
    assert sample(logits, ADJUSTMENTS, ()).tolist() == expected


@pytest.mark.parametrize("row", ADJUSTMENTS)
def test_adjusted_distribution_draws_like_the_reference(row):
    """The whole adjusted distribution is right, not only its maximum: chi-square over 4000
    positions."""
    sampling = Sampling(
        **{f: getattr(row.sampling, f) for f in row.sampling.__struct_fields__}
        | {"temperature": 1.5, "seed": 11}
    )
    drawn = SamplingRow(sampling, row.output, 0, row.bitmask)
    assert_draws_follow(random_logits(1, 3)[0], drawn)


def test_min_new_tokens_bars_eos_and_stop_ids():
    logits = torch.zeros(3, VOCAB)
    logits[:, 5] = 9.0
    logits[:, 6] = 8.0
    logits[:, 7] = 7.0
    sampling = Sampling(temperature=0, min_new_tokens=2, stop_token_ids=(6,))
    rows = [SamplingRow(sampling, output, 9) for output in ([], [1], [1, 1])]
    assert sample(logits, rows, (5,)).tolist() == [7, 7, 5]


def test_a_grammar_that_allows_only_eos_beats_min_new_tokens():
    logits = random_logits(2)
    rows = [
        SamplingRow(Sampling(temperature=t, min_new_tokens=9), [], 3, mask_of({5}))
        for t in (0.0, 1.0)
    ]
    assert sample(logits, rows, (5,)).tolist() == [5, 5]


def test_logits_that_are_no_numbers_still_give_a_token():
    rows = [SamplingRow(Sampling(temperature=t, top_k=k), [], 3) for t, k in ((1.0, -1), (1.0, 4))]
    tokens = sample(torch.full((2, VOCAB), torch.nan), rows, ())
    assert all(0 <= token < VOCAB for token in tokens.tolist())


def assert_draws_follow(logits, row, draws=4000, eos=()):
    """Draws at positions 0.. follow the reference distribution, and nothing outside it appears."""
    expected = reference_distribution(logits.numpy(), row, eos)
    rows = [
        SamplingRow(row.sampling, row.output, position, row.bitmask) for position in range(draws)
    ]
    tokens = sample(logits.expand(draws, -1), rows, eos).numpy()
    counts = np.bincount(tokens, minlength=len(expected))
    assert counts[expected == 0].sum() == 0
    frequent = expected * draws >= 5
    observed = np.append(counts[frequent], counts[~frequent].sum())
    wanted = np.append(expected[frequent], expected[~frequent].sum()) * draws
    if wanted[-1] < 5:
        observed, wanted = observed[:-1], wanted[:-1]
    chi_square = float((((observed - wanted) ** 2) / wanted).sum())
    freedom = max(len(wanted) - 1, 1)
    # Wilson-Hilferty: the cube root is near normal; 4 sigma. The seeds are fixed.
    z = ((chi_square / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))
    assert z < 4, (chi_square, freedom)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(seed=1),
        Sampling(temperature=0.6, seed=2),
        Sampling(top_k=7, seed=3),
        Sampling(top_p=0.7, seed=4),
        Sampling(min_p=0.1, seed=5),
        Sampling(temperature=1.7, top_k=40, top_p=0.9, min_p=0.01, seed=6),
        Sampling(top_p=0.001, seed=7),
        Sampling(top_k=10**6, top_p=0.95, seed=-8),
    ],
)
def test_draws_follow_the_distribution(sampling):
    assert_draws_follow(random_logits(1, 5)[0], SamplingRow(sampling, [], 0))


@pytest.mark.parametrize(
    "sampling", [Sampling(top_p=0.8, seed=1), Sampling(top_k=2000, seed=2), Sampling(min_p=1e-3)]
)
def test_filters_that_reach_beyond_the_first_candidates(sampling):
    """A flat distribution over 3000 tokens, of which the filters keep more than 1024."""
    logits = random_logits(1, 6, vocab=3000, scale=0.3)[0]
    row = SamplingRow(sampling, [], 0)
    expected = reference_distribution(logits.numpy(), row)
    assert np.count_nonzero(expected) > 1024
    rows = [SamplingRow(sampling, [], position) for position in range(1500)]
    tokens = sample(logits.expand(1500, -1), rows, ()).numpy()
    assert (expected[tokens] > 0).all()
    rank = np.empty(3000, dtype=int)
    rank[np.argsort(-expected, kind="stable")] = np.arange(3000)
    beyond = expected[rank >= 1024].sum()
    share = (rank[tokens] >= 1024).mean()
    assert abs(share - beyond) < 4 * math.sqrt(beyond * (1 - beyond) / 1500)


def test_a_row_does_not_depend_on_its_batch():
    logits = random_logits(40, 8)
    kinds = [
        Sampling(seed=3),
        Sampling(temperature=0),
        Sampling(top_p=0.8, seed=4),
        Sampling(temperature=1.3, top_k=9, seed=5),
        Sampling(repetition_penalty=1.2, seed=6),
    ]
    rows = [SamplingRow(kinds[i % 5], [i, 2 * i], 100 + i) for i in range(40)]
    together = sample(logits, rows, ()).tolist()
    alone = [sample(logits[i : i + 1], [rows[i]], ()).item() for i in range(40)]
    backwards = sample(logits.flip(0), rows[::-1], ()).tolist()[::-1]
    assert together == alone == backwards


def test_the_uniform_number_depends_on_seed_and_position_only():
    assert uniform(1, 2) == uniform(1, 2)
    assert len({uniform(seed, position) for seed in (-1, 0, 1) for position in range(50)}) == 150
    numbers = np.sort([uniform(9, position) for position in range(4000)])
    # Kolmogorov-Smirnov at far below 0.1 %.
    assert np.abs(numbers - (np.arange(4000) + 0.5) / 4000).max() < 2.0 / math.sqrt(4000)


def test_logprobs_against_log_softmax():
    logits = random_logits(3, 9)
    reference = torch.log_softmax(logits.double(), dim=-1)
    result = token_logprobs(logits, [4, 90, 0], [0, 5, 2], [(), (7, 1, 7), (96,)])
    for i, (token, top, asked) in enumerate([(4, 0, []), (90, 5, [7, 1, 7]), (0, 2, [96])]):
        line = reference[i]
        assert result[i].token == token
        assert result[i].logprob == pytest.approx(line[token].item(), abs=1e-5)
        best = line.sort(descending=True)
        assert [t for _, t in result[i].top] == best.indices[:top].tolist()
        assert [v for v, _ in result[i].top] == pytest.approx(best.values[:top].tolist(), abs=1e-5)
        assert [t for _, t in result[i].token_ids] == asked
        assert [v for v, _ in result[i].token_ids] == pytest.approx(line[asked].tolist(), abs=1e-5)
