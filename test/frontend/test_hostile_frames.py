"""Wrong messages on every socket of the front end's processes: each request among them is answered,
and none of the processes ends."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import time
from array import array
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
import zmq
from crosspool.server.front_ends import MOST_ATTACHED
from crosspool.transport import admin
from sglang.srt.managers import io_struct
from support.attached import AttachedFrontEnd, generate
from support.front_end import MODELS, FrontEndServer, has_ended

COMPLETION = {"model": MODELS[0], "prompt": "x", "max_tokens": 2}


@pytest.fixture
def front_end(server: FrontEndServer) -> Iterator[AttachedFrontEnd]:
    with contextlib.closing(
        AttachedFrontEnd(server.deployment.admin_address, MODELS[0])
    ) as attached:
        yield attached
        attached.send(io_struct.msgpack_encode(io_struct.ShutdownReq()))
        wait_detached(server)


def wait_detached(server: FrontEndServer) -> None:
    deadline = time.monotonic() + 10
    while any(m.attached for m in admin.status(server.deployment.admin_address).models):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def assert_serves(server: FrontEndServer) -> None:
    """Every process lives, and both models answer."""
    ended = [name for name, process in server.processes.items() if has_ended(process)]
    assert not ended, server.log.read_text()[-3000:]
    for model in MODELS:
        status, answer, _ = server.request("/v1/completions", {**COMPLETION, "model": model})
        assert status == 200, answer


def nested(message: Any, depth: int) -> bytes:
    """The frame of ``message`` with one more field than SGLang knows, a deep list."""
    frame = io_struct.msgpack_encode(message)
    kind, fields = struct.unpack_from(">BH", frame)
    assert kind == 0xDC  # an array of more than 15 elements
    return struct.pack(">BH", kind, fields + 1) + frame[3:] + b"\x91" * depth + b"\xc0"


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"max_new_tokens": 1.5}, "max_new_tokens"),
        ({"regex": 5}, "regex"),
        ({"json_schema": {"type": "object"}}, "json_schema"),
        ({"custom_params": {"a": {"b": {"c": {}}}}}, "custom_params"),
        ({"bootstrap_room": []}, "bootstrap_room"),
        ({"input_ids": [1.5]}, "input_ids"),
    ],
)
def test_a_request_that_cannot_be_decoded_is_answered(
    front_end: AttachedFrontEnd, changes: dict[str, Any], field: str
) -> None:
    front_end.send(io_struct.msgpack_encode(generate("wrong", **changes)))
    (reason,) = front_end.refusals(1).values()
    assert (reason["type"], reason["status_code"]) == ("abort", 400)
    assert reason["message"].startswith(f"`{field}`: ")
    assert front_end.serves()


def test_every_request_of_a_batch_that_cannot_be_decoded_is_answered(
    front_end: AttachedFrontEnd,
) -> None:
    batch = [generate("first"), generate("second", regex=5), generate("third")]
    frame = io_struct.msgpack_encode(io_struct.BatchTokenizedGenerateReqInput(batch=batch))
    front_end.send(frame)
    refusals = front_end.refusals(3)
    assert set(refusals) == {"first", "second", "third"}
    assert all("`regex`" in reason["message"] for reason in refusals.values())
    assert front_end.serves()


def test_deep_requests_are_answered(front_end: AttachedFrontEnd) -> None:
    front_end.send(nested(generate("one"), 50_000))
    assert "nested too deep" in front_end.refusals(1)["one"]["message"]
    batch = [nested(generate("first"), 50_000), io_struct.msgpack_encode(generate("last"))]
    name = io_struct.BatchTokenizedGenerateReqInput.__name__
    front_end.send(msgspec.msgpack.encode([name, None, None, [msgspec.Raw(m) for m in batch]]))
    assert set(front_end.refusals(2)) == {"first", "last"}
    assert front_end.serves()


@pytest.mark.parametrize(
    "changes",
    [
        {"logit_bias": {"one": 1.0}},
        {"logit_bias": {"99999999999999999999": 1.0}},
        {"input_ids": array("d", [1.0, 2.0])},
        {"input_ids": array("q", [2**62])},
        {"input_ids": None},
        {"max_new_tokens": 2**63},
        {"stop_token_ids": {2**63}, "max_new_tokens": -5},
    ],
)
def test_a_request_that_cannot_be_translated_is_answered(
    front_end: AttachedFrontEnd, changes: dict[str, Any]
) -> None:
    front_end.send(io_struct.msgpack_encode(generate("wrong", **changes)))
    assert front_end.finish("wrong")
    assert front_end.serves()


def test_a_pause_ends_with_the_front_end_that_wants_it(server: FrontEndServer) -> None:
    body = {"text": "x", "sampling_params": {"max_new_tokens": 3}}
    with contextlib.closing(
        AttachedFrontEnd(server.deployment.admin_address, MODELS[0])
    ) as attached:
        pause = io_struct.PauseGenerationReqInput(mode="in_place")
        attached.send(io_struct.msgpack_encode(pause))
        attached.send(io_struct.msgpack_encode(generate("waiting")))
        deadline = time.monotonic() + 20
        while not admin.status(server.deployment.admin_address).models[0].waiting:
            assert time.monotonic() < deadline
        assert server.request("/generate", body, timeout=1)[0] == 0
        attached.send(io_struct.msgpack_encode(io_struct.ShutdownReq()))
        assert server.request("/generate", body)[0] == 200


def test_messages_without_an_id_are_dropped(front_end: AttachedFrontEnd) -> None:
    good = io_struct.msgpack_encode(generate("good"))
    for frames in (
        (io_struct.msgpack_encode(generate(None)),),  # type: ignore[arg-type]
        (io_struct.msgpack_encode(io_struct.ConfigureLoggingReq(log_level="nonsense")),),
        (b"",),
        (b"\x91" * 100_000,),
        (b"\xdd\xff\xff\xff\xff" + b"\x90" * 10,),
        (msgspec.msgpack.encode(["PickleWrapper", b"cos\nsystem\n(S'false'\ntR."]),),
        (msgspec.msgpack.encode(7),),
        (good, good),
        (good[:-3],),
    ):
        front_end.send(*frames)
    assert front_end.serves()


@pytest.mark.parametrize(
    ("fields", "params"),
    [
        ({"bootstrap_room": []}, {}),
        ({}, {"max_new_tokens": 1.5}),
        ({}, {"regex": 5}),
        ({}, {"custom_params": {"a": {"b": {"c": {}}}}}),
    ],
)
def test_no_client_waits_for_what_cannot_be_decoded(
    server: FrontEndServer, fields: dict[str, Any], params: dict[str, Any]
) -> None:
    body = {"text": "x", "sampling_params": {"max_new_tokens": 2, **params}, **fields}
    status, answer, _ = server.request(f"/m/{MODELS[0]}/generate", body, timeout=20)
    assert status == 400, answer
    assert server.request("/crosspool/status")[0] == 200


# --- the admin socket


def put(
    server: FrontEndServer, *frames: bytes, replies: bool = False, identity: bytes | None = None
) -> admin.FromScheduler | None:
    """Sends one message to the admin socket; returns the reply if there is to be one."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        if identity is not None:
            dealer.setsockopt(zmq.IDENTITY, identity)
        dealer.connect(server.deployment.admin_address)
        dealer.send_multipart(frames)
        if not replies:
            dealer.setsockopt(zmq.LINGER, 1000)
            return None
        dealer.setsockopt(zmq.LINGER, 0)
        assert dealer.poll(10_000), "no reply"
        return msgspec.msgpack.decode(dealer.recv(), type=admin.FromScheduler)


