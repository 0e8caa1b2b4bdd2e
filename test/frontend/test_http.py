"""SGLang's and OpenAI's APIs over real HTTP, with tokens that a fake device chooses."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import jsonschema
import openai
import pytest
from crosspool.frontend import private_answers
from prometheus_client.parser import text_string_to_metric_families
from sglang.srt.entrypoints.openai import serving_chat
from sglang.srt.entrypoints.openai.protocol import Function, Tool, ToolChoice, ToolChoiceFuncName
from support.fake_device import logprob_of
from support.front_end import MODELS, FrontEndServer

GREEDY = {"temperature": 0, "max_new_tokens": 12}
CHAT: list[Any] = [{"role": "user", "content": "hello"}]


@pytest.fixture
def client(server: FrontEndServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60)


def wait_idle(server: FrontEndServer) -> None:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        models = server.request("/crosspool/status")[1]["models"]
        if not any(m["running"] or m["waiting"] for m in models):
            return
        time.sleep(0.05)
    raise AssertionError(models)


@pytest.mark.parametrize("model", [0, 1])
def test_generate(
    server: FrontEndServer, scripted: list[list[int]], tokenizers: Any, model: int
) -> None:
    body = {"text": "hello there", "sampling_params": GREEDY}
    status, answer, _ = server.request(f"/m/{MODELS[model]}/generate", body)
    assert status == 200
    prompt = tokenizers[model].encode("hello there")
    said = scripted[model][:12]
    joined = tokenizers[model].decode(prompt + said, skip_special_tokens=True)
    assert (
        answer["text"] == joined[len(tokenizers[model].decode(prompt, skip_special_tokens=True)) :]
    )
    assert answer["output_ids"] == said
    meta = answer["meta_info"]
    assert meta["finish_reason"] == {"type": "length", "length": 12}
    assert (meta["prompt_tokens"], meta["completion_tokens"]) == (len(prompt), 12)


def test_logprobs_of_prompt_and_output(server: FrontEndServer, scripted: list[list[int]]) -> None:
    ids = [5, 6, 7, 8]
    body = {
        "input_ids": ids,
        "sampling_params": {**GREEDY, "max_new_tokens": 3},
        "return_logprob": True,
        "logprob_start_len": 0,
        "top_logprobs_num": 2,
        "token_ids_logprob": [9, 10],
    }
    meta = server.request("/generate", body)[1]["meta_info"]
    prompt = meta["input_token_logprobs"]
    assert [token for _, token, _ in prompt] == ids
    assert prompt[0][0] is None
    assert [v for v, _, _ in prompt[1:]] == pytest.approx([logprob_of(t) for t in ids[1:]])
    output = meta["output_token_logprobs"]
    assert [token for _, token, _ in output] == scripted[0][:3]
    assert [v for v, _, _ in output] == pytest.approx([logprob_of(t) for t in scripted[0][:3]])
    assert [len(pairs or ()) for pairs in meta["input_top_logprobs"]] == [0, 2, 2, 2]
    assert [len(pairs) for pairs in meta["output_top_logprobs"]] == [2, 2, 2]
    for pairs in meta["output_token_ids_logprobs"]:
        assert [(token, pytest.approx(value)) for value, token, _ in pairs] == [
            (9, logprob_of(9)),
            (10, logprob_of(10)),
        ]


def test_prefill_only(server: FrontEndServer) -> None:
    body = {"text": "hello", "sampling_params": {"max_new_tokens": 0}}
    status, answer, _ = server.request("/generate", body)
    assert (status, answer["output_ids"]) == (200, [])
    assert answer["meta_info"]["finish_reason"]["type"] == "length"


def test_native_stream_ends_as_the_whole_answer(server: FrontEndServer, slow: None) -> None:
    body = {"text": "hello", "sampling_params": GREEDY}
    whole = server.request("/generate", body)[1]
    events = server.events("/generate", body)
    assert len(events) > 3
    assert events[-1]["text"] == whole["text"]
    assert events[-1]["output_ids"] == whole["output_ids"]


def test_chat_stream_with_usage(client: openai.OpenAI) -> None:
    arguments: dict[str, Any] = {"model": MODELS[1], "messages": CHAT, "max_tokens": 10}
    whole = client.chat.completions.create(**arguments)
    pieces, usage = [], None
    for event in client.chat.completions.create(
        **arguments, stream=True, stream_options={"include_usage": True}
    ):
        usage = event.usage or usage
        pieces += [c.delta.content for c in event.choices if c.delta.content]
    assert "".join(pieces) == whole.choices[0].message.content
    assert whole.choices[0].finish_reason == "length"
    assert usage is not None and usage.completion_tokens == 10


def test_chat_logprobs(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODELS[0], messages=CHAT, max_tokens=4, logprobs=True, top_logprobs=3
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None
    assert [len(position.top_logprobs) for position in logprobs.content] == [3] * 4


def test_completions_n(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODELS[0], prompt=["a", "b"], n=2, max_tokens=5)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert len({choice.text for choice in answer.choices}) == 1


@pytest.mark.parametrize("stream", [False, True])
def test_stop_string_never_shows(client: openai.OpenAI, stream: bool) -> None:
    answer = client.completions.create(
        model=MODELS[0], prompt="x", max_tokens=60, stop=["fox jumps"], stream=stream
    )
    if stream:
        events = list(answer)
        text = "".join(event.choices[0].text for event in events if event.choices)
        reason = events[-1].choices[0].finish_reason
    else:
        text, reason = answer.choices[0].text, answer.choices[0].finish_reason
    assert text.lstrip() == "the quick brown "
    assert reason == "stop"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("pattern", "said"),
    # As in SGLang, a match stays in the text unless it is the pattern itself.
    [("f[a-z]x", "the quick brown fox"), ("fox jumps", "the quick brown ")],
)
def test_stop_regex(client: openai.OpenAI, pattern: str, said: str, stream: bool) -> None:
    body = {"stop_regex": ["never", pattern]}
    answer = client.completions.create(
        model=MODELS[0], prompt="x", max_tokens=60, stream=stream, extra_body=body
    )
    events = list(answer) if stream else [answer]
    text = "".join(event.choices[0].text for event in events if event.choices)
    assert text.lstrip() == said
    last = events[-1].choices[0]
    assert (last.finish_reason, last.matched_stop) == ("stop", pattern)


def test_stop_token_is_trimmed(
    server: FrontEndServer, scripted: list[list[int]], tokenizers: Any
) -> None:
    stop = scripted[0][4]
    params = {"max_new_tokens": 30, "stop_token_ids": [stop]}
    answer = server.request("/generate", {"text": "x", "sampling_params": params})[1]
    assert answer["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}
    assert answer["text"] == tokenizers[0].decode(scripted[0][:4])


def test_regex(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model=MODELS[0], prompt="x", max_tokens=20, extra_body={"regex": "[0-9]{3}-(a|b)"}
    )
    assert re.fullmatch(r"[0-9]{3}-(a|b)", answer.choices[0].text)


def test_json_schema(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"yes": {"type": "boolean"}},
        "required": ["yes"],
        "additionalProperties": False,
    }
    answer = client.chat.completions.create(
        model=MODELS[0],
        messages=CHAT,
        max_tokens=40,
        response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}},
    )
    assert set(json.loads(answer.choices[0].message.content or "")) == {"yes"}


def test_abort(server: FrontEndServer, slow: None) -> None:
    answers: list[Any] = []
    body = {"text": "x", "rid": "mine-1", "sampling_params": {"max_new_tokens": 2000}}
    path = f"/m/{MODELS[1]}/generate"
    thread = threading.Thread(target=lambda: answers.append(server.request(path, body)))
    thread.start()
    time.sleep(0.5)
    # no model named: every model is told
    assert server.request("/abort_request", {"rid": "mine-1"})[0] == 200
    thread.join(20)
    status, answer, _ = answers[0]
    assert status == 200
    assert answer["meta_info"]["finish_reason"]["type"] == "abort"
    assert 0 < len(answer["output_ids"]) < 2000
    wait_idle(server)


def test_disconnect_ends_the_request(server: FrontEndServer, slow: None) -> None:
    body = json.dumps(
        {"model": MODELS[0], "prompt": "x", "max_tokens": 3000, "stream": True}
    ).encode()
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", server.deployment.port)) as connection:
        connection.sendall(head.encode() + body)
        assert connection.recv(4096).startswith(b"HTTP/1.1 200")
        assert any(m["running"] for m in server.request("/crosspool/status")[1]["models"])
    wait_idle(server)


@pytest.mark.parametrize(
    ("path", "body", "status", "word"),
    [
        ("/v1/completions", {"model": "nope", "prompt": "x"}, 404, "nope"),
        ("/v1/models/nope", None, 404, "nope"),
        ("/m/nope/generate", {"text": "x"}, 404, "nope"),
        ("/v1/completions", b'{"model": "tiny', 400, "json"),
        ("/v1/completions", b"[1, 2]", 400, "object"),
        ("/v1/completions", {"model": 7, "prompt": "x"}, 400, "model"),
        ("/v1/completions", {"prompt": "x", "max_tokens": -3}, 400, "max_tokens"),
        (
            "/v1/completions",
            {"prompt": ["x", "y"], "custom_logit_processor": "x"},
            400,
            "code of a client",
        ),
        ("/generate", {"text": "x", "custom_logit_processor": "x"}, 400, "code of a client"),
        ("/v1/completions", {"prompt": "x", "regex": "[a-"}, 400, "regex"),
        ("/v1/completions", {"prompt": "x", "stop_regex": "a("}, 400, "stop_regex"),
        ("/v1/completions", {"prompt": "x", "stop_regex": ["a"] * 33}, 400, "stop_regex"),
        ("/v1/completions", {"prompt": "x", "stop_regex": "a" * 257}, 400, "stop_regex"),
        (
            "/v1/chat/completions",
            {"messages": CHAT, "stop_regex": "((a{999}){999}){999}b"},
            400,
            "stop_regex",
        ),
        ("/generate", {"text": "x", "sampling_params": {"stop_regex": "a("}}, 400, "stop_regex"),
        (
            "/v1/completions",
            {"prompt": "x", "max_tokens": 128, "stop_regex": "([a-z ]+)+$x"},
            400,
            "simpler",
        ),
        ("/v1/completions", {"prompt": "word " * 9000}, 400, "context"),
        ("/v1/chat/completions", {"messages": CHAT, "temperature": -1}, 400, "temperature"),
        ("/v1/chat/completions", {}, 400, "messages"),
        ("/generate", {"input_ids": [10**9]}, 400, "vocabulary"),
        ("/generate", {"text": "x", "sampling_params": {"max_new_tokens": -1}}, 400, "max_new"),
        ("/generate", {"text": "x", "sampling_params": {"n": 2, "beam_width": 2}}, 400, "beam"),
        ("/release_memory_occupation", {}, 403, "admin"),
        ("/crosspool/nothing", None, 404, "tensors"),
    ],
)
def test_bad_requests(server: FrontEndServer, path: str, body: Any, status: int, word: str) -> None:
    got, answer, _ = server.request(path, body)
    assert got == status, answer
    assert word in answer["error"]["message"].lower()
    assert "code" in answer["error"] and "type" in answer["error"]
    assert ".py" not in json.dumps(answer) and "Traceback" not in json.dumps(answer)


@pytest.mark.parametrize(
    ("prompt", "tokens"),
    [([0, 0, 0], 3), ([[0], [0, 0]], 3), ("", None), ([], None), (["", ""], None), ([[]], None)],
)
def test_a_prompt_of_token_0_is_not_empty(
    server: FrontEndServer, prompt: Any, tokens: int | None
) -> None:
    status, answer, _ = server.request("/v1/completions", {"prompt": prompt, "max_tokens": 1})
    if tokens is None:
        assert (status, answer["error"]["message"]) == (400, "Prompt cannot be empty")
    else:
        assert (status, answer["usage"]["prompt_tokens"]) == (200, tokens)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_bad_stream_is_refused_before_it_begins(server: FrontEndServer, path: str) -> None:
    body = {"prompt": "x", "messages": CHAT, "regex": "[a-", "stream": True}
    status, answer, _ = server.request(path, body)
    assert (status, answer["error"]["code"]) == (400, 400)


def test_models(server: FrontEndServer, client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == list(MODELS)
    assert client.models.retrieve(MODELS[1]).id == MODELS[1]
    card = server.request(f"/v1/models/{MODELS[0]}")[1]
    assert card["max_model_len"] == 4096


def test_default_model(server: FrontEndServer) -> None:
    for body in ({"prompt": "x"}, {"prompt": "x", "model": "default"}):
        status, answer, _ = server.request("/v1/completions", {**body, "max_tokens": 2})
        assert status == 200, answer


def test_tokenize(server: FrontEndServer, tokenizers: Any) -> None:
    for model, tokenizer in zip(MODELS, tokenizers, strict=True):
        answer = server.request("/v1/tokenize", {"model": model, "prompt": "hello there"})[1]
        assert answer["tokens"] == tokenizer.encode("hello there")
        back = server.request("/v1/detokenize", {"model": model, "tokens": answer["tokens"]})[1]
        assert back["text"].strip() == "hello there"


def test_information(server: FrontEndServer) -> None:
    for name in MODELS:
        info = server.request(f"/m/{name}/server_info")[1]
        assert info["served_model_name"] == name
        assert info["internal_states"][0]["name"] == name
        assert server.request(f"/m/{name}/model_info")[1]["model_path"].endswith(name)
    assert server.request("/health_generate")[0] == 200


def test_cached_tokens_and_flush(server: FrontEndServer) -> None:
    def cached(model: int, salt: str | None = None) -> int:
        body = {"input_ids": list(range(100, 170)), "sampling_params": GREEDY, "cache_salt": salt}
        status, answer, _ = server.request(f"/m/{MODELS[model]}/generate", body)
        assert status == 200
        return int(answer["meta_info"]["cached_tokens"])

    assert [cached(0), cached(1), cached(0), cached(1)] == [0, 0, 64, 64]
    assert [cached(0, "a"), cached(0, "a"), cached(0, "b")] == [0, 64, 0]
    assert server.manage(f"/m/{MODELS[0]}/flush_cache") == 200
    assert [cached(0), cached(1), cached(0)] == [0, 64, 64]
    assert server.manage("/flush_cache") == 200
    assert [cached(0), cached(1)] == [0, 0]
    body = {"model": MODELS[0], "prompt": list(range(100, 170)), "max_tokens": 1}
    usage = server.request("/v1/completions", body)[1]["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] == 64
    models = server.request("/crosspool/status")[1]["models"]
    assert models[0]["cached_bytes"] > 0 and models[0]["promised_bytes"] == 0


MANAGEMENT = {
    "/flush_cache": {},
    "/start_profile": {},
    "/stop_profile": {},
    "/set_internal_state": {"server_args": {"pp_max_micro_batch_size": 1}},
    "/open_session": {"capacity_of_str_len": 10},
    "/close_session": {"session_id": "x"},
    "/update_weights_from_disk": {"model_path": "/nowhere"},
    "/init_weights_update_group": {
        "master_address": "x", "master_port": 1, "rank_offset": 0, "world_size": 1,
    },
    "/update_weights_from_distributed": {"names": [], "dtypes": [], "shapes": []},
    "/update_weight_version": {"new_version": "2", "abort_all_requests": False},
    "/get_weights_by_name": {"name": "x"},
    "/weights_checker": {"action": "checksum"},
    "/load_lora_adapter": {"lora_name": "x", "lora_path": "/nowhere"},
    "/freeze_gc": {},
    "/configure_logging": {"log_level": "info"},
    "/hicache/storage-backend/clear": {},
}  # fmt: skip


@pytest.mark.parametrize("path", MANAGEMENT)
def test_no_management_route_hangs(server: FrontEndServer, path: str) -> None:
    assert server.manage(path, MANAGEMENT[path]) in (200, 400)
    body = {"model": MODELS[0], "prompt": "x", "max_tokens": 1}
    assert server.request("/v1/completions", body)[0] == 200


def test_pause_and_continue(server: FrontEndServer) -> None:
    assert server.manage("/pause_generation", {"mode": "in_place"}) == 200
    body = {"model": MODELS[0], "prompt": "x", "max_tokens": 1}
    assert server.request("/v1/completions", body, timeout=1)[0] == 0
    assert server.manage("/continue_generation", {}) == 200
    assert server.request("/v1/completions", body)[0] == 200


def test_a_model_that_is_paused_stands_still_and_the_others_do_not(
    server: FrontEndServer, slow: None
) -> None:
    text = {"text": "x", "sampling_params": {"max_new_tokens": 40, "ignore_eos": True}}
    model = f"/m/{MODELS[0]}"
    answers: list[Any] = []
    thread = threading.Thread(target=lambda: answers.append(server.request("/generate", text)))
    thread.start()

    def tokens() -> int:
        return int(server.request("/crosspool/status")[1]["models"][0]["output_tokens"])

    before, deadline = tokens(), time.monotonic() + 20
    while tokens() < before + 3:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert server.manage(f"{model}/pause_generation", {"mode": "in_place"}) == 200
    try:
        time.sleep(0.3)
        paused = tokens()
        assert server.request(f"/m/{MODELS[1]}/generate", text)[0] == 200
        assert tokens() == paused and not answers
        assert server.request("/health")[0] == 200
    finally:
        assert server.manage(f"{model}/continue_generation", {}) == 200
        thread.join(30)
    status, answer, _ = answers[0]
    assert status == 200 and answer["meta_info"]["completion_tokens"] == 40


def test_all_requests_of_a_model_are_ended(server: FrontEndServer, slow: None) -> None:
    """Those that wait for one of the 64 places get what those that run get."""
    params = {"max_new_tokens": 200, "ignore_eos": True}
    body = {"text": ["x"] * 70, "sampling_params": params}
    answers: list[Any] = []
    thread = threading.Thread(target=lambda: answers.append(server.request("/generate", body)))
    thread.start()
    deadline = time.monotonic() + 20
    try:
        while not server.request("/crosspool/status")[1]["models"][0]["waiting"]:
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        assert server.manage("/abort_request", {"abort_all": True}) == 200
        thread.join(30)
    status, answer, _ = answers[0]
    assert status == 200
    assert [one["meta_info"]["finish_reason"]["type"] for one in answer] == ["abort"] * 70
    assert any(one["meta_info"]["completion_tokens"] == 0 for one in answer)


def test_running_requests_are_not_taken_back(server: FrontEndServer) -> None:
    with server.admin() as client:
        answer = client.post("/pause_generation", json={"mode": "retract"})
    assert answer.status_code == 400
    assert "in_place" in answer.json()["error"]["message"]
    assert server.request("/generate", {"text": "x", "sampling_params": GREEDY})[0] == 200


DSL = """
import json, sys
import crosspool.sglang
import sglang as sgl

