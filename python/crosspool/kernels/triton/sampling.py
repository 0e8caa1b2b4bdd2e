"""Draws tokens by crosspool.ranks.sampler's rules.

One program per row. The filters keep a prefix of the tokens in descending order of probability,
and the draw falls somewhere in it; both ends are found by bisection over the bits of a
probability, which needs sums over the tokens but no sort. The sums run over the most probable
tokens alone where the filters reach no further.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from crosspool.kernels.triton.memory import Memory
from crosspool.kernels.triton.uniform import draw_uniform

_BLOCK = 4096
"""Tokens at a time, whatever the vocabulary: Triton's histogram counts an element once for every
thread that holds it, so there must be one for each of a program's 512 threads."""
_BINS = 2048
_BIN_SHIFT = 20
"""Probabilities by their highest bits, exponent and three bits of the fraction: 2048 bins."""
_CANDIDATES = 1024
"""Tokens that are looked at first."""


@dataclass(frozen=True)
class SamplingRules:
    """One rule per wanted row, [bucket] each, on the device; as
    :class:`crosspool.transport.messages.Sampling`."""

    temperature: torch.Tensor
    """float32; 0: the best token is taken without a draw."""
    top_k: torch.Tensor
    """int32; -1: all; 1: the best token."""
    top_p: torch.Tensor
    """float64; 1 or more: all."""
    min_p: torch.Tensor
    """float32, at most 1; 0: all."""
    seed: torch.Tensor
    """int64: the bits of the unsigned seed."""
    position: torch.Tensor
    """int64: position in the sequence of the token to pick."""


@dataclass(frozen=True)
class SamplingWorkspace:
    """Memory for choosing tokens; every tensor is [bucket, vocab]."""

    probs: torch.Tensor
    """float32."""
    candidates: torch.Tensor
    """float32: probabilities of the tokens that the filters may keep, in the tokens' order."""
    tokens: torch.Tensor
    """int32: the tokens of ``candidates``."""

    @classmethod
    def allocate(cls, bucket: int, vocab: int, memory: Memory) -> SamplingWorkspace:
        return cls(
            probs=memory.take(torch.float32, bucket, vocab),
            candidates=memory.take(torch.float32, bucket, vocab),
            tokens=memory.take(torch.int32, bucket, vocab),
        )


def sample(
    logits: torch.Tensor,
    best: torch.Tensor,
    rules: SamplingRules,
    count: torch.Tensor,
    tokens: torch.Tensor,
    workspace: SamplingWorkspace,
) -> None:
    """tokens[i] (int32 [bucket]): the best token where the rule takes it, else the one at which the
    draw falls. ``logits`` float32 [bucket, vocab]; ``best`` as from
    :func:`~crosspool.kernels.triton.argmax.argmax`.

    A row whose logits are not numbers gets the last token, as on the CPU."""
    bucket, vocab = logits.shape
    _sample_kernel[(bucket,)](
        logits,
        best,
        rules.temperature,
        rules.top_k,
        rules.top_p,
        rules.min_p,
        rules.seed,
        rules.position,
        count,
        tokens,
        workspace.probs,
        workspace.candidates,
        workspace.tokens,
        vocab,
        BLOCK=_BLOCK,
        BINS=_BINS,
        BIN_SHIFT=_BIN_SHIFT,
        CANDIDATES=_CANDIDATES,
        num_warps=16,
    )


