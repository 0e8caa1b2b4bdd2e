"""Clients that we did not write: openai, SGLang's frontend language, curl, bench_serving."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import openai
import pytest
from support.server import DEMO, TINY_MODELS, Server


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120)


CHAT: list[Any] = [{"role": "user", "content": "Tell me about the import statement."}]


def test_models_are_listed(client: openai.OpenAI) -> None:
    assert {model.id for model in client.models.list()} == set(TINY_MODELS)


@pytest.mark.parametrize("model", TINY_MODELS)
def test_chat_with_usage_and_logprobs(client: openai.OpenAI, model: str) -> None:
    answer = client.chat.completions.create(
        model=model, messages=CHAT, max_tokens=24, temperature=0, logprobs=True, top_logprobs=3
    )
    assert answer.model == model
    assert answer.usage is not None and 0 < answer.usage.completion_tokens <= 24
    choice = answer.choices[0]
    assert choice.message.content and choice.finish_reason in ("length", "stop")
    assert choice.logprobs is not None and choice.logprobs.content is not None
    assert len(choice.logprobs.content) == answer.usage.completion_tokens
    for position in choice.logprobs.content:
        assert position.logprob <= 0 and len(position.top_logprobs) == 3
        # greedy: the chosen token is the best
        assert position.logprob == pytest.approx(position.top_logprobs[0].logprob)


@pytest.mark.parametrize("model", TINY_MODELS)
def test_stream_equals_the_whole_answer(client: openai.OpenAI, model: str) -> None:
    whole = client.chat.completions.create(
        model=model, messages=CHAT, max_tokens=40, temperature=0
    ).choices[0]
    pieces, usage = [], None
    for event in client.chat.completions.create(
        model=model,
        messages=CHAT,
        max_tokens=40,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    ):
        usage = event.usage or usage
        pieces += [c.delta.content for c in event.choices if c.delta.content]
    assert "".join(pieces) == whole.message.content
    assert len(pieces) > 1  # tokens that come faster than the client reads share a piece
    assert usage is not None and usage.completion_tokens > 3


def test_completions_with_n_seed_and_stop(client: openai.OpenAI) -> None:
    model = TINY_MODELS[0]
    arguments: dict[str, Any] = {
        "model": model,
        "prompt": "The import statement",
        "max_tokens": 16,
        "temperature": 1.2,
    }
    three = client.completions.create(**arguments, n=3)
    assert len({choice.text for choice in three.choices}) > 1
    first = client.completions.create(**arguments, seed=5).choices[0].text
    assert client.completions.create(**arguments, seed=5).choices[0].text == first
    assert client.completions.create(**arguments, seed=6).choices[0].text != first

    greedy = client.completions.create(
        model=model, prompt="The import statement", max_tokens=40, temperature=0
    )
    text = greedy.choices[0].text
    word = text.split()[4]
    stopped = client.completions.create(
        model=model,
        prompt="The import statement",
        max_tokens=40,
        temperature=0,
        stop=[word],
        stream=True,
    )
    got = "".join(event.choices[0].text for event in stopped if event.choices)
    assert got == text[: text.index(word)]


@pytest.mark.parametrize("model", TINY_MODELS)
def test_json_schema(client: openai.OpenAI, model: str) -> None:
    schema = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 12},
            "count": {"type": "integer", "minimum": 0, "maximum": 99},
        },
        "required": ["name", "count"],
        "additionalProperties": False,
    }
    answer = client.chat.completions.create(
        model=model,
        messages=CHAT,
        max_tokens=300,
        temperature=0.8,
        seed=1,
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "item", "schema": schema, "strict": True},
        },
    ).choices[0]
    item = json.loads(answer.message.content or "")
    assert set(item) == {"name", "count"}
    assert len(item["name"]) <= 12 and 0 <= item["count"] <= 99


def test_tools(client: openai.OpenAI) -> None:
    model = TINY_MODELS[0]
    tool: Any = {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather of a city",
            "strict": True,
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}},
                "required": ["city"],
                "additionalProperties": False,
            },
        },
    }
    answer = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "How is the weather in Paris?"}],
        tools=[tool],
        tool_choice={"type": "function", "function": {"name": "get_weather"}},
        max_tokens=200,
        temperature=0,
    )
    calls = answer.choices[0].message.tool_calls
    assert calls and calls[0].function.name == "get_weather"
    assert json.loads(calls[0].function.arguments)["city"] in ("Paris", "Rome")


DSL = """
import json, sys
import crosspool.sglang
import sglang as sgl

