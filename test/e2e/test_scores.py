"""``/v1/score`` and other requests that generate nothing, against transformers."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from support.prompts import sentences
from support.server import DEMO, TINY_MODELS, Server
from transformers import AutoModelForCausalLM, AutoTokenizer

LABELS = [5, 65, 300, 7]


@functools.cache
def reference(model: str) -> tuple[Any, Any]:
    return (
        AutoModelForCausalLM.from_pretrained(DEMO / model, dtype=torch.float32).eval(),
        AutoTokenizer.from_pretrained(DEMO / model),
    )


def next_logprobs(model: str, ids: list[int]) -> torch.Tensor:
    """transformers' log-probabilities of the token behind ``ids``, float32 [vocab]."""
    with torch.inference_mode():
        return torch.log_softmax(reference(model)[0](torch.tensor([ids])).logits[0, -1], dim=-1)


def score(server: Server, model: str, **body: Any) -> dict[str, Any]:
    status, answer = server.post("/v1/score", {"model": model, **body})
    assert status == 200, answer
    assert isinstance(answer, dict)
    return answer


@pytest.mark.parametrize("model", TINY_MODELS)
@pytest.mark.parametrize("apply_softmax", [False, True])
def test_scores_are_probabilities_of_the_labels(
    server: Server, model: str, apply_softmax: bool
) -> None:
    tokenizer = reference(model)[1]
    query, *items = sentences(4)
    answer = score(
        server,
        model,
        query=query,
        items=items,
        label_token_ids=LABELS,
        apply_softmax=apply_softmax,
    )
    prompts = [tokenizer.encode(query + item) for item in items]
    for prompt, got in zip(prompts, answer["scores"], strict=True):
        logprobs = next_logprobs(model, prompt)[LABELS]
        want = torch.softmax(logprobs, dim=-1) if apply_softmax else logprobs.exp()
        assert got == pytest.approx(want.tolist(), rel=1e-3, abs=1e-7)
    assert answer["usage"]["prompt_tokens"] == sum(map(len, prompts))
    assert answer["usage"]["completion_tokens"] == 0


@pytest.mark.parametrize("model", TINY_MODELS)
def test_scores_of_token_ids_with_labels_of_their_own(server: Server, model: str) -> None:
    tokenizer = reference(model)[1]
    query, *items = (tokenizer.encode(text) for text in sentences(3))
    labels = [[5, 6], [7, 300]]
    answer = score(
        server,
        model,
        query=query,
        items=items,
        label_token_ids=labels,
        apply_softmax=True,
        temperature=2.0,
        item_first=True,
        return_token_logprobs=True,
    )
    for item, of_item, got, raw in zip(
        items, labels, answer["scores"], answer["token_logprobs"], strict=True
    ):
        logprobs = next_logprobs(model, item + query)[of_item]
        assert raw == pytest.approx(logprobs.tolist(), abs=1e-3)
        assert got == pytest.approx(torch.softmax(logprobs / 2, dim=-1).tolist(), abs=1e-4)


def test_a_label_that_is_no_token_is_the_clients_mistake(server: Server) -> None:
    for labels in ([10**6], [-1], [], [5, 5], None):
        body = {"query": "a", "items": ["b"], "label_token_ids": labels}
        status, answer = server.post("/v1/score", {"model": TINY_MODELS[0], **body})
        assert status == 400, (labels, answer)


@pytest.mark.parametrize("model", TINY_MODELS)
def test_what_could_come_next_without_generating(server: Server, model: str) -> None:
    (prompt,) = (reference(model)[1].encode(text) for text in sentences(1))
    status, answer = server.post(
        f"/m/{model}/generate",
        {
            "input_ids": prompt,
            "sampling_params": {"max_new_tokens": 0},
            "return_logprob": True,
            "top_logprobs_num": 3,
            "token_ids_logprob": LABELS,
        },
    )
    assert status == 200
    meta = answer["meta_info"]
    assert (answer["output_ids"], meta["completion_tokens"]) == ([], 0)
    assert meta["output_token_logprobs"] == []
    (best,), (labels,) = meta["output_top_logprobs"], meta["output_token_ids_logprobs"]
    want = next_logprobs(model, prompt)
    assert [token for _, token, _ in best] == want.topk(3).indices.tolist()
    assert [value for value, _, _ in labels] == pytest.approx(want[LABELS].tolist(), abs=1e-3)
