"""Picks next tokens and reports log-probabilities, one vectorised pass per batch.

Semantics are SGLang's (``srt/sampling`` and ``srt/layers/sampler`` of 0.5.21): penalties,
grammar and bias act on the logits in that order; then temperature, softmax, and top-k, top-p and
min-p, each a cut through the same descending distribution. The draw is the project's own: one
uniform number per row, a pure function of (seed, position), through the inverse of the cumulative
distribution. A row's token therefore depends on that row alone, whatever batch, lane or rank it
is in.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from crosspool.kernels.advance import advance
from crosspool.transport.messages import Sampling, TokenLogprobs

_BEST = 1024
"""Number of candidates that are sorted first. A row is sorted whole only if its filters reach
further."""
_SORTED_ROWS = 8
"""Number of rows that are sorted whole at a time, which takes a thread 0.2 s for 150,000 tokens."""


@dataclass(frozen=True)
class SamplingRow:
    """What the sampler needs for one row beside its logits."""

    sampling: Sampling
    output: Sequence[int]
    """The request's output tokens so far."""
    position: int
    """Position in the sequence of the token to pick."""
    bitmask: bytes | None = None
    """Allowed tokens, one bit each in little-endian int32 words; None: all."""


def sample(logits: Tensor, rows: Sequence[SamplingRow], eos_token_ids: Sequence[int]) -> Tensor:
    """Picks one token per row.

    ``logits``: float32 [N, vocab]; left as it is. Returns int64 [N]. ``eos_token_ids`` are barred
    beside a row's own stop ids while it has fewer than ``min_new_tokens`` output tokens.
    """
    logits = adjusted(logits, rows, eos_token_ids)
    tokens = logits.argmax(dim=-1)
    drawn = [i for i, row in enumerate(rows) if not is_greedy(row.sampling)]
    if drawn:
        samplings = [rows[i].sampling for i in drawn]
        temperatures = torch.tensor([s.temperature for s in samplings], dtype=torch.float32)
        probs = torch.softmax(logits[drawn] / temperatures[:, None], dim=-1)
        draws = torch.tensor(
            [uniform(rows[i].sampling.seed, rows[i].position) for i in drawn], dtype=torch.float64
        )
        tokens[drawn] = _draw(probs, samplings, draws)
    return tokens


def is_greedy(sampling: Sampling) -> bool:
    """Whether the best token is taken without a draw."""
    return sampling.temperature == 0.0 or sampling.top_k == 1


def uniform(seed: int, position: int) -> float:
    """Returns the random number in [0, 1) that decides the token at ``position``."""
    key = np.array([seed & (2**64 - 1), position], dtype=np.uint64)
    return float(np.random.Generator(np.random.Philox(key=key)).random())


def adjusted(logits: Tensor, rows: Sequence[SamplingRow], eos_token_ids: Sequence[int]) -> Tensor:
    """Returns the logits after penalties, grammar and bias; a copy where anything applies."""
    changed = [i for i, row in enumerate(rows) if adjusts(row)]
    if not changed:
        return logits
    logits = logits.clone()
    vocab = logits.shape[1]
    for i in changed:
        row, line = rows[i], logits[i]
        _penalise(line, row)
        if row.bitmask is not None:
            allowed = np.unpackbits(
                np.frombuffer(row.bitmask, dtype=np.uint8), bitorder="little", count=vocab
            )
            line.masked_fill_(torch.from_numpy(allowed == 0), -torch.inf)
        if len(row.output) < row.sampling.min_new_tokens:
            _bar(line, {*row.sampling.stop_token_ids, *eos_token_ids})
        if row.sampling.logit_bias:
            tokens = torch.tensor(list(row.sampling.logit_bias), dtype=torch.int64)
            line[tokens] += torch.tensor(
                list(row.sampling.logit_bias.values()), dtype=torch.float32
            )
    return logits


def adjusts(row: SamplingRow) -> bool:
    """Whether :func:`adjusted` changes the row's logits."""
    s = row.sampling
    return (
        row.bitmask is not None
        or bool(s.logit_bias)
        or len(row.output) < s.min_new_tokens
        or (len(row.output) > 0 and penalises(s))
    )


def penalises(sampling: Sampling) -> bool:
    """Whether tokens that were sampled change the logits of later ones."""
    return (
        sampling.frequency_penalty != 0.0
        or sampling.presence_penalty != 0.0
        or sampling.repetition_penalty != 1.0
    )


def _penalise(line: Tensor, row: SamplingRow) -> None:
    """Applies the penalties to one row's logits [vocab] in place, the additive ones first.

    All three count output tokens only, as SGLang's do."""
    if not row.output:
        return
    s = row.sampling
    tokens, counts = np.unique(np.asarray(row.output, dtype=np.int64), return_counts=True)
    seen = torch.from_numpy(tokens)
    penalised = line[seen]
    penalised -= s.frequency_penalty * torch.from_numpy(counts).to(torch.float32)
    penalised -= s.presence_penalty
    line[seen] = torch.where(
        penalised < 0, penalised * s.repetition_penalty, penalised / s.repetition_penalty
    )


