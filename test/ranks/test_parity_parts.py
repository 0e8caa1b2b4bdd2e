"""The parts against transformers' models: same logits, for every family and shape."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import pytest
import torch
from make_random_checkpoint import make_random_checkpoint
from support.families import DEEPSEEK_YARN, SHAPES, reference_model
from support.parts import Parts
from transformers import PreTrainedModel

DEMO = Path(__file__).parents[2] / "python" / "crosspool" / "demo"
DECODE_STEPS = 32


@pytest.fixture(scope="module", params=SHAPES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    family, overrides = SHAPES[request.param]
    out = tmp_path_factory.mktemp("checkpoint") / request.param
    overrides = {"vocab_size": 160} | overrides
    return make_random_checkpoint(family, out, overrides, "float32", seed=3, max_shard_size="200KB")


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> PreTrainedModel:
    return reference_model(checkpoint, torch.float32)


def _sequences(lengths: list[int], vocab: int) -> list[list[int]]:
    """Random tokens: a prompt of each length, and what is fed during decode."""
    generator = torch.Generator().manual_seed(5)
    return [
        torch.randint(vocab, (length + DECODE_STEPS,), generator=generator).tolist()
        for length in lengths
    ]


def _logits(parts: Parts, sequences: list[list[int]], lengths: list[int]) -> list[torch.Tensor]:
    """Prompts come in chunks of 7, one request after another, and then decode, all in one batch.
    Requests whose prompt is done decode beside those that still read."""
    done = [0] * len(sequences)
    logits: list[list[torch.Tensor]] = [[] for _ in sequences]
    step = 0
    while any(position < len(sequences[i]) for i, position in enumerate(done)):
        rows = {}
        for i in range(min(step + 1, len(sequences))):
            size = min(7, lengths[i] - done[i]) if done[i] < lengths[i] else 1
            if chunk := sequences[i][done[i] : done[i] + size]:
                rows[i] = chunk
        for i, result in parts.step(rows).items():
            done[i] += len(rows[i])
            logits[i].append(result)
        step += 1
    return [torch.cat(of_request) for of_request in logits]


@pytest.mark.parametrize(("ranks", "parallel"), [(1, "tp"), (2, "tp"), (2, "ep")])
@torch.inference_mode()
def test_logits_equal_transformers(
    checkpoint: Path,
    reference: PreTrainedModel,
    ranks: int,
    parallel: Literal["tp", "ep"],
) -> None:
    lengths = [19, 1, 8]
    parts = Parts(checkpoint, ranks, parallel)
    sequences = _sequences(lengths, parts.spec.vocab)
    for sequence, found in zip(sequences, _logits(parts, sequences, lengths), strict=True):
        expected = reference(torch.tensor([sequence])).logits[0]
        assert expected.std() > 0.3  # else the tolerance would say nothing
        assert (expected[1:] - expected[:-1]).abs().amax(dim=1).min() > 0.1
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)


@torch.inference_mode()
def test_config_as_published_before_transformers_5(tmp_path: Path) -> None:
    """``rope_theta`` and ``rope_scaling`` with ``type``, ``torch_dtype``, ``auto_map``."""
    overrides = {"vocab_size": 160, "rope_parameters": DEEPSEEK_YARN}
    path = make_random_checkpoint("deepseek_v3", tmp_path / "v3", overrides, "float32")
    file = path / "config.json"
    fields = json.loads(file.read_text())
    scaling = fields.pop("rope_parameters")
    fields["rope_theta"] = scaling.pop("rope_theta")
    fields["rope_scaling"] = {"type": scaling.pop("rope_type")} | scaling
    fields["torch_dtype"] = fields.pop("dtype")
    fields["auto_map"] = {"AutoConfig": "configuration_deepseek.DeepseekV3Config"}
    file.write_text(json.dumps(fields))
    parts = Parts(path)
    sequences = _sequences([19], 160)
    expected = reference_model(path, torch.float32)(torch.tensor(sequences)).logits[0]
    assert expected.std() > 0.3
    found = _logits(parts, sequences, [19])[0]
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)


@torch.inference_mode()
def test_bfloat16_stays_close_to_transformers(checkpoint: Path, reference: PreTrainedModel) -> None:
    """Both round differently in bfloat16: on average, ours may be no further from the float32
    model than twice the distance of transformers' own bfloat16 run."""
    lengths = [19]
    parts = Parts(checkpoint, dtype="bfloat16")
    sequences = _sequences(lengths, parts.spec.vocab)
    tokens = torch.tensor(sequences)
    exact = reference(tokens).logits[0]
    rounded = reference_model(checkpoint, torch.bfloat16)(tokens).logits[0].float()
    found = _logits(parts, sequences, lengths)[0]
    theirs, ours = (rounded - exact).abs().mean(), (found - exact).abs().mean()
    assert 0 < ours < 2 * theirs


@pytest.mark.parametrize("name", ["tiny-qwen3-moe", "tiny-deepseek-v2", "tiny-glm4-moe-lite"])
@torch.inference_mode()
def test_bundled_model_writes_what_transformers_writes(name: str) -> None:
    path = DEMO / name
    if not (path / "config.json").exists():
        pytest.skip(f"{name} is not there")
    reference = reference_model(path, torch.float32)
    prompt = list(range(40, 61))
    expected = reference.generate(
        torch.tensor([prompt]), do_sample=False, min_new_tokens=64, max_new_tokens=64
    )[0, len(prompt) :].tolist()
    parts = Parts(path, dtype="float32")
    barred = list(parts.spec.eos_token_ids)
    found: list[int] = []
    logits = parts.step({0: prompt})[0][-1]
    while len(found) < 64:
        logits[barred] = -torch.inf
        found.append(int(logits.argmax()))
        logits = parts.step({0: found[-1:]})[0][-1]
    assert found == expected
