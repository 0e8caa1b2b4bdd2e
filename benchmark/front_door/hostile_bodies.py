"""Requests that cost a server much and a client little, each in one body."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from benchmark.front_door.exchange import Outcome, post

SHORT = "The import statement"
SAMPLED_TOKENS = 200
"""Most tokens that a request under a grammar asks for."""


@dataclass(frozen=True)
class Place:
    """Where hostile requests are sent."""

    port: int
    models: tuple[str, ...]

    @property
    def model(self) -> str:
        return self.models[0]

    def native(self, path: str = "/generate") -> str:
        return f"/m/{self.model}{path}"


@dataclass(frozen=True)
class Row:
    """A hostile request, or several that belong together."""

    name: str
    known: bool
    """Whether it is one of those that once stopped a server; others were thought of since."""
    send: Callable[[Place], Outcome]
    budget: str | None = None
    """Option with a budget of processor time of which the request needs nearly all, or a little
    more: a fast processor serves it, a slow one refuses it for the budget, and both are right."""


def many(item: bytes, count: int) -> bytes:
    """Return a JSON list of ``count`` times ``item``."""
    return b"[" + (item + b",") * (count - 1) + item + b"]"


def with_member(body: dict[str, Any], name: str, value: bytes) -> bytes:
    """Return ``body`` as JSON, with a member of which the JSON is given."""
    return json.dumps(body).encode()[:-1] + b', "' + name.encode() + b'": ' + value + b"}"


def _completion(name: str, value: bytes, **more: Any) -> Callable[[Place], Outcome]:
    def sent(place: Place) -> Outcome:
        body = {"model": place.model, "prompt": SHORT, "max_tokens": 4, **more}
        body.pop(name, None)
        return post(place.port, "/v1/completions", with_member(body, name, value))

    return sent


def _chat(name: str, value: bytes) -> Callable[[Place], Outcome]:
    def sent(place: Place) -> Outcome:
        body: dict[str, Any] = {"model": place.model, "max_tokens": 4}
        if name != "messages":
            body["messages"] = [{"role": "user", "content": SHORT}]
        return post(place.port, "/v1/chat/completions", with_member(body, name, value))

    return sent


def _generate(name: str, value: bytes, **more: Any) -> Callable[[Place], Outcome]:
    def sent(place: Place) -> Outcome:
        body: dict[str, Any] = {"sampling_params": {"max_new_tokens": 4}, **more}
        if name not in ("text", "input_ids"):
            body.setdefault("text", SHORT)
        return post(place.port, place.native(), with_member(body, name, value))

    return sent


def _sampling(name: str, value: bytes, **more: Any) -> Callable[[Place], Outcome]:
    sampling = {"max_new_tokens": SAMPLED_TOKENS, **more}
    return _generate("sampling_params", with_member(sampling, name, value))


def _raw(path: str, body: bytes, **headers: str) -> Callable[[Place], Outcome]:
    def sent(place: Place) -> Outcome:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        data = body.replace(b'"MODEL"', json.dumps(place.model).encode())
        return post(place.port, path.replace("MODEL", place.model), data, headers=named)

    return sent


def text_of(size: int) -> bytes:
    """Return a JSON string of about ``size`` bytes of words."""
    word = b"import module "
    return b'"' + word * (size // len(word)) + b'"'


def _quoted(text: str) -> bytes:
    return json.dumps(text).encode()


def nested_schema(depth: int) -> str:
    """Return a JSON schema of objects in objects, deeper than Python's own encoder would go. No
    member is required, which is what compilers find hard."""
    start = '{"type": "object", "properties": {"a": '
    return start * depth + '{"type": "string"}' + "}}" * depth


RECURSIVE = {
    "$defs": {
        "n": {
            "type": "object",
            "properties": {"l": {"$ref": "#/$defs/n"}, "r": {"$ref": "#/$defs/n"}},
        }
    },
    "$ref": "#/$defs/n",
}
ENDLESS = {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}
AMBIGUOUS = 'root ::= S\nS ::= S S S | S S | "a"'
NULLABLE = 'root ::= A A A A A A A A\nA ::= A A | "a" | ""'


def left_recursive(rules: int) -> str:
    """Return an EBNF of rules of which each begins with the next, and the last with the first."""
    lines = ["root ::= r0"]
    lines += [f'r{i} ::= r{(i + 1) % rules} "a" | r{(i + 7) % rules} | "b"' for i in range(rules)]
    return "\n".join(lines)


def nullable_chain(rules: int) -> str:
    """Return an EBNF of rules that may each be empty or the next, in a circle."""
    lines = [f'a{i} ::= a{(i + 1) % rules} "x" | a{(i + 1) % rules} | ""' for i in range(rules)]
    return "\n".join(["root ::= a0", *lines])


def _schema(schema: dict[str, Any]) -> bytes:
    return _quoted(json.dumps(schema))


def _wide_schema(properties: int) -> dict[str, Any]:
    members = {
        f"p{i}": {"anyOf": [{"type": "string"}, {"type": "number"}]} for i in range(properties)
    }
    return {"type": "object", "properties": members}


def _tools(count: int, schema: bytes) -> bytes:
    tool = b'{"type":"function","function":{"name":"f","parameters":' + schema + b"}}"
    return many(tool, count)


def _biases(count: int) -> bytes:
    return b"{" + b",".join(b'"%d":1' % i for i in range(count)) + b"}"


def known_rows() -> Iterator[Row]:
    """Yield the requests of one body that once stopped a server."""
    yield Row("prompt of 11 MB", True, _completion("prompt", text_of(11_000_000)))
    yield Row("prompt of 60 MB", True, _completion("prompt", text_of(60_000_000)))
    yield Row("text of 60 MB to /generate", True, _generate("text", text_of(60_000_000)))
    yield Row("stop string of 20 MB", True, _completion("stop", text_of(20_000_000)))
    yield Row("body of 100 MB to /generate", True, _generate("text", text_of(100_000_000)))
    yield Row("input_ids of 20 M integers", True, _generate("input_ids", many(b"7", 20_000_000)))
    yield Row("logit_bias of 10^6 entries", True, _completion("logit_bias", _biases(1_000_000)))
    yield Row("n = 10,000", True, _completion("n", b"10000"))
    yield Row("n = 1,000,000", True, _completion("n", b"1000000"))
    yield Row(
        "2,048 top log-probabilities of 4,000 tokens",
        True,
        _generate(
            "input_ids",
            many(b"7", 4000),
            return_logprob=True,
            logprob_start_len=0,
            top_logprobs_num=2048,
        ),
    )
    yield Row(
        "EBNF S ::= S S S",
        True,
        _sampling("ebnf", _quoted(AMBIGUOUS), min_new_tokens=150),
        budget="grammar_mask_timeout",
    )
    yield Row(
        "EBNF of left-recursive rules",
        True,
        _sampling("ebnf", _quoted(left_recursive(300)), min_new_tokens=150),
    )
    yield Row(
        "EBNF that takes minutes to compile",
        False,
        _sampling("ebnf", _quoted(left_recursive(3000)), min_new_tokens=150),
    )
    yield Row(
        "EBNF of which the first token takes minutes",
        False,
        _sampling("ebnf", _quoted(nullable_chain(3000)), min_new_tokens=150),
    )
    yield Row("JSON schema 900 deep", True, _sampling("json_schema", _quoted(nested_schema(900))))
    yield Row("JSON schema 300 deep", True, _sampling("json_schema", _quoted(nested_schema(300))))
    yield Row("JSON schema recursive by $ref", True, _sampling("json_schema", _schema(RECURSIVE)))
    yield Row("JSON schema of references alone", True, _sampling("json_schema", _schema(ENDLESS)))


def own_rows() -> Iterator[Row]:
    """Yield further requests of one body."""
    mark = "a" + "\u0301" * 1_000_000
    bomb = "{% for i in range(100000000) %}{{ i }}{% endfor %}"
    tag = {"begin": "<a>", "schema": {"type": "string"}, "end": "</a>"}
    tags = {
        "type": "structural_tag",
        "structures": [{**tag, "begin": f"<t{i}>"} for i in range(10_000)],
        "triggers": [f"<t{i}" for i in range(10_000)],
    }
    message = b'{"role":"user","content":"a"}'
    # Bodies that a server may well read before it refuses them.
    yield Row("prompt of 7 MB", False, _completion("prompt", text_of(7_000_000)))
    yield Row("stop string of 7 MB", False, _completion("stop", text_of(7_000_000)))
    yield Row("input_ids of 3 M integers", False, _generate("input_ids", many(b"7", 3_000_000)))
    yield Row("logit_bias of 400,000 entries", False, _completion("logit_bias", _biases(400_000)))
    yield Row("200,000 messages", False, _chat("messages", many(message, 200_000)))
    yield Row("n = 1,000", False, _completion("n", b"1000"))
    yield Row("n = 256", False, _completion("n", b"256"))
    yield Row(
        "16 prompts of 16 samples", False, _completion("prompt", many(text_of(200), 16), n=16)
    )
    yield Row("256 prompts of 2 KB", False, _completion("prompt", many(text_of(2_000), 256)))
    yield Row(
        "256 texts of 20 KB to /tokenize",
        False,
        _raw(
            "/m/MODEL/v1/tokenize",
            b'{"model":"MODEL","prompt":' + many(text_of(20_000), 256) + b"}",
        ),
    )
    yield Row(
        "60,000 strings in chat_template_kwargs",
        False,
        _chat("chat_template_kwargs", b'{"a":' + many(many(b'"a"', 4000), 15) + b"}"),
    )
    yield Row("20 prompts of 200 KB", False, _completion("prompt", many(text_of(200_000), 20)))
    yield Row("10^6 messages", False, _chat("messages", many(message, 1_000_000)))
    yield Row(
        "one message of 10^6 parts",
        False,
        _chat(
            "messages",
            b'[{"role":"user","content":' + many(b'{"type":"text","text":"a"}', 1_000_000) + b"}]",
        ),
    )
    yield Row("10,000 tools", False, _chat("tools", _tools(10_000, b'{"type":"object"}')))
    yield Row(
        "a tool with 20,000 properties",
        False,
        _chat("tools", _tools(1, json.dumps(_wide_schema(20_000)).encode())),
    )
    yield Row(
        "a tool with a schema 900 deep",
        False,
        _chat("tools", _tools(1, nested_schema(900).encode())),
    )
    yield Row("regex (a{1000}){1000}", False, _sampling("regex", _quoted("(a{1000}){1000}")))
    yield Row(
        "regex (.*a){60}", False, _sampling("regex", _quoted("(.*a){60}"), min_new_tokens=150)
    )
    yield Row(
        "EBNF of nullable rules",
        False,
        _sampling("ebnf", _quoted(NULLABLE), min_new_tokens=150),
        budget="grammar_mask_timeout",
    )
    yield Row("regex ((a?){200}){200}", False, _sampling("regex", _quoted("((a?){200}){200}")))
    yield Row(
        "regex of 10^5 alternatives",
        False,
        _sampling("regex", _quoted("|".join(f"w{i}x" for i in range(100_000)))),
    )
    yield Row(
        "regex 10,000 deep", False, _sampling("regex", _quoted("(" * 10_000 + "a" + ")" * 10_000))
    )
    yield Row(
        "EBNF 10,000 deep",
        False,
        _sampling("ebnf", _quoted("root ::= " + "(" * 10_000 + '"a"' + ")" * 10_000)),
    )
    yield Row(
        "JSON schema of 20,000 properties",
        False,
        _sampling("json_schema", _schema(_wide_schema(20_000))),
    )
    yield Row(
        "JSON schema with maxItems 10^7",
        False,
        _sampling(
            "json_schema",
            _schema(
                {"type": "array", "items": {"type": "string"}, "minItems": 10**7, "maxItems": 10**7}
            ),
        ),
    )
    yield Row(
        "structural tag of 10^4 triggers",
        False,
        _chat("response_format", json.dumps(tags).encode()),
    )
    yield Row("stop of 10^5 strings", False, _completion("stop", many(b'"zq"', 100_000)))
    yield Row("stop_token_ids of 10^6", False, _sampling("stop_token_ids", many(b"9", 1_000_000)))
    yield Row(
        "token_ids_logprob of 10^6",
        False,
        _generate("token_ids_logprob", many(b"9", 1_000_000), return_logprob=True),
    )
    yield Row(
        "top_logprobs_num of 10^9",
        False,
        _generate("top_logprobs_num", b"1000000000", return_logprob=True),
    )
    yield Row(
        "logprob_start_len of -10^9",
        False,
        _generate("logprob_start_len", b"-1000000000", return_logprob=True),
    )
    yield Row(
        "custom_params 500 deep",
        False,
        _sampling("custom_params", b'{"a":' * 500 + b"1" + b"}" * 500),
    )
    yield Row(
        "custom_params of 10^6 entries", False, _sampling("custom_params", _biases(1_000_000))
    )
    yield Row("a body of 10^6 brackets", False, _raw("/v1/completions", b"[" * 1_000_000))
    yield Row(
        "a body of 10^6 brackets to /generate", False, _raw("/m/MODEL/generate", b"[" * 1_000_000)
    )
    yield Row(
        "input_ids 100,000 lists deep",
        False,
        _generate("input_ids", b"[" * 100_000 + b"]" * 100_000),
    )
    yield Row("10^5 prompts in a batch", False, _completion("prompt", many(b'"a"', 100_000)))
    yield Row("10^5 texts to /generate", False, _generate("text", many(b'"a"', 100_000)))
    yield Row("a prompt of 10^6 combining characters", False, _completion("prompt", _quoted(mark)))
    yield Row(
        "a prompt of one word of 4 MB", False, _completion("prompt", b'"' + b"a" * 4_000_000 + b'"')
    )
    yield Row("a rid of 10 MB", False, _generate("rid", text_of(10_000_000)))
    yield Row("10^6 keys that nobody knows", False, _raw("/v1/completions", _biases(1_000_000)))
    yield Row("a number of 10^6 digits", False, _completion("seed", b"1" * 1_000_000))
    yield Row("max_tokens of 10^18", False, _completion("max_tokens", b"1000000000000000000"))
    yield Row(
        "gzip of 100 MB",
        False,
        _raw(
            "/v1/completions",
            gzip.compress(b'{"prompt":"' + b"a" * 100_000_000 + b'"}', 1),
            Content_Encoding="gzip",
        ),
    )
    yield Row(
        "templates in chat_template_kwargs",
        False,
        _chat("chat_template_kwargs", json.dumps({"chat_template": bomb, "x": bomb}).encode()),
    )
    yield Row(
        "chat_template_kwargs of 10^6 entries",
        False,
        _chat("chat_template_kwargs", _biases(1_000_000)),
    )
    yield Row(
        "60 MB to /tokenize",
        False,
        _raw("/m/MODEL/v1/tokenize", b'{"model":"MODEL","prompt":' + text_of(60_000_000) + b"}"),
    )
    yield Row(
        "10^7 tokens to /detokenize",
        False,
        _raw(
            "/m/MODEL/v1/detokenize", b'{"model":"MODEL","tokens":' + many(b"9", 10_000_000) + b"}"
        ),
    )
    yield Row(
        "10^5 items to /v1/score",
        False,
        _raw(
            "/m/MODEL/v1/score",
            b'{"query":"a","label_token_ids":[5],"items":' + many(b'"b"', 100_000) + b"}",
        ),
    )
    yield Row(
        "10 MB to /parse_function_call",
        False,
        _raw(
            "/m/MODEL/parse_function_call",
            b'{"tools":[],"tool_call_parser":"qwen25","text":' + text_of(10_000_000) + b"}",
        ),
    )
    yield Row(
        "10 MB to /separate_reasoning",
        False,
        _raw(
            "/m/MODEL/separate_reasoning",
            b'{"reasoning_parser":"deepseek-r1","text":' + text_of(10_000_000) + b"}",
        ),
    )
    yield Row(
        "60 MB to /v1/messages",
        False,
        _raw(
            "/v1/messages",
            b'{"max_tokens":4,"messages":[{"role":"user","content":' + text_of(60_000_000) + b"}]}",
        ),
    )
    yield Row(
        "60 MB to /v1/responses",
        False,
        _raw("/v1/responses", b'{"input":' + text_of(60_000_000) + b"}"),
    )
    yield Row(
        "60 MB to /api/chat",
        False,
        _raw(
            "/api/chat",
            b'{"model":"MODEL","messages":[{"role":"user","content":'
            + text_of(60_000_000)
            + b"}]}",
        ),
    )
    yield Row(
        "60 MB to /abort_request",
        False,
        _raw("/abort_request", b'{"rid":' + text_of(60_000_000) + b"}"),
    )
    yield Row("60 MB to /no/such/route", False, _raw("/no/such/route", text_of(60_000_000)))
    yield Row("a header of 1 MB", False, _raw("/v1/completions", b"{}", X_Long="a" * 1_000_000))
    yield Row(
        "500 headers",
        False,
        _raw("/v1/completions", b"{}", **{f"X_{i}": "a" * 60 for i in range(500)}),
    )
    yield Row("a path of 60 KB", False, _raw("/m/" + "a" * 60_000 + "/generate", b"{}"))
    yield Row("a query of 60 KB", False, _raw("/v1/completions?" + "model=a&" * 7_500, b"{}"))