def _bar(line: Tensor, tokens: set[int]) -> None:
    """Forbids ``tokens``, unless a grammar allows nothing else, which has precedence."""
    barred = line.index_fill(0, torch.tensor(sorted(tokens), dtype=torch.int64), -torch.inf)
    if barred.max() > -torch.inf:
        line.copy_(barred)


def _draw(probs: Tensor, samplings: Sequence[Sampling], draws: Tensor) -> Tensor:
    """Draws one token for each row of ``probs`` [N, vocab] by ``draws`` in [0, 1); int64 [N]."""
    vocab = probs.shape[1]
    top_k = torch.tensor([s.top_k if s.top_k > 0 else vocab for s in samplings])
    # 1 keeps everything, even where rounding carries a sum of probabilities past 1.
    top_p = torch.tensor(
        [s.top_p if s.top_p < 1.0 else math.inf for s in samplings], dtype=torch.float64
    )
    min_p = torch.tensor([s.min_p for s in samplings], dtype=torch.float32)
    filtered = (top_k < vocab) | (top_p < 1.0) | (min_p > 0.0)
    tokens = torch.empty(len(samplings), dtype=torch.int64)

    def draw_filtered(chosen: Tensor, best: Tensor, ids: Tensor) -> None:
        """Draws for rows whose highest probabilities, descending, and tokens are given."""
        wide = best.to(torch.float64)
        before = wide.cumsum(dim=-1) - wide
        rank = torch.arange(best.shape[1])
        drop = rank >= top_k[chosen, None]
        drop |= before > top_p[chosen, None]
        drop |= best < best[:, :1] * min_p[chosen, None]
        index = _inverse_cdf(wide.masked_fill(drop, 0.0), draws[chosen])
        tokens[chosen] = ids.gather(1, index[:, None])[:, 0]

    plain = torch.nonzero(~filtered)[:, 0]
    if len(plain):
        tokens[plain] = _inverse_cdf(probs[plain].to(torch.float64), draws[plain])
    some = torch.nonzero(filtered)[:, 0]
    if len(some):
        best, ids = _ordered(*probs[some].topk(min(_BEST, vocab), dim=-1))
        enough = (
            (top_k[some] <= best.shape[1])
            | (best.to(torch.float64).sum(dim=-1) > top_p[some])
            | (best[:, -1] < best[:, 0] * min_p[some])
        )
        if enough.any():
            draw_filtered(some[enough], best[enough], ids[enough])
        for chosen in some[~enough].split(_SORTED_ROWS):
            advance()
            whole, whole_ids = probs[chosen].sort(dim=-1, descending=True, stable=True)
            draw_filtered(chosen, whole, whole_ids)
    return tokens


def _ordered(best: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Sorts rows of probabilities in descending order, and equal ones by token: topk leaves those
    in any order, and bfloat16 logits have many."""
    ids, order = ids.sort(dim=-1)
    best, order = best.gather(1, order).sort(dim=-1, descending=True, stable=True)
    return best, ids.gather(1, order)


def _inverse_cdf(weights: Tensor, draws: Tensor) -> Tensor:
    """Returns the index of the weight at which each row's draw falls, int64 [N].

    ``weights``: float64 [N, M] of any scale. A weight of zero is never chosen. Where weights are
    NaN, as of a broken checkpoint, the last index is."""
    cdf = weights.cumsum(dim=-1)
    total = cdf[:, -1]
    point = torch.minimum(draws * total, torch.nextafter(total, torch.zeros_like(total)))
    index = torch.searchsorted(cdf, point[:, None], right=True)[:, 0]
    return index.clamp_(max=weights.shape[1] - 1)


def token_logprobs(
    logits: Tensor, tokens: Sequence[int], top: Sequence[int], token_ids: Sequence[Sequence[int]]
) -> list[TokenLogprobs]:
    """Returns log-probabilities under the model's own distribution, before any of the rules above.

    ``logits``: float32 [N, vocab]. For each row, ``tokens`` is the token whose value is wanted,
    ``top`` how many of the best tokens are named beside it, and ``token_ids`` are further tokens
    whose values are wanted.
    """
    logprobs = torch.log_softmax(logits, dim=-1)
    chosen = logprobs.gather(1, torch.tensor(tokens, dtype=torch.int64)[:, None])[:, 0].tolist()
    values, indices = logprobs.topk(min(max(top), logits.shape[1]), dim=-1)
    best_values, best_tokens = values.tolist(), indices.tolist()
    result = []
    for i, token in enumerate(tokens):
        asked = list(token_ids[i])
        result.append(
            TokenLogprobs(
                token=token,
                logprob=chosen[i],
                top=list(zip(best_values[i][: top[i]], best_tokens[i][: top[i]], strict=True)),
                token_ids=list(zip(logprobs[i, asked].tolist(), asked, strict=True))
                if asked
                else [],
            )
        )
    return result
