"""What a client gets when something is wrong: an error that its library can read, over a connection
that it can go on using."""

from __future__ import annotations

import http.client
import json
import socket
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.front_end import MODELS, FrontEndServer

NATIVE = f"/m/{MODELS[0]}/generate"
COMPLETION = {"model": MODELS[0], "prompt": "x", "max_tokens": 1}
DEEP = b'{"text": ' + b"[" * 100_000
"""JSON that no decoder follows to its end."""
LONG = 4 << 20
"""Bytes of a body that the server does not read before it answers, more than sockets hold."""


@pytest.fixture
def client(server: FrontEndServer) -> Iterator[httpx.Client]:
    """A client that keeps its one connection."""
    with httpx.Client(
        base_url=server.url, timeout=30, limits=httpx.Limits(max_connections=1)
    ) as client:
        yield client


def sampling(**params: Any) -> dict[str, Any]:
    return {"text": "x", "sampling_params": {"max_new_tokens": 1, **params}}


WRONG: list[tuple[str, Any]] = [
    (NATIVE, sampling(max_new_tokens="7")),
    (NATIVE, sampling(temperature="x")),
    (NATIVE, sampling(no_such_parameter=1)),
    (NATIVE, {"text": "x", "stream": True, **sampling(temperature="x")}),
    (NATIVE, DEEP),
    (NATIVE, b'{"text": "\xff"}'),
    (f"/m/{MODELS[0]}/v1/completions", DEEP),
    ("/v1/completions", DEEP),
    ("/v1/completions", b'{"prompt": "\xff"}'),
    ("/separate_reasoning", {"text": "a", "reasoning_parser": "[]"}),
    ("/vertex_generate", {"instances": [{"text": "a"}], "parameters": {"a": {}}}),
    ("/start_profile", {}),
    ("/stop_profile", {}),
    ("/scale_elastic_ep", b""),
    ("/v1/embeddings", {"input": "x"}),
    ("/v1/messages/count_tokens", {"messages": []}),
]


@pytest.mark.parametrize(("path", "body"), WRONG)
def test_mistakes_are_400_and_the_connection_goes_on(
    client: httpx.Client, path: str, body: Any
) -> None:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"content-type": "application/json"}
    for _ in range(3):
        answer = client.post(path, content=content, headers=headers)
        assert answer.status_code == 400, answer.text
        error = answer.json()["error"]
        assert error["message"] and error["type"] == "invalid_request_error"
        assert ".py" not in answer.text and "Traceback" not in answer.text
    assert client.post("/v1/completions", json=COMPLETION).status_code == 200


def test_a_body_of_another_type_is_400(client: httpx.Client) -> None:
    headers = {"content-type": "multipart/form-data"}
    answer = client.post("/invocations", content=b"{}", headers=headers)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["message"]


@pytest.mark.parametrize("level", ["loud", "", "no such level"])
def test_a_level_that_does_not_exist_is_400(server: FrontEndServer, level: str) -> None:
    with server.admin() as client:
        answer = client.post("/configure_logging", json={"log_level": level})
        assert answer.status_code == 400, answer.text
        assert "level" in answer.json()["error"]["message"].lower()
        assert client.post("/v1/completions", json=COMPLETION).status_code == 200


def test_a_key_that_is_not_ascii(server: FrontEndServer) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.deployment.port, timeout=30)
    connection.putrequest("GET", "/v1/models")
    connection.putheader("Authorization", b"Bearer \xe9")
    connection.endheaders()
    assert connection.getresponse().status == 200
    connection.close()


@pytest.mark.parametrize(("method", "status"), [("GET", 200), ("HEAD", 200), ("POST", 405)])
def test_health_by_generating(client: httpx.Client, method: str, status: int) -> None:
    assert client.request(method, "/health_generate").status_code == status


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/completions", {"model": "nope", "prompt": "x"}, "model"),
        ("/v1/completions", {"model": 7, "prompt": "x"}, "model"),
        ("/v1/completions", {"prompt": "x", "max_tokens": "many"}, "max_tokens"),
        ("/v1/completions", {}, "prompt"),
        ("/v1/chat/completions", {"messages": [{"role": 5}]}, "messages"),
    ],
)
def test_an_error_names_the_field(client: httpx.Client, path: str, body: Any, param: str) -> None:
    error = client.post(path, json=body).json()["error"]
    assert error["param"] == param
    assert f"`{param}" in error["message"] or param == "model"
    assert len(error["message"]) < 1200


@pytest.mark.parametrize(
    ("path", "body", "status", "kind"),
    [
        ("/v1/messages", {"model": "nope"}, 404, "not_found_error"),
        ("/v1/messages", {"model": MODELS[0]}, 400, "invalid_request_error"),
        ("/v1/messages", b"{", 400, "invalid_request_error"),
        (f"/m/{MODELS[0]}/v1/messages", {"max_tokens": "x"}, 400, "invalid_request_error"),
        ("/m/nope/v1/messages/count_tokens", {}, 404, "not_found_error"),
    ],
)
def test_anthropics_clients_get_their_shape(
    client: httpx.Client, path: str, body: Any, status: int, kind: str
) -> None:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = client.post(path, content=content, headers={"content-type": "application/json"})
    assert answer.status_code == status, answer.text
    told = answer.json()
    assert (told["type"], told["error"]["type"]) == ("error", kind)
    assert set(told["error"]) == {"type", "message"} and told["error"]["message"]


def test_every_model_is_listed_by_its_name(client: httpx.Client) -> None:
    cards = client.get("/v1/models").json()["data"]
    assert [card["root"] for card in cards] == list(MODELS)
    assert str(Path(__file__).parents[2]) not in json.dumps(cards)
    tags = client.get("/api/tags").json()["models"]
    assert [(tag["name"], tag["model"]) for tag in tags] == [(name, name) for name in MODELS]