def test_the_admin_socket_outlives_wrong_messages(server: FrontEndServer) -> None:
    ask = admin.encode(admin.Ask(id=1, what="status"))
    assert ask[0] == 0x83  # a map of three
    for frames in (
        (b"\x84" + ask[1:] + b"\xa1z" + b"\x91" * 50_000 + b"\xc0",),
        (b"",),
        (ask, ask),
        (ask[:-1],),
        (b"\xdf\xff\xff\xff\xff",),
    ):
        put(server, *frames)
    for identity in (b"gone", b"\x01" * 255):
        put(server, ask, identity=identity)  # gone before the reply comes
    assert_serves(server)
    assert admin.status(server.deployment.admin_address).ready


def attach_to(scheduler_input: str) -> admin.Attach:
    other = "ipc:///tmp/nobody-is-there"
    sockets = {"scheduler_input": scheduler_input, "tokenizer": other, "detokenizer": other}
    return admin.Attach(id=3, model=MODELS[0], **sockets)


@pytest.mark.parametrize(
    "address",
    [
        "",
        "ipc://",
        "ipc://*",
        "ipc://@abstract",
        "ipc:///" + "x" * 200,
        "ipc:///tmp/a\0b",
        "ipc:///tmp/\n",
        "tcp://127.0.0.1:1",
        "inproc://x",
    ],
)
def test_a_wrong_address_is_refused(server: FrontEndServer, address: str) -> None:
    answer = put(server, admin.encode(attach_to(address)), replies=True)
    assert isinstance(answer, admin.Answer) and answer.error is not None
    assert "socket" in answer.error
    assert_serves(server)
    assert not any(m.attached for m in admin.status(server.deployment.admin_address).models)


