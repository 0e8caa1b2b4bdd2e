"""What a request may bring is bounded before its model's application sees any of it."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterable
from typing import Any, cast

import pytest
import zmq.asyncio
from crosspool.config.deployment import Deployment, ModelConfig
from crosspool.config.device import Device
from crosspool.server import json_shape
from crosspool.server.state import State
from crosspool.transport import admin
from starlette.responses import Response
from starlette.types import Message
from support.http_app import Answer, call, http_app

CONTEXT, LONGEST_TOKEN, VOCABULARY = 64, 8, 100
TEXT_BYTES = CONTEXT * LONGEST_TOKEN
BODY_BYTES, TOTAL_BYTES = 100_000, 250_000
PATHS = ("/v1/completions", "/generate", "/m/first/generate", "/m/first/v1/chat/completions")
ROUTES = (
    *(("POST", path) for path in PATHS),
    *(("PUT", "/generate"), ("GET", "/model_info"), ("GET", "/m/first/model_info")),
)


class Model:
    """A model's application that answers with the body that it gets."""

    name = "first"
    context_length, longest_token, vocabulary = CONTEXT, LONGEST_TOKEN, VOCABULARY

    def __init__(self) -> None:
        self.requests = 0
        self.goes_on: asyncio.Event | None = None
        """What it waits for before it answers."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.requests += 1
        if self.goes_on is not None:
            await self.goes_on.wait()
        body, more = b"", True
        while more:
            message = await receive()
            body += message["body"]
            more = message["more_body"]
        await Response(body)(scope, receive, send)


class Client:
    """Sends requests into the application, as its HTTP server would."""

    def __init__(self, **options: int) -> None:
        deployment = Deployment(
            models={0: ModelConfig(name="first", path="/first")},
            next_model=1,
            kv_pool_devices=(Device("cpu"),),
            weight_pool_devices=(Device("cpu"),),
            kv_pool_bytes=1,
            weight_pool_bytes=1,
            **options,  # type: ignore[arg-type]
        )
        self.model = Model()
        state = self.state = State(models=cast("Any", {"first": self.model}), ready=True)
        scheduler = admin.AsyncAdmin(zmq.asyncio.Context(), "ipc:///nowhere")
        self._app = http_app(deployment, state, scheduler)
        self.received = 0
        """Bytes that were read of the last body."""

    def send(
        self,
        path: str,
        body: Any,
        *,
        method: str = "POST",
        parts: Iterable[bytes] | None = None,
        announced: int | None = None,
    ) -> tuple[int, bytes]:
        """Status and body of the answer. Without ``parts``, the body's length is announced."""
        exchange = self.exchange(path, body, method=method, parts=parts, announced=announced)
        answer, self.received = asyncio.run(exchange)
        return answer.status, answer.body

    async def exchange(
        self,
        path: str,
        body: Any = b"",
        *,
        method: str = "POST",
        parts: Iterable[bytes] | None = None,
        announced: int | None = None,
        sends: asyncio.Event | None = None,
        leaves: bool = False,
    ) -> tuple[Answer, int]:
        """The answer, and how many bytes of the body were read. The body is sent once ``sends`` is
        set, where it is given. A client that ``leaves`` has gone once its body is read."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        length = str(len(data) if announced is None else announced).encode()
        sized = [(b"content-length", length)]
        framing = sized if parts is None else [(b"transfer-encoding", b"chunked")]
        left = iter([data] if parts is None else parts)
        received = 0

        async def receive() -> Message:
            nonlocal received
            if sends is not None:
                await sends.wait()
            part = next(left, b"")
            if leaves and received and not part:
                return {"type": "http.disconnect"}
            received += len(part)
            if leaves:
                return {"type": "http.request", "body": part, "more_body": False}
            return {"type": "http.request", "body": part, "more_body": bool(part)}

        headers = [(b"content-type", b"application/json"), *framing]
        answer = await call(self._app, method, path, headers=headers, receive=receive)
        return answer, received


@pytest.fixture
def client() -> Client:
    return Client(
        max_body_bytes=BODY_BYTES,
        max_total_body_bytes=TOTAL_BYTES,
        max_json_values=1000,
        max_json_depth=8,
        max_list_entries=20,
        max_samples=10,
        max_tools=6,
        max_stop_bytes=30,
        max_id_bytes=20,
    )


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_a_body_that_is_announced_too_large_is_refused_unread(
    client: Client, method: str, path: str
) -> None:
    status, answer = client.send(path, b"{", method=method, announced=BODY_BYTES + 1)
    assert status == 413 and str(BODY_BYTES) in answer.decode()
    assert client.received == 0 and client.model.requests == 0


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_a_body_in_chunks_is_refused_where_it_exceeds(
    client: Client, method: str, path: str
) -> None:
    parts = (b"x" * 10_000 for _ in range(1000))
    status, answer = client.send(path, b"", method=method, parts=parts)
    assert status == 413 and str(BODY_BYTES) in answer.decode()
    assert client.received <= BODY_BYTES + 10_000 and client.model.requests == 0


class Holding:
    """Two requests of which the bodies leave no room for a third large one, until they end."""

    BODY = b" " * 90_000

    def __init__(self, client: Client) -> None:
        self._client = client
        self._goes_on = client.model.goes_on = asyncio.Event()

    async def __aenter__(self) -> Holding:
        self._held = [
            asyncio.create_task(self._client.exchange("/generate", self.BODY)) for _ in "ab"
        ]
        await self.arrived(2)
        return self

    async def arrived(self, count: int) -> None:
        """Waits until the model has ``count`` requests."""
        async with asyncio.timeout(10):
            while self._client.model.requests < count:
                await asyncio.sleep(0.001)

    async def __aexit__(self, *_: object) -> None:
        self._goes_on.set()
        for task in self._held:
            answer, _ = await task
            assert answer.status == 200


@pytest.mark.parametrize("path", PATHS)
def test_bodies_of_all_requests_have_a_bound(client: Client, path: str) -> None:
    async def scenario() -> None:
        for _ in range(3):  # what has ended holds nothing
            client.model.requests = 0
            async with Holding(client):
                announced, unread = await client.exchange(path, Holding.BODY)
                chunked, read = await client.exchange(path, parts=[b" " * 10_000] * 9)
            assert unread == 0 and read <= TOTAL_BYTES - 2 * len(Holding.BODY) + 10_000
            for answer in (announced, chunked):
                assert answer.status == 503 and answer.headers["retry-after"]
                assert b"250000 bytes (max_total_body_bytes)" in answer.body
            assert client.model.requests == 2

    asyncio.run(scenario())


def test_small_bodies_find_room_beside_large_ones(client: Client) -> None:
    async def scenario() -> None:
        async with Holding(client) as holding:
            small = [client.exchange("/generate", {"text": "a"}) for _ in range(20)]
            chunked = [client.exchange("/generate", parts=[b" " * 30_000]) for _ in range(20)]
            tasks = [asyncio.create_task(one) for one in (*small, *chunked)]
            await holding.arrived(42)
        for task in tasks:
            answer, _ = await task
            assert answer.status == 200

    asyncio.run(scenario())


def test_a_body_that_is_announced_and_does_not_come_takes_no_room(client: Client) -> None:
    async def scenario() -> None:
        sends = asyncio.Event()
        silent = [
            asyncio.create_task(client.exchange("/generate", Holding.BODY, sends=sends))
            for _ in range(20)
        ]
        await asyncio.sleep(0)
        async with Holding(client):
            pass
        sends.set()
        statuses = [answer.status for answer, _ in await asyncio.gather(*silent)]
        assert 2 <= statuses.count(200) < 20 and statuses.count(503) == 20 - statuses.count(200)

    asyncio.run(scenario())


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "body",
    [
        {"text": "x" * TEXT_BYTES},
        {"text": "é" * (TEXT_BYTES // 2)},
        {"prompt": ["x" * TEXT_BYTES] * 10},
        {"input_ids": [5] * CONTEXT},
        {"input_ids": [[5] * CONTEXT] * 10},
        {"prompt": ["a"] * 5, "n": 2, "stop": ["x" * 15] * 2, "rid": "r" * 20},
        {"text": "a", "sampling_params": {"n": 10, "logit_bias": {str(i): 1 for i in range(20)}}},
        {"text": ["a", "b"], "sampling_params": [{"n": 5}, {"n": 5}]},
        {"messages": [{"role": "user", "content": "a"}] * 20, "seed": None, "n": None},
        {"input": [{"role": "user", "content": [{"type": "text", "text": "a"}]}], "text": {}},
        {"text": '\\"[[[[[[[[[[[[{{{{{{{{{{,,,,,,"' * 5},
    ],
)
def test_what_is_within_the_bounds_arrives_as_it_was_sent(
    client: Client, path: str, body: dict[str, Any]
) -> None:
    sent = json.dumps(body).encode()
    assert client.send(path, sent) == (200, sent)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"text": "x" * (TEXT_BYTES + 1)}, 413, ["`text`", str(TEXT_BYTES)]),
        ({"text": "é" * (TEXT_BYTES // 2 + 1)}, 413, ["`text`", str(TEXT_BYTES)]),
        ({"prompt": ["a", "x" * (TEXT_BYTES + 1)]}, 413, ["`prompt[1]`", str(TEXT_BYTES)]),
        ({"messages": [{"content": "x" * 300}] * 2}, 413, ["`messages`", str(TEXT_BYTES)]),
        ({"tools": [{"x": {"y": "x" * 600}}]}, 413, ["`tools`", str(TEXT_BYTES)]),
        ({"sampling_params": {"regex": "x" * 600}}, 413, ["`sampling_params.regex`"]),
        ({"input_ids": [5] * (CONTEXT + 1)}, 400, ["`input_ids`", str(CONTEXT)]),
        ({"prompt": [[5], [5] * (CONTEXT + 1)]}, 400, ["`prompt[1]`", str(CONTEXT)]),
        ({"input_ids": [5, "a"]}, 400, ["`input_ids[1]`", "integer"]),
        ({"tokens": [5, VOCABULARY]}, 400, ["`tokens[1]`", "vocabulary", str(VOCABULARY - 1)]),
        ({"tokens": [[-1]]}, 400, ["`tokens[0][0]`", "vocabulary"]),
        ({"text": ["a"] * 11}, 400, ["`text`", "10"]),
        ({"text": ["a"] * 6, "n": 2}, 400, ["`n`", "10"]),
        ({"input_ids": [[5]] * 6, "sampling_params": {"n": 2}}, 400, ["`n`", "10"]),
        ({"n": 11}, 400, ["`n`", "10"]),
        ({"n": 0}, 400, ["`n`", "1 to 10"]),
        ({"n": "x"}, 400, ["`n`", "integer"]),
        ({"n": True}, 400, ["`n`", "integer"]),
        ({"sampling_params": {"n": 10**9}}, 400, ["`sampling_params.n`", "10"]),
        ({"sampling_params": [{}, {"n": 11}]}, 400, ["`sampling_params[1].n`", "10"]),
        ({"sampling_params": [{}] * 11}, 400, ["`sampling_params`", "10"]),
        ({"sampling_params": [1]}, 400, ["`sampling_params[0]`", "object"]),
        ({"sampling_params": "x"}, 400, ["`sampling_params`", "object"]),
        ({"stop": "x" * 31}, 400, ["`stop`", "30"]),
        ({"stop": ["é" * 8] * 2}, 400, ["`stop`", "30"]),
        ({"stop": 5}, 400, ["`stop`", "string"]),
        ({"stop_sequences": ["x"] * 21}, 400, ["`stop_sequences`", "20"]),
        ({"options": {"stop": ["x" * 31]}}, 400, ["`options.stop`", "30"]),
        ({"logit_bias": {str(i): 1 for i in range(21)}}, 400, ["`logit_bias`", "20"]),
        ({"logit_bias": {"x": 1, "2": 1, "y": 1}}, 400, ["`logit_bias`", "'x', 'y'"]),
        ({"logit_bias": dict.fromkeys("abcdefg", 1)}, 400, ["'e', ..."]),
        ({f"x{i}": 1 for i in range(21)}, 400, ["`body`", "20"]),
        ({"sampling_params": {"stop_token_ids": [5] * 21}}, 400, ["stop_token_ids`", "20"]),
        ({"token_ids_logprob": [5] * 21}, 400, ["`token_ids_logprob`", "20"]),
        ({"messages": []}, 400, ["`messages`", "at least one"]),
        ({"tools": [{}] * 7}, 400, ["`tools`", "6"]),
        ({"tools": 5}, 400, ["`tools`", "list"]),
        ({"tools": [{"function": {"parameters": False}}]}, 400, ["`tools[0].function.parameters`"]),
        ({"tools": [{}, {"parameters": True}]}, 400, ["`tools[1].parameters`", "object"]),
        ({"messages": [{}] * 21}, 400, ["`messages`", "20"]),
        ({"messages": [{"content": [{}] * 21}]}, 400, ["`messages`", "20"]),
        ({"rid": "x" * 21}, 400, ["`rid`", "20"]),
        ({"rid": ["a", "x" * 21]}, 400, ["`rid`", "20"]),
        ({"cache_salt": "x" * 21}, 400, ["`cache_salt`", "20"]),
        ({"extra_key": "x" * 21}, 400, ["`extra_key`", "20"]),
        (b'{"text":' + b"[" * 8 + b"]" * 8 + b"}", 400, ["8", "within"]),
        (b'{"text":' + b"[" * 90_000, 400, ["values"]),
        (b'{"text":[' + b"1," * 1100 + b"1]}", 400, [str(1000 + CONTEXT), "values"]),
        (b'{"text":[' + b"{}," * 1100 + b"{}]}", 400, [str(1000 + CONTEXT), "values"]),
        (b'{"text":[' + b'"",' * 3000 + b'""]}', 400, [str(1000 + CONTEXT), "values"]),
        (b'{"text": "a"', 400, ["JSON"]),
        (b"[1]", 400, ["object"]),
    ],
)
def test_what_exceeds_a_bound_is_refused_by_its_name(
    client: Client, path: str, body: Any, status: int, words: list[str]
) -> None:
    code, answer = client.send(path, body)
    message = json.loads(answer)["error"]["message"]
    assert code == status, message
    assert all(word in message for word in words), message
    assert client.model.requests == 0


@pytest.mark.parametrize(
    "body",
    [
        b'{"a":' * 1_000_000,
        b"[" * 8_000_000,
        b'"' * 8_000_000,
        b'{"a":"' + b"\\\\" * 4_000_000 + b'"}',
        b"[" + b'"\\"",' * 1_600_000,
        b"1," * 4_000_000,
    ],
)
def test_the_shape_of_a_large_body_is_told_without_decoding_it(body: bytes) -> None:
    # The largest of these takes seconds and gigabytes where it is decoded or walked as a whole.
    began = time.process_time()
    json_shape.problem(body, 300_000, 64, 75_000)
    assert time.process_time() - began < 2


@pytest.mark.parametrize(
    ("text", "values", "depth"),
    [
        ("{}", 2, 1),
        ("[[],[]]", 5, 2),
        ('{"a":{"b":[1,2,{"c":3}]}}', 7, 4),
        ('["[[[,,,", "\\"[[,,", "\\\\", "]]"]', 5, 1),
    ],
)
def test_values_and_depth_are_counted_outside_of_strings(
    text: str, values: int, depth: int
) -> None:
    body = text.encode()
    assert json_shape.problem(body, values, depth, 99) is None
    assert "values" in (json_shape.problem(body, values - 1, depth, 99) or "")
    assert "within" in (json_shape.problem(body, values, depth - 1, 99) or "")


@pytest.mark.parametrize(
    ("text", "costly"),
    [
        ('{"a":1,"b":[2,3],"c":"d"}', 6),
        ("[[],[],{},1,2,3]", 4),
        ('["\\"[[,,", "\\\\", "]]"]', 4),
    ],
)
def test_strings_objects_and_lists_are_counted(text: str, costly: int) -> None:
    body = text.encode()
    assert json_shape.problem(body, 99, 9, costly) is None
    problem = json_shape.problem(body, 99, 9, costly - 1) or ""
    assert f"more than {costly - 1} JSON strings, objects and lists" in problem


def test_a_quarter_of_the_values_may_be_strings(client: Client) -> None:
    def send(count: int) -> tuple[int, bytes]:
        return client.send("/generate", {"x": [[str(i) for i in range(20)]] * count})

    assert send(11)[0] == 200
    status, answer = send(13)
    error = json.loads(answer)["error"]
    assert status == 400 and "max_json_values" in error["message"]


def test_of_many_requests_one_begins_in_a_turn_of_the_loop(client: Client) -> None:
    async def main() -> None:
        turn, begun = 0, list[int]()
        model = client.model

        async def count() -> None:
            nonlocal turn
            while True:
                turn += 1
                await asyncio.sleep(0)

        class Noting(Model):
            async def __call__(self, *arguments: Any) -> None:
                begun.append(turn)
                await model(*arguments)

        client.state.models["first"] = cast("Any", Noting())
        counting = asyncio.create_task(count())
        answers = await asyncio.gather(*(client.exchange("/generate", {}) for _ in range(10)))
        counting.cancel()
        assert [answer.status for answer, _ in answers] == [200] * 10
        assert len(set(begun)) == 10

    asyncio.run(main())


def test_who_leaves_before_its_turn_costs_nothing(client: Client) -> None:
    async def main() -> None:
        leaving = [client.exchange("/generate", {}, leaves=True) for _ in range(10)]
        await asyncio.gather(*leaving)

    asyncio.run(main())
    assert client.model.requests <= 1  # the first has not had to wait