@pytest.mark.parametrize("path", ["/v1/models", "/nowhere", f"/m/{MODELS[0]}/model_info"])
def test_pages_of_other_origins_read_answers(client: httpx.Client, path: str) -> None:
    answer = client.get(path, headers={"origin": "http://page"})
    assert answer.headers.get_list("access-control-allow-origin") == ["http://page"]
    asked = {"origin": "http://page", "access-control-request-method": "GET"}
    assert client.options(path, headers=asked).status_code == 200


# --- the admin


def test_nobody_writes_files_or_stops_models_without_a_key(
    server: FrontEndServer, client: httpx.Client, tmp_path: Path
) -> None:
    dump = {"dump_requests_folder": str(tmp_path), "dump_requests_threshold": 1}
    for path, body in (
        ("/configure_logging", dump),
        (f"/m/{MODELS[0]}/configure_logging", dump),
        ("/%63onfigure_logging", dump),
        ("/pause_generation", {"mode": "abort"}),
        ("/update_weight_version", {"new_version": "2"}),
        ("/abort_request", {"abort_all": True}),
        ("/crosspool/trace/start", None),
    ):
        answer = client.post(path, json=body)
        assert answer.status_code == 403, (path, answer.text)
        assert "admin socket" in answer.json()["error"]["message"]
    for name in MODELS:
        assert client.post("/v1/completions", json={**COMPLETION, "model": name}).is_success
    assert not list(tmp_path.iterdir())
    assert server.manage("/configure_logging", {"log_level": "info"}) == 200


def test_the_admin_socket_is_its_users_own(server: FrontEndServer) -> None:
    assert stat.S_IMODE(server.deployment.admin_socket.stat().st_mode) == 0o600
    with server.admin() as client:
        assert client.get("/v1/models").is_success
        assert client.post("/v1/completions", json=COMPLETION).is_success


# --- connections


def ask(server: FrontEndServer, head: str) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", server.deployment.port), timeout=20)
    connection.sendall(head.replace("\n", "\r\n").encode())
    return connection


def send_then_read(connection: socket.socket, size: int) -> bytes:
    """Sends a body as clients do that read the answer once they have sent all, and reads until the
    server closes. Raises OSError where the connection is reset."""
    piece = b"x" * (64 << 10)
    for _ in range(size // len(piece)):
        connection.sendall(piece)
    answer = bytearray()
    while part := connection.recv(65536):
        answer += part
    connection.close()
    return bytes(answer)


def read_one(connection: socket.socket) -> bytes:
    """Reads one answer, whose body is JSON."""
    answer = bytearray()
    while not answer.endswith(b"}") and (part := connection.recv(65536)):
        answer += part
    return bytes(answer)


@pytest.mark.parametrize("head", [
    "POST /nowhere HTTP/1.1\nHost: x\nConnection: close\nContent-Length: {size}\n\n",
    "POST /nowhere HTTP/1.0\nHost: x\nContent-Length: {size}\n\n",
    "POST /flush_cache HTTP/1.1\nHost: x\nConnection: close\nContent-Length: {size}\n\n",
    "GET /health HTTP/1.1\nHost: x\nConnection: close\nContent-Length: {size}\n\n",
])  # fmt: skip
def test_an_answer_before_the_body_is_read_arrives(server: FrontEndServer, head: str) -> None:
    answer = send_then_read(ask(server, head.format(size=LONG)), LONG)
    assert answer.startswith(b"HTTP/1.1 4") or b"GET /health" in head.encode()
    assert b"connection: close" in answer.lower() and answer.endswith(b"}")


def test_bytes_that_are_no_request_get_an_answer(server: FrontEndServer) -> None:
    answer = send_then_read(ask(server, "POST / HTTP/1.1\nHo st: x\n\n"), LONG)
    assert answer.startswith(b"HTTP/1.1 400") and b"Invalid HTTP request" in answer


def test_a_body_that_breaks_after_the_answer_ends_the_connection(server: FrontEndServer) -> None:
    head = "POST /nowhere HTTP/1.1\nHost: x\nTransfer-Encoding: chunked\n\n"
    connection = ask(server, head)
    assert read_one(connection).startswith(b"HTTP/1.1 404")
    connection.sendall(b"no chunk\r\n" * 1000)
    assert send_then_read(connection, LONG) == b""


def test_a_client_that_never_ends_is_cut_off(server: FrontEndServer) -> None:
    head = f"POST /nowhere HTTP/1.1\nHost: x\nConnection: close\nContent-Length: {LONG}\n\n"
    connection = ask(server, head)
    begun = time.monotonic()
    with pytest.raises(OSError, match=r"reset|Broken pipe"):
        while time.monotonic() - begun < 20:
            connection.sendall(b"x")
            time.sleep(0.1)
    connection.close()
    assert 1 < time.monotonic() - begun < 15


def test_a_kept_connection_survives_answers_before_the_body(client: httpx.Client) -> None:
    for _ in range(20):
        assert client.post("/nowhere", content=b"x" * LONG).status_code == 404
        assert client.post("/v1/completions", json=COMPLETION).status_code == 200


def test_an_upgrade_is_no_way_around(server: FrontEndServer) -> None:
    handshake = "Sec-WebSocket-Version: 13\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\n"
    head = f"Host: x\nConnection: Upgrade\nUpgrade: websocket\n{handshake}"
    connection = ask(server, f"GET /v1/realtime HTTP/1.1\n{head}\n")
    answer = read_one(connection)
    connection.close()
    assert answer.startswith(b"HTTP/1.1 400") and b"only text generation" in answer