@triton.jit
def _sample_kernel(
    logits: tl.tensor,
    best: tl.tensor,
    temperatures: tl.tensor,
    top_ks: tl.tensor,
    top_ps: tl.tensor,
    min_ps: tl.tensor,
    seeds: tl.tensor,
    positions: tl.tensor,
    count: tl.tensor,
    tokens: tl.tensor,
    probs: tl.tensor,
    candidates: tl.tensor,
    candidate_tokens: tl.tensor,
    vocab: tl.tensor,
    BLOCK: tl.constexpr,
    BINS: tl.constexpr,
    BIN_SHIFT: tl.constexpr,
    CANDIDATES: tl.constexpr,
) -> None:
    row = tl.program_id(0)
    if row >= tl.load(count):
        return
    temperature = tl.load(temperatures + row)
    top_k = tl.load(top_ks + row)
    best_token = tl.load(best + row)
    if (temperature == 0.0) | (top_k == 1):
        tl.store(tokens + row, best_token)
        return
    line = row.to(tl.int64) * vocab
    logits += line
    probs += line
    candidates += line
    candidate_tokens += line
    highest = tl.load(logits + best_token) / temperature
    i = tl.arange(0, BLOCK)
    sums = tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocab, BLOCK):
        x = tl.load(logits + start + i, start + i < vocab, other=float("-inf"))
        sums += tl.exp(x / temperature - highest)
    total = tl.sum(sums, 0)
    if total != total:
        tl.store(tokens + row, vocab - 1)
        return
    mass = tl.zeros([BLOCK], tl.float64)
    bins = tl.zeros([BINS], tl.int32)
    for start in range(0, vocab, BLOCK):
        inside = start + i < vocab
        x = tl.load(logits + start + i, inside, other=float("-inf"))
        p = tl.exp(x / temperature - highest) / total
        tl.store(probs + start + i, p, inside)
        mass += p.to(tl.float64)
        bins += tl.histogram(p.to(tl.int32, bitcast=True) >> BIN_SHIFT, BINS, inside)
    tl.debug_barrier()

    draw = draw_uniform(tl.load(seeds + row), tl.load(positions + row))
    top_k = tl.where((top_k <= 0) | (top_k > vocab), vocab, top_k)
    top_p = tl.load(top_ps + row)
    min_p = tl.load(min_ps + row)
    if (top_k == vocab) & (top_p >= 1.0) & (min_p <= 0.0):
        tl.store(tokens + row, _draw_plain(probs, vocab, draw * tl.sum(mass, 0), BLOCK))
        return

    # At least so many tokens, and with them all that are as probable, are candidates.
    bin_index = tl.arange(0, BINS)
    above = vocab - tl.cumsum(bins, 0) + bins
    wanted = tl.where(top_k < vocab, tl.maximum(top_k, CANDIDATES), CANDIDATES)
    wanted = tl.minimum(wanted, vocab)
    threshold = tl.max(tl.where(above >= wanted, bin_index, 0), 0) << BIN_SHIFT
    most = tl.load(probs + best_token)
    least = most * min_p
    # 1 keeps everything, even where rounding carries a sum of probabilities past 1.
    top_p = tl.where(top_p < 1.0, top_p, float("inf"))
    n, kept_mass = _collect(probs, vocab, threshold, candidates, candidate_tokens, BLOCK)
    below = (threshold - 1).to(tl.float32, bitcast=True)
    reaches_further = (n < top_k) & (kept_mass <= top_p) & (below >= least)
    if (threshold > 0) & reaches_further:
        n, kept_mass = _collect(probs, vocab, 1, candidates, candidate_tokens, BLOCK)
    token = _draw_filtered(candidates, candidate_tokens, n, top_k, top_p, least, most, draw, BLOCK)
    tl.store(tokens + row, token)


@triton.jit
def _draw_plain(
    probs: tl.tensor, vocab: tl.tensor, point: tl.tensor, BLOCK: tl.constexpr
) -> tl.tensor:
    """Returns the first token at which the cumulative distribution exceeds ``point``; where
    rounding lets no token do so, the last one that can be drawn."""
    i = tl.arange(0, BLOCK)
    running = point * 0.0
    first = vocab
    last = vocab * 0
    for start in range(0, vocab, BLOCK):
        p = tl.load(probs + start + i, start + i < vocab, other=0.0)
        wide = p.to(tl.float64)
        beyond = (running + tl.cumsum(wide, 0) > point) & (p > 0.0)
        first = tl.minimum(first, tl.min(tl.where(beyond, start + i, vocab), 0))
        last = tl.maximum(last, tl.max(tl.where(p > 0.0, start + i, 0), 0))
        running += tl.sum(wide, 0)
    return tl.where(first < vocab, first, last)


