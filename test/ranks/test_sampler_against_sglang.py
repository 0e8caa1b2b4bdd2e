"""Penalties against SGLang's own penalizers."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from crosspool.frontend import compat
from crosspool.ranks.sampler import SamplingRow, adjusted
from crosspool.transport.messages import Sampling

VOCAB = 211
EOS = (3, 8)
SAMPLINGS = [
    Sampling(frequency_penalty=0.8),
    Sampling(presence_penalty=-1.5),
    Sampling(repetition_penalty=1.7),
    Sampling(repetition_penalty=0.6, frequency_penalty=-0.3, presence_penalty=0.9),
    Sampling(min_new_tokens=20, stop_token_ids=(5, 9)),
    Sampling(min_new_tokens=12, stop_token_ids=(5,), repetition_penalty=1.2),
    Sampling(),
]


class Batch(SimpleNamespace):
    """The part of SGLang's ScheduleBatch that its penalizers look at; they hold it weakly."""

    __slots__ = ("__weakref__",)


def test_penalties_equal_sglangs() -> None:
    compat.install()
    penaltylib = pytest.importorskip("sglang.srt.sampling.penaltylib")
    outputs = np.random.default_rng(1).integers(0, 30, (len(SAMPLINGS), 12))
    tokenizer = SimpleNamespace(additional_stop_token_ids=None, eos_token_id=EOS[0])
    batch = Batch(
        device="cpu",
        reqs=[
            SimpleNamespace(
                sampling_params=SimpleNamespace(
                    frequency_penalty=s.frequency_penalty,
                    presence_penalty=s.presence_penalty,
                    repetition_penalty=s.repetition_penalty,
                    min_new_tokens=s.min_new_tokens,
                    stop_token_ids=set(s.stop_token_ids),
                ),
                eos_token_ids=set(EOS),
                tokenizer=tokenizer,
            )
            for s in SAMPLINGS
        ],
    )
    orchestrator = penaltylib.BatchedPenalizerOrchestrator(
        VOCAB,
        batch,
        {
            penaltylib.BatchedFrequencyPenalizer,
            penaltylib.BatchedMinNewTokensPenalizer,
            penaltylib.BatchedPresencePenalizer,
            penaltylib.BatchedRepetitionPenalizer,
        },
    )
    logits = torch.randn(len(SAMPLINGS), VOCAB, generator=torch.Generator().manual_seed(2)) * 3
    for length in range(outputs.shape[1] + 1):
        rows = [
            SamplingRow(s, output[:length].tolist(), 100 + length)
            for s, output in zip(SAMPLINGS, outputs, strict=True)
        ]
        # SGLang's default scheduler adds the additive penalties up, then scales.
        additive = torch.zeros_like(logits)
        orchestrator.accumulate_additive_penalties(additive)
        expected = logits + additive
        scaling = orchestrator.accumulate_scaling_penalties()
        expected = torch.where(expected < 0, expected * scaling, expected / scaling)
        torch.testing.assert_close(adjusted(logits, rows, EOS), expected, atol=1e-5, rtol=1e-5)
        if length < outputs.shape[1]:
            orchestrator.cumulate_output_tokens(torch.from_numpy(outputs[:, length].copy()))