@sgl.function
def program(s, topic):
    s += "Tell me about " + topic + ". " + sgl.gen("about", max_tokens=12)
    s += " Is it a statement? " + sgl.select("answer", choices=["yes", "no", "maybe so"])
    s += " Its number is " + sgl.gen("number", regex=r"[0-9]{3}", max_tokens=8)

@sgl.function
def tree(s):
    s += "Two tips:"
    forks = s.fork(2)
    for fork in forks:
        fork += sgl.gen("tip", max_tokens=6)
    s += forks[0]["tip"] + " / " + forks[1]["tip"]

for url in sys.argv[1:]:
    sgl.set_default_backend(sgl.RuntimeEndpoint(url))
    one = program.run(topic="import")
    many = program.run_batch([{"topic": str(i)} for i in range(4)])
    streamed = program.run(topic="import", stream=True)
    pieces = list(streamed.text_iter("about"))
    print(json.dumps({
        "about": one["about"], "answer": one["answer"], "number": one["number"],
        "many": [m["number"] for m in many], "tree": tree.run().text(), "pieces": pieces,
    }))
"""


def test_sglang_program(server: Server, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(DSL)
    run = subprocess.run(
        [sys.executable, str(program), *(f"{server.url}/m/{model}" for model in TINY_MODELS[:2])],
        check=False,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    answers = [json.loads(line) for line in run.stdout.splitlines()[-2:]]
    assert len(answers) == 2
    for said in answers:
        assert said["about"] and said["answer"] in ("yes", "no", "maybe so")
        assert re.fullmatch(r"[0-9]{3}", said["number"])
        assert len(said["many"]) == 4
        assert all(re.fullmatch(r"[0-9]{3}", n) for n in said["many"])
        assert " / " in said["tree"]
        assert len("".join(said["pieces"])) > 0


def test_curl(server: Server) -> None:
    body = json.dumps({"model": TINY_MODELS[1], "messages": CHAT, "max_tokens": 8})
    run = subprocess.run(
        [
            *("curl", "-sS", "--fail", "--max-time", "60"),
            f"{server.url}/v1/chat/completions",
            *("-H", "Content-Type: application/json", "-d", body),
        ],
        check=False,
        capture_output=True,
        text=True,
        timeout=90,
    )
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout)["choices"][0]["message"]["content"]


@pytest.mark.slow
def test_bench_serving_on_two_models_at_once(server: Server, tmp_path: Path) -> None:
    runs = []
    for model in TINY_MODELS[:2]:
        out = tmp_path / f"{model}.jsonl"
        command = [
            *(sys.executable, "-m", "crosspool.sglang", "bench_serving", "--backend", "sglang"),
            *("--base-url", f"{server.url}/m/{model}"),
            *("--model", str(DEMO / model), "--tokenizer", str(DEMO / model)),
            *("--dataset-name", "random-ids", "--num-prompts", "16", "--request-rate", "8"),
            *("--random-input-len", "64", "--random-output-len", "16"),
            *("--random-range-ratio", "0.5", "--output-file", str(out), "--disable-tqdm"),
        ]
        runs.append(
            (
                out,
                subprocess.Popen(
                    command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
                ),
            )
        )
    for out, run in runs:
        printed, _ = run.communicate(timeout=240)
        assert run.returncode == 0, printed[-3000:]
        record = json.loads(out.read_text().splitlines()[-1])
        assert record["completed"] == 16, printed[-3000:]


def test_bench_counts_the_tokens_that_the_server_counts(server: Server, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    words = [server.url, "--rate", "20", "--requests", "12", "--ignore-eos", "--out", str(out)]
    words += ["--dataset", "random:prompt=20,output=6"]
    for model in TINY_MODELS:
        words += ["--model", model, "--tokenizer", f"{model}={DEMO / model}"]
    command = [sys.executable, "-m", "crosspool.cli.main", "bench", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    made = json.loads(out.read_text())
    assert set(made["models"]) == set(TINY_MODELS)
    for request in made["requests"]:
        assert request["prompt_tokens"] == request["wanted_prompt_tokens"] == 20
        assert request["output_tokens"] == 6 and request["finish_reason"] == "length"
        assert 0 < request["ttft"] <= request["e2e"]