def test_an_unknown_device_is_not_gone(server: FrontEndServer) -> None:
    with pytest.raises(admin.AdminError, match="no device 'cpu:99'"):
        address = server.deployment.admin_address
        admin.rank_gone(address, "cpu:99", 1, "it burned", final=True)
    assert_serves(server)


# --- what http, the detokenizer and the scheduler's control socket read


def raw(address: str, payload: bytes) -> None:
    """Sends bytes to a socket file without any protocol."""
    with socket.socket(socket.AF_UNIX) as unix:
        unix.settimeout(10)
        unix.connect(address.removeprefix("ipc://"))
        with contextlib.suppress(OSError):  # the other side has had enough
            unix.sendall(payload)


def zmtp(kind: bytes, claimed: int) -> bytes:
    """The begin of a ZMTP connection of a socket ``kind``, and a frame that claims to be long."""
    greeting = b"\xff" + bytes(8) + b"\x7f\x03\x00NULL" + bytes(16) + b"\x00" + bytes(31)
    ready = b"\x05READY\x0bSocket-Type" + struct.pack(">I", len(kind)) + kind
    return greeting + b"\x04" + bytes([len(ready)]) + ready + b"\x02" + struct.pack(">Q", claimed)


def push(address: str, *frames: bytes) -> None:
    with zmq.Context() as context, context.socket(zmq.PUSH) as sender:
        sender.setsockopt(zmq.LINGER, 5000)
        sender.connect(address)
        sender.send_multipart(frames)


@pytest.mark.parametrize("name", ["m0.tokenizer", "m0.detokenizer", "control", "admin"])
def test_a_claimed_length_takes_no_memory(server: FrontEndServer, name: str) -> None:
    kind = b"PUSH" if name.startswith("m0") else b"DEALER"
    address = f"ipc://{server.deployment.runtime_dir}/{name}"
    before = {p: process.memory_info().vms for p, process in server.processes.items()}
    for claimed in (2**30, 2**40, 2**62, 2**64 - 1):
        raw(address, zmtp(kind, claimed) + bytes(1000))
    raw(address, os.urandom(1000))
    assert_serves(server)
    for process, vms in before.items():
        assert server.processes[process].memory_info().vms - vms < 2**29


@pytest.mark.parametrize("name", ["m0.tokenizer", "m0.detokenizer"])
def test_http_and_the_detokenizer_outlive_wrong_messages(server: FrontEndServer, name: str) -> None:
    address = f"ipc://{server.deployment.runtime_dir}/{name}"
    abort = io_struct.msgpack_encode(io_struct.AbortReq(rid="nobody's"))
    for frames in (
        (b"",),
        (b"garbage",),
        (b"\x91" * 100_000,),
        (abort, abort),
        (abort[:-2],),
        (msgspec.msgpack.encode(7),),
        (io_struct.msgpack_encode(generate("of another kind")),),
        (msgspec.msgpack.encode(["PickleWrapper", b"cos\n_exit\n(I1\ntR."]),),
    ):
        push(address, *frames)
    assert_serves(server)


def test_a_stranger_on_the_control_path_fails_nothing(server: FrontEndServer) -> None:
    with zmq.Context() as context:
        for identity in (None, b"stranger", b"\xff\xfe"):
            with context.socket(zmq.DEALER) as dealer:
                dealer.setsockopt(zmq.LINGER, 1000)
                if identity is not None:
                    dealer.setsockopt(zmq.IDENTITY, identity)
                dealer.connect(server.deployment.control_address)
                for frames in ([b"garbage"], [b"\x91" * 50_000], [b"a", b"b", b"c"]):
                    dealer.send_multipart(frames)
    time.sleep(0.2)
    assert_serves(server)


def test_the_number_of_attached_servers_is_bounded(server: FrontEndServer) -> None:
    address = f"ipc://{server.deployment.runtime_dir}/others"
    for _ in range(MOST_ATTACHED):
        put(server, admin.encode(attach_to(address)), replies=True)
    answer = put(server, admin.encode(attach_to(address)), replies=True)
    assert isinstance(answer, admin.Answer) and answer.error is not None
    assert str(MOST_ATTACHED) in answer.error
    assert sum(m.attached for m in admin.status(server.deployment.admin_address).models) == (
        MOST_ATTACHED
    )
    assert_serves(server)
    with zmq.Context() as context, context.socket(zmq.PUSH) as others:
        others.setsockopt(zmq.LINGER, 0)
        others.bind(address)
        deadline = time.monotonic() + 20
        while any(m.attached for m in admin.status(server.deployment.admin_address).models):
            assert time.monotonic() < deadline
            with contextlib.suppress(zmq.Again):  # none is connected that has not left
                others.send(io_struct.msgpack_encode(io_struct.ShutdownReq()), zmq.NOBLOCK)
