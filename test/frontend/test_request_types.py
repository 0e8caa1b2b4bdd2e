"""What the scheduler could not decode, or would compute for too long, is refused with its name."""

from __future__ import annotations

import json
import threading
import time
from typing import Any

import pytest
from crosspool.config.options import Options
from support.front_end import MODELS, FrontEndServer

GENERATE = f"/m/{MODELS[0]}/generate"
CHAT = "/v1/chat/completions"
BIG = 2**64
MOST_LOGPROBS = Options.__struct_defaults__[
    Options.__struct_fields__.index("max_logprobs") - len(Options.__struct_fields__)
]


def refused(server: FrontEndServer, path: str, body: Any, *words: str) -> None:
    """Each request gets its answer in time; those that were dropped waited for ever."""
    status, answer, _ = server.request(path, body, timeout=10)
    assert status == 400, (status, answer)
    message = json.dumps(answer)
    assert all(word in message for word in words), message
    assert "Traceback" not in message


@pytest.mark.parametrize(
    ("params", "field"),
    [
        ({"custom_params": {"a": {"b": {"c": 1}}}}, "custom_params"),
        ({"top_k": BIG}, "top_k"),
        ({"top_k": 2**63}, "top_k"),
        ({"sampling_seed": -BIG}, "sampling_seed"),
        ({"max_new_tokens": 5.0}, "max_new_tokens"),
        ({"max_new_tokens": "5"}, "max_new_tokens"),
        ({"min_new_tokens": []}, "min_new_tokens"),
        ({"temperature": "x"}, "temperature"),
        ({"top_p": {}}, "top_p"),
        ({"regex": 5}, "regex"),
        ({"json_schema": {"type": "object"}}, "json_schema"),
        ({"logit_bias": {"1": "x"}}, "logit_bias"),
        ({"stop_token_ids": ["x"]}, "stop_token_ids"),
        ({"ignore_eos": "yes"}, "ignore_eos"),
        ({"n": "2"}, "n"),
        ({"is_normalized": True}, "is_normalized"),
        ({"seed": 3}, "seed"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_types_of_sampling_parameters(
    server: FrontEndServer, params: dict[str, Any], field: str, stream: bool
) -> None:
    body = {"text": "x", "sampling_params": params, "stream": stream}
    refused(server, GENERATE, body, field)


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"bootstrap_room": []}, "bootstrap_room"),
        ({"top_logprobs_num": [1]}, "top_logprobs_num"),
        ({"text": ["a", "b"], "top_logprobs_num": [1]}, "top_logprobs_num"),
        ({"text": ["a", "b"], "sampling_params": [{}]}, "sampling_params"),
        ({"sampling_params": []}, "sampling_params"),
        ({"session_params": {"x": 1}}, "session_params"),
        ({"session_params": {"id": 5}}, "session_params"),
        ({"text": []}, "text"),
        ({"text": ""}, "text"),
        ({"text": ["a", ""]}, "text"),
        ({"text": None, "input_ids": []}, "input_ids"),
        ({"text": None, "input_ids": [[]]}, "input_ids"),
        ({"text": None, "input_ids": [[1], 2]}, "input_ids"),
        ({"text": None, "input_embeds": []}, "input_embeds"),
        ({"text": None}, "input_ids"),
        ({"text": ["a", "b"], "bootstrap_pair_key": ["a"]}, "bootstrap_pair_key"),
        ({"text": ["a"], "decode_tp_size": []}, "decode_tp_size"),
        ({"text": ["a"], "audio_data": []}, "audio_data"),
        ({"text": ["a", "b"], "video_data": []}, "video_data"),
        ({"text": ["a", "b"], "modalities": ["image"]}, "modalities"),
        ({"text": ["a", "b"], "lora_id": ["a"]}, "lora_id"),
        ({"lora_id": ["a"], "sampling_params": {"n": 2}}, "lora_id"),
        ({"text": ["a", "b"], "token_ids_logprob": [[1]]}, "token_ids_logprob"),
        ({"text": ["a"], "token_indices_to_pool": []}, "token_indices_to_pool"),
        ({"text": ["a"], "multi_item_delimiter_indices": []}, "multi_item_delimiter_indices"),
        ({"text": ["a"], "positional_embed_overrides": []}, "positional_embed_overrides"),
    ],
)
def test_fields_of_a_request(server: FrontEndServer, fields: dict[str, Any], word: str) -> None:
    refused(server, GENERATE, {"text": "a", **fields}, word)


def test_what_follows_a_refused_stream_finds_no_generation(server: FrontEndServer) -> None:
    body = {"text": "a", "stream": True, "sampling_params": {"temperature": "x"}}
    refused(server, GENERATE, body, "temperature")
    time.sleep(2.5)  # SGLang's task that aborts what has not ended comes after 2 s
    assert "has no attribute" not in server.log.read_text()


@pytest.mark.parametrize(
    ("path", "body", "word"),
    [
        (CHAT, {"messages": [{"role": "user", "content": "a"}], "top_k": BIG}, "top_k"),
        (CHAT, {"messages": [{"role": "user", "content": "a"}], "bootstrap_host": []}, "bootstrap"),
        ("/v1/completions", {"prompt": "a", "seed": -BIG}, "`seed`: Input should be an integer of"),
        ("/v1/completions", {"prompt": "a", "custom_params": {"a": {"b": [{}]}}}, "custom_params"),
        ("/encode", {"input_ids": []}, "/encode"),
        ("/classify", {"text": "a"}, "/classify"),
        ("/v1/detokenize", {"tokens": [[5, -2147483649]]}, "vocabulary"),
        ("/v1/detokenize", {"tokens": [["5" * 50, 5]]}, "must be an integer"),
        ("/v1/detokenize", {"tokens": ["5" * 50]}, "must be an integer"),
        ("/v1/tokenize", {"prompt": "a", "stream": "yes"}, "does not support streaming"),
    ],
)
def test_other_routes(server: FrontEndServer, path: str, body: dict[str, Any], word: str) -> None:
    refused(server, path, {"model": MODELS[0], **body}, word)


