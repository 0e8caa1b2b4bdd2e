"""SGLang's messages in the scheduler's words and back, without processes."""

from __future__ import annotations

import dataclasses
import inspect
from array import array
from itertools import islice
from typing import Any

import pytest
from crosspool.frontend import private
from crosspool.frontend.control_requests import FORWARDED, REPLIES, WITHOUT_REPLY
from crosspool.frontend.messages import (
    OpenRequest,
    finish_reason,
    seeds,
    to_request,
    to_token_id_output,
)
from crosspool.scheduler.request import Finish, Grammar, Output
from crosspool.transport.messages import TokenLogprobs
from sglang.srt.managers import io_struct as io
from sglang.srt.managers.tokenizer_control_mixin import _COMMUNICATOR_SPECS
from sglang.srt.sampling.sampling_params import SamplingParams


def message(params: dict[str, Any] | None = None, **fields: Any) -> io.TokenizedGenerateReqInput:
    """A message as it arrives: encoded and decoded by SGLang's own codec."""
    sampling = SamplingParams(**(params or {}))
    sampling.normalize(object())
    defaults: dict[str, Any] = {
        "rid": "r", "input_text": "", "input_ids": array("q", range(10, 20)),
        "input_embeds": None, "mm_inputs": None, "token_type_ids": None,
        "return_logprob": False, "logprob_start_len": -1, "top_logprobs_num": 0,
        "token_ids_logprob": None, "stream": False,
    }  # fmt: skip
    made = io.TokenizedGenerateReqInput(**{**defaults, **fields}, sampling_params=sampling)
    return private.decode(io.msgpack_encode(made))


def test_sampling() -> None:
    params = {
        "temperature": 0.7, "top_p": 0.9, "top_k": 40, "min_p": 0.1, "frequency_penalty": 0.2,
        "presence_penalty": 0.3, "repetition_penalty": 1.1, "logit_bias": {"5": 2.0},
        "sampling_seed": 77, "max_new_tokens": 9, "min_new_tokens": 2, "stop_token_ids": [3],
    }  # fmt: skip
    request = to_request(message(params), 1, seed=5)
    s = request.sampling
    assert (s.temperature, s.top_p, s.top_k, s.min_p) == (0.7, 0.9, 40, 0.1)
    assert (s.frequency_penalty, s.presence_penalty, s.repetition_penalty) == (0.2, 0.3, 1.1)
    assert (s.logit_bias, s.seed, s.min_new_tokens) == ({5: 2.0}, 77, 2)
    assert (request.stop.max_new_tokens, request.stop.stop_token_ids) == (9, frozenset({3}))
    assert (request.rid, request.model, request.input_ids) == ("r", 1, list(range(10, 20)))


def test_greedy_all_tokens_and_drawn_seed() -> None:
    greedy = to_request(message({"temperature": 0}), 0, seed=5).sampling
    assert (greedy.temperature, greedy.seed) == (0.0, 5)
    assert to_request(message({"temperature": 1}), 0, seed=5).sampling.top_k == -1


def test_seeds() -> None:
    assert list(islice(seeds(3), 4)) == list(islice(seeds(3), 4))
    assert len(set(islice(seeds(None), 100))) == 100
    assert all(0 <= seed < 2**63 for seed in islice(seeds(2**40), 100))


@pytest.mark.parametrize("kind", ["regex", "json_schema", "ebnf", "structural_tag"])
def test_grammar(kind: Any) -> None:
    assert to_request(message({kind: "x"}), 0, 0).grammar == Grammar(kind=kind, source="x")


def test_thinking() -> None:
    assert to_request(message(require_reasoning=True), 0, 0).thinks_first
    assert not to_request(message(), 0, 0).thinks_first