sgl.set_default_backend(sgl.RuntimeEndpoint(sys.argv[1]))

@sgl.function
def program(s):
    s += "A " + sgl.gen("word", max_tokens=6)
    s += " is " + sgl.select("answer", choices=["yes", "no", "maybe so"])
    s += " " + sgl.gen("number", regex=r"[0-9]{3}", max_tokens=8)

@sgl.function
def tree(s):
    s += "tips:"
    forks = s.fork(2)
    for fork in forks:
        fork += sgl.gen("tip", max_tokens=4)
    s += forks[0]["tip"] + "/" + forks[1]["tip"]

one = program.run()
streamed = program.run(stream=True)
pieces = "".join(streamed.text_iter("word"))
print(json.dumps([one["word"], one["answer"], one["number"], tree.run().text(), pieces]))
"""


def test_dsl(server: FrontEndServer, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(DSL)
    run = subprocess.run(
        [sys.executable, str(program), f"{server.url}/m/{MODELS[0]}"],
        capture_output=True,
        text=True,
        timeout=120,
        env={"PYTHONPATH": ":".join(sys.path), "HF_HUB_OFFLINE": "1", "PATH": ""},
    )
    assert run.returncode == 0, run.stderr[-2000:]
    word, answer, number, tips, pieces = json.loads(run.stdout.splitlines()[-1])
    assert "the quick" in word and pieces == word
    assert answer in ("yes", "no", "maybe so")
    assert re.fullmatch("[0-9]{3}", number)
    assert tips.startswith("tips:") and tips.count("/") == 1


def test_metrics(server: FrontEndServer) -> None:
    def read() -> dict[tuple[str, str], float]:
        text = server.request("/metrics")[1]
        return {
            (sample.name, sample.labels.get("model", sample.labels.get("device", ""))): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    before = read()
    body = {"model": MODELS[1], "prompt": "x", "max_tokens": 7}
    assert server.request("/v1/completions", body)[0] == 200
    after = read()
    tokens = ("crosspool_output_tokens_total", MODELS[1])
    assert after[tokens] - before[tokens] == 7
    other = ("crosspool_output_tokens_total", MODELS[0])
    assert after[other] == before[other]
    assert after["crosspool_ready", ""] == 1
    assert after["crosspool_dispatch_bytes_total", "cpu"] == 300
    cached = sum(after["crosspool_kv_cached_bytes", model] for model in MODELS)
    assert after["crosspool_kv_free_bytes", "cpu"] + cached == server.deployment.kv_pool_bytes


def test_inspection(server: FrontEndServer) -> None:
    tensors = server.request("/crosspool/tensors")[1]
    assert tensors[0]["model"] == MODELS[0] and tensors[0]["device"] == "cpu"
    (pool,) = server.request("/crosspool/pools")[1]
    assert set(pool["mapped_bytes"]) == set(MODELS)
    with server.admin() as client:
        assert client.post("/crosspool/trace/start").status_code == 200
        events = client.post("/crosspool/trace/stop").json()
    assert [event["start_ns"] for event in events] == [1, 2]
    status = server.request("/crosspool/status")[1]
    assert status["ready"] and [m["name"] for m in status["models"]] == list(MODELS)


CITY = {
    "type": "object",
    "properties": {"city": {"$ref": "#/$defs/City"}},
    "required": ["city"],
    "additionalProperties": False,
    "$defs": {"City": {"type": "string", "enum": ["Paris", "Rome"]}},
}


def test_a_named_tool_whose_parameters_have_definitions(server: FrontEndServer) -> None:
    function = {"name": "get_weather", "parameters": CITY}
    for choice in ({"type": "function", "function": {"name": "get_weather"}}, "required"):
        status, answer, _ = server.request(
            "/v1/chat/completions",
            {
                "messages": CHAT,
                "tools": [{"type": "function", "function": function}],
                "tool_choice": choice,
                "max_tokens": 20,
            },
        )
        assert status == 200, answer


def test_the_grammar_of_a_named_tool_knows_its_definitions() -> None:
    private_answers.mend()
    tool = Tool(function=Function(name="get_weather", parameters=CITY))
    choice = ToolChoice(function=ToolChoiceFuncName(name="get_weather"))
    schema = serving_chat.get_json_schema_constraint([tool], choice)
    jsonschema.validate([{"name": "get_weather", "parameters": {"city": "Rome"}}], schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate([{"name": "get_weather", "parameters": {"city": "Oslo"}}], schema)
