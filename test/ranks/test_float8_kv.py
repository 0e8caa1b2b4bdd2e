"""Models with a KV cache in floats of 8 bits against transformers' with a cache that is rounded in
the same way, under both loops."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
import torch
from crosspool.models.spec import KVCacheDType
from crosspool.transport.messages import Logprobs
from make_random_checkpoint import make_random_checkpoint
from support.families import SHAPES, reference_model
from support.machine import Machine, Stream
from support.parts import Parts
from support.rounded_cache import FLOAT8, logits_of
from support.server import DEMO
from transformers import AutoTokenizer, PreTrainedModel

VOCAB = 160
PROMPT, DECODE_STEPS = 45, 32
TOPICS = {
    "tiny-qwen3-moe": ("await", "if", "lambda"),
    "tiny-deepseek-v2": ("MPL-2.0", "GPL-3", "Artistic"),
    "tiny-glm4-moe-lite": ("json.dumps", "textwrap.fill", "heapq.heappush"),
}
"""What the bundled models know by heart."""
NAMES = ("qwen3-yarn-window", "olmoe", "v2-groups-q-lora", "v3-no-q-lora", "glm")


@pytest.fixture(scope="module", params=NAMES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    family, shape = SHAPES[request.param]
    folder = tmp_path_factory.mktemp("float8") / request.param
    return make_random_checkpoint(family, folder, {"vocab_size": VOCAB} | shape, "float32", seed=3)


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> PreTrainedModel:
    return reference_model(checkpoint, torch.float32)


def _tokens() -> list[int]:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(VOCAB, (PROMPT + DECODE_STEPS,), generator=generator).tolist()


def _check(found: torch.Tensor, expected: torch.Tensor, plain: torch.Tensor) -> None:
    """``plain``: what transformers computes without rounding. Most logits are equal to 1e-5, but
    where sums in another order move an element of the cache over a rounding border, those behind
    it differ by a little."""
    from_plain = (plain - expected).abs().mean()
    assert from_plain > 0.03
    assert (found - expected).abs().mean() < 0.03 * from_plain


@pytest.mark.parametrize("kv_cache_dtype", FLOAT8)
@torch.inference_mode()
def test_logits_of_the_host_loops_parts(
    checkpoint: Path, reference: PreTrainedModel, kv_cache_dtype: KVCacheDType
) -> None:
    parts, tokens = Parts(checkpoint, kv_cache_dtype=kv_cache_dtype), _tokens()
    found = [parts.step({0: tokens[at : at + 15]})[0] for at in range(0, PROMPT, 15)]
    found += [parts.step({0: [token]})[0] for token in tokens[PROMPT:]]
    _check(
        torch.cat(found),
        logits_of(reference, tokens, kv_cache_dtype),
        logits_of(reference, tokens, "auto"),
    )


@pytest.mark.parametrize("loop", ["host", "resident"])
@pytest.mark.parametrize("kv_cache_dtype", FLOAT8)
@torch.inference_mode()
def test_log_probabilities_of_a_server(
    checkpoint: Path,
    reference: PreTrainedModel,
    kv_cache_dtype: KVCacheDType,
    loop: Literal["host", "resident"],
) -> None:
    """A prompt in chunks and then decode steps, beside another request."""
    asked = Logprobs(output=True, prompt_start=0, token_ids=tuple(range(VOCAB)))
    stream = Stream(0, _tokens()[:PROMPT], DECODE_STEPS, logprobs=asked, chunk=13)
    other = Stream(0, [1, 2, 3], DECODE_STEPS)
    with Machine([checkpoint], loop=loop, kv_cache_dtype=kv_cache_dtype) as machine:
        machine.generate([stream, other])
    told = [p for r in stream.results for p in r.prompt if p.logprob is not None]
    told += [r.output for r in stream.results if r.output is not None]
    found = torch.tensor([[value for value, _ in p.token_ids] for p in told])
    tokens = stream.prompt + stream.output
    expected, plain = (
        logits_of(reference, tokens, dtype).log_softmax(dim=1)[:-1]
        for dtype in (kv_cache_dtype, "auto")
    )
    assert len(found) == len(expected) == PROMPT + DECODE_STEPS - 1
    _check(found, expected, plain)


@pytest.mark.parametrize("name", TOPICS)
@torch.inference_mode()
def test_trained_models_choose_nearly_the_same_tokens(name: str) -> None:
    """Along what a bundled model answers with a bfloat16 cache; docs/serving.md has the numbers."""
    path = DEMO / name
    tokenizer = AutoTokenizer.from_pretrained(path)
    differences: dict[KVCacheDType, list[torch.Tensor]] = {"fp8_e4m3": [], "fp8_e5m2": []}
    chosen, same = 0, dict.fromkeys(differences, 0)
    for topic in TOPICS[name]:
        asked = [{"role": "user", "content": f"Tell me about {topic}"}]
        text = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
        tokens = tokenizer(text, add_special_tokens=False).input_ids
        parts = Parts(path, dtype="bfloat16")
        exact = [parts.step({0: tokens})[0][-1]]
        while (
            len(exact) < 60 and (token := int(exact[-1].argmax())) not in parts.spec.eos_token_ids
        ):
            tokens.append(token)
            exact.append(parts.step({0: [token]})[0][-1])
        answer = torch.stack(exact)
        chosen += len(answer)
        for kv_cache_dtype, of in differences.items():
            parts = Parts(path, dtype="bfloat16", kv_cache_dtype=kv_cache_dtype)
            found = parts.step({0: tokens})[0][-len(answer) :]
            of.append((found - answer).abs().flatten())
            same[kv_cache_dtype] += int((found.argmax(dim=1) == answer.argmax(dim=1)).sum())
    e4m3, e5m2 = (float(torch.cat(of).mean()) for of in differences.values())
    assert 0 < e4m3 < e5m2 < 0.35
    assert e4m3 < 0.22
    assert chosen > 60 and min(same.values()) > 0.97 * chosen