def test_logprobs() -> None:
    def wanted(**fields: Any) -> Any:
        return to_request(message(return_logprob=True, **fields), 0, 0).logprobs

    assert wanted().prompt_start == -1 and wanted().output
    assert wanted(logprob_start_len=0).prompt_start == 0
    assert wanted(logprob_start_len=10).prompt_start == -1
    assert wanted(top_logprobs_num=3, token_ids_logprob=[1]).token_ids == (1,)


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"lora_id": "x"}, "LoRA"),
        ({"return_hidden_states": True}, "hidden"),
        ({"custom_logit_processor": "x"}, "custom_logit_processor"),
        ({"params": {"beam_width": 2}}, "beam"),
    ],
)
def test_unsupported(fields: dict[str, Any], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        to_request(message(**fields), 0, 0)


def output(tokens: list[int], finish: Finish | None = None, first: bool = False) -> Output:
    return Output(
        rid="r", model=0, first=first, token_ids=tokens, finish=finish, prompt_tokens=10,
        completion_tokens=len(tokens), cached_tokens=0,
        output_logprobs=[
            TokenLogprobs(token=t, logprob=-1.0, top=[(-1.0, t)], token_ids=[]) for t in tokens
        ],
        prompt_logprobs=[],
    )  # fmt: skip


END = Finish(kind="length")


def test_a_position_without_a_token_is_not_in_the_list_of_tokens() -> None:
    position = TokenLogprobs(token=-1, logprob=None, top=[(-0.5, 7)], token_ids=[(-1.5, 4)])
    asked = OpenRequest.of(message(return_logprob=True), 1)
    nothing = dataclasses.replace(output([], END, first=True), output_logprobs=[position])
    batch = to_token_id_output([(asked, nothing)])
    assert (batch.output_token_logprobs_val, batch.output_token_logprobs_idx) == ([[]], [[]])
    assert batch.output_top_logprobs_idx == [[[7]]]
    assert batch.output_token_ids_logprobs_val == [[[-1.5]]]


def test_output_that_is_not_streamed_is_held_back() -> None:
    request = OpenRequest.of(message(), 1)
    assert request.take(output([1], first=True)) is None
    assert request.take(output([2])) is None
    sent = request.take(output([3], END))
    assert sent is not None and sent.token_ids == [1, 2, 3] and sent.first
    assert [p.token for p in sent.output_logprobs] == [1, 2, 3]


def test_stream_interval() -> None:
    request = OpenRequest.of(message(stream=True), 3)
    pieces = [request.take(output([i], first=i == 0)) for i in range(8)]
    assert [p.token_ids for p in pieces if p] == [[0], [1, 2, 3], [4, 5, 6]]
    last = request.take(output([], END))
    assert last is not None and last.token_ids == [7]


def test_token_id_output_is_what_sglang_decodes() -> None:
    with_logprobs = OpenRequest.of(message(return_logprob=True, rid="a", stream=True), 1)
    without = OpenRequest.of(message(rid="b", stream=True), 1)
    made = to_token_id_output(
        [(with_logprobs, output([1, 2], first=True)), (without, output([3], END))]
    )
    got = private.decode(io.msgpack_encode(made))
    assert got.rids == ["a", "b"]
    assert [list(ids) for ids in got.decode_ids] == [[15, 16, 17, 18, 19, 1, 2], [3]]
    assert got.read_offsets == [5, 5]
    assert [list(ids) for ids in got.output_ids] == [[1, 2], [3]]
    assert got.finished_reasons == [None, {"type": "length", "length": 1}]
    assert got.output_token_logprobs_idx == [[1, 2], []]
    lists = [v for k, v in inspect.getmembers(got) if k in got.__struct_fields__ and v is not None]
    assert all(len(v) == 2 for v in lists)


def test_aborts_that_are_errors_carry_a_status() -> None:
    error = finish_reason(Finish(kind="abort", message="m", status=429), 0)
    assert error is not None and error["status_code"] == 429
    own = finish_reason(Finish(kind="abort", message="m", status=499), 0)
    assert own == {"type": "abort", "message": "m"}


def test_every_reply_that_sglang_waits_for_is_given() -> None:
    given = {type(make(_dummy(kind))) for kind, make in REPLIES.items()}
    handled_by_the_loop = {io.GetInternalStateReqOutput, io.FlushCacheReqOutput}
    assert {spec[1] for spec in _COMMUNICATOR_SPECS} <= given | handled_by_the_loop
    assert {io.UpdateWeightFromDiskReqOutput, io.OpenSessionReqOutput} <= given
    assert not set(REPLIES) & {*FORWARDED, *WITHOUT_REPLY}


def _dummy(kind: type) -> Any:
    class Request:
        session_id = "s"

    return Request()