@triton.jit
def _collect(
    probs: tl.tensor,
    vocab: tl.tensor,
    threshold: tl.tensor,
    candidates: tl.tensor,
    candidate_tokens: tl.tensor,
    BLOCK: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Collects the tokens whose probability's bits reach ``threshold``; returns their number and
    the sum of their probabilities."""
    i = tl.arange(0, BLOCK)
    n = vocab * 0
    mass = tl.zeros([BLOCK], tl.float64)
    for start in range(0, vocab, BLOCK):
        p = tl.load(probs + start + i, start + i < vocab, other=0.0)
        taken = (p.to(tl.int32, bitcast=True) >= threshold) & (start + i < vocab)
        at = n + tl.cumsum(taken.to(tl.int32), 0) - 1
        tl.store(candidates + at, p, taken)
        tl.store(candidate_tokens + at, start + i, taken)
        n += tl.sum(taken.to(tl.int32), 0)
        mass += tl.where(taken, p, 0.0).to(tl.float64)
    tl.debug_barrier()
    return n, tl.sum(mass, 0)


@triton.jit
def _above(
    candidates: tl.tensor, n: tl.tensor, bits: tl.tensor, BLOCK: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Returns number and sum (float64) of the candidates above the probability with these bits, and
    how many equal it."""
    i = tl.arange(0, BLOCK)
    counts = tl.zeros([BLOCK], tl.int32)
    equals = tl.zeros([BLOCK], tl.int32)
    mass = tl.zeros([BLOCK], tl.float64)
    for start in range(0, n, BLOCK):
        p = tl.load(candidates + start + i, start + i < n, other=0.0)
        own = p.to(tl.int32, bitcast=True)
        counts += (own > bits).to(tl.int32)
        equals += ((own == bits) & (start + i < n)).to(tl.int32)
        mass += tl.where(own > bits, p, 0.0).to(tl.float64)
    return tl.sum(counts, 0), tl.sum(mass, 0), tl.sum(equals, 0)


@triton.jit
def _draw_filtered(
    candidates: tl.tensor,
    candidate_tokens: tl.tensor,
    n: tl.tensor,
    top_k: tl.tensor,
    top_p: tl.tensor,
    least: tl.tensor,
    most: tl.tensor,
    draw: tl.tensor,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    # The lowest bits whose first token is kept: fewer than top_k tokens and no more than top_p
    # lie above it, and it reaches `least`.
    high = most.to(tl.int32, bitcast=True)
    low = tl.maximum(least.to(tl.int32, bitcast=True), 0) - 1
    while high - low > 1:
        middle = low + (high - low) // 2
        number, mass, _ = _above(candidates, n, middle, BLOCK)
        is_kept = (number < top_k) & (mass <= top_p)
        high = tl.where(is_kept, middle, high)
        low = tl.where(is_kept, low, middle)
    i = tl.arange(0, BLOCK)
    lowest = most.to(tl.int32, bitcast=True)
    for start in range(0, n, BLOCK):
        p = tl.load(candidates + start + i, start + i < n, other=0.0)
        own = p.to(tl.int32, bitcast=True)
        lowest = tl.minimum(lowest, tl.min(tl.where(own >= high, own, lowest), 0))
    # Of the tokens as probable as the last one kept, the filters may keep some.
    number, mass, equals = _above(candidates, n, lowest, BLOCK)
    value = lowest.to(tl.float32, bitcast=True).to(tl.float64)
    # The bound: infinite where top_p is no filter, and large where the probability is tiny.
    fitting = tl.minimum((top_p - mass) / value, 1.0e9).to(tl.int32) + 1
    equals = tl.minimum(tl.minimum(equals, top_k - number), fitting)
    point = draw * (mass + equals.to(tl.float64) * value)

    # The highest bits at which the sum of the kept tokens exceeds the point.
    high = most.to(tl.int32, bitcast=True)
    low = lowest - 1
    while high - low > 1:
        middle = low + (high - low) // 2
        _, mass_above, _ = _above(candidates, n, middle, BLOCK)
        high = tl.where(mass_above <= point, middle, high)
        low = tl.where(mass_above <= point, low, middle)
    _, mass, all_equals = _above(candidates, n, high, BLOCK)
    equals = tl.where(high == lowest, equals, all_equals)
    value = high.to(tl.float32, bitcast=True).to(tl.float64)
    rank = tl.minimum((point - mass) / value, (equals - 1).to(tl.float64)).to(tl.int32)
    rank = tl.maximum(rank, 0)
    seen = n * 0
    token = n * 0
    for start in range(0, n, BLOCK):
        p = tl.load(candidates + start + i, start + i < n, other=0.0)
        match = (p.to(tl.int32, bitcast=True) == high) & (start + i < n)
        ranks = seen + tl.cumsum(match.to(tl.int32), 0) - 1
        own = tl.load(candidate_tokens + start + i, match, other=0)
        token += tl.sum(tl.where(match & (ranks == rank), own, 0), 0)
        seen += tl.sum(match.to(tl.int32), 0)
    return token