def test_what_fits_is_served(server: FrontEndServer) -> None:
    params = {"temperature": 1, "top_k": None, "stop": ["zzz"], "logit_bias": {"1": 0}, "n": 2}
    body = {"text": ["a", "b"], "sampling_params": [{**params, "max_new_tokens": 2}] * 2}
    status, answer, _ = server.request(GENERATE, body)
    assert status == 200 and len(answer) == 4


def test_log_probabilities_are_counted_over_all_that_is_asked_for(server: FrontEndServer) -> None:
    def ask(tokens: int, top: int, *, n: int = 1, start: int = 0, new: int | None = 1) -> Any:
        params = {"n": n, "max_new_tokens": new, "temperature": 0, "ignore_eos": True}
        body = {"input_ids": [5] * tokens, "return_logprob": True, "logprob_start_len": start}
        return server.request(
            GENERATE, {**body, "top_logprobs_num": top, "sampling_params": params}
        )

    tokens = MOST_LOGPROBS // 64
    assert ask(tokens, 63)[0] == 400
    assert ask(tokens - 1, 63)[0] == 200
    status, answer, _ = ask(tokens // 2, 63, n=2)
    assert status == 400 and "max_logprobs" in answer["error"]["message"]
    assert ask(5, 2000, start=-1, new=None)[0] == 400
    assert ask(5, 2000, start=-1, new=20)[0] == 200
    assert ask(5, 20, start=-1, new=100)[0] == 200


def test_texts_of_tokens_are_the_tokenizers(server: FrontEndServer, tokenizers: Any) -> None:
    ids = [5, 300, 5, 1999]
    body = {
        **{"input_ids": ids, "return_logprob": True, "logprob_start_len": 0},
        **{"return_text_in_logprobs": True, "top_logprobs_num": 3},
        "sampling_params": {"max_new_tokens": 1},
    }
    for _ in range(2):
        meta = server.request(GENERATE, body)[1]["meta_info"]
        assert [text for _, _, text in meta["input_token_logprobs"]] == [
            tokenizers[0].decode([token]) for token in ids
        ]
        for position in meta["input_top_logprobs"][1:]:
            for _, token, text in position:
                assert text == tokenizers[0].decode([token])


@pytest.mark.parametrize("parts", [1, 60])
def test_a_list_of_wrong_entries_is_refused_by_its_first(
    server: FrontEndServer, parts: int
) -> None:
    """pydantic noted an error for each entry and type: 1,000 messages took a minute and 4 GB."""
    messages = [{"role": "user", "content": [{"type": "bad"}] * parts}] * 100
    status, answer, _ = server.request(CHAT, {"model": MODELS[0], "messages": messages})
    assert status == 400 and "`messages.0." in answer["error"]["message"]
    assert "messages.1." not in answer["error"]["message"]
    status, answer, _ = server.request(CHAT, {"model": MODELS[0], "messages": [1] * 1000})
    assert status == 400 and "messages.1" not in answer["error"]["message"]


LONG = "word " * 70_000


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (GENERATE, {"text": LONG}),
        ("/v1/completions", {"prompt": [LONG] * 4}),
        (CHAT, {"messages": [{"role": "user", "content": LONG}]}),
        ("/v1/messages", {"max_tokens": 1, "messages": [{"role": "user", "content": LONG}]}),
        ("/v1/messages/count_tokens", {"messages": [{"role": "user", "content": LONG}] * 1}),
        ("/tokenize", {"prompt": [LONG] * 8}),
        (CHAT, {"messages": [{"role": "user", "content": "a"}], "tools": "TOOLS"}),
    ],
)
def test_others_are_served_while_a_long_text_is_tokenized(
    server: FrontEndServer, path: str, body: dict[str, Any]
) -> None:
    if body.get("tools") == "TOOLS":
        tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
        body = {**body, "tools": [tool] * 500}
    answers: list[Any] = []

    def ask() -> None:
        answers.append(server.request(path, {"model": MODELS[0], **body}))

    asking = threading.Thread(target=ask)
    asking.start()
    healthy = 0
    while asking.is_alive():
        assert server.request("/health")[0] == 200
        healthy += 1
        time.sleep(0.002)
    status, answer, _ = answers[0]
    assert status == (200 if "token" in path else 400)
    # While the event loop is held up, at most two are answered: before and after.
    assert healthy > 6, (healthy, answer)


def test_a_long_chat_gets_the_same_answer_as_a_short_one(server: FrontEndServer) -> None:
    """Its body is looked at in a thread, where errors and results must come back from as well."""
    content, sampling = "word " * 500, {"max_tokens": 3, "temperature": 0}
    body = {"model": MODELS[0], "messages": [{"role": "user", "content": content}], **sampling}
    padded = {**body, "messages": [{"role": "user", "content": content, "name": "x" * 20_000}]}
    short, long = server.request(CHAT, body)[1], server.request(CHAT, padded)[1]
    assert short["choices"] == long["choices"] and short["usage"]["prompt_tokens"] > 500
    wrong = {**padded, "tool_choice": "required"}
    refused(server, CHAT, wrong, "Tools", "required")
