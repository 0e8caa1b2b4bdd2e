"""Hostile frames on every socket of the front end's processes, among which valid requests are still
answered.

``CROSSPOOL_FUZZ_FRAMES`` sets the number of frames on each socket (default 2,000),
``CROSSPOOL_FUZZ_SEED`` the seed; figures and seed are printed.
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import msgspec
import pytest
import zmq
from crosspool.frontend import private
from crosspool.frontend.messages import OpenRequest, refusal, to_token_id_output
from crosspool.transport import admin, messages, notices
from crosspool.transport.inspection import Report
from sglang.srt.managers import io_struct
from support.attached import AttachedFrontEnd, generate
from support.frames import hostile
from support.front_end import MODELS, FrontEndServer, deployment, has_ended

FRAMES = int(os.environ.get("CROSSPOOL_FUZZ_FRAMES", "2000"))
SEED = int(os.environ.get("CROSSPOOL_FUZZ_SEED", "0")) or random.SystemRandom().getrandbits(32)
BLOCK = 250
"""Frames between two valid requests."""
WARM_SHARE = 0.25
"""The first part of the frames, in which caches and arenas may still grow."""
GROWTH_MIB = 48
"""Most that a process may grow after that, whatever the number of frames."""
COMPLETION = {"prompt": "x", "max_tokens": 2}


@pytest.fixture(scope="module")
def fuzzed(script: Callable[[int, list[int], int], int]) -> Iterator[FrontEndServer]:
    running = FrontEndServer(deployment(), script)
    try:
        yield running.wait_ready()
    finally:
        running.stop()


def memory(server: FrontEndServer) -> dict[str, int]:
    """Unique memory of each process, in MiB."""
    return {n: p.memory_full_info().uss >> 20 for n, p in server.processes.items()}


def fuzz(
    server: FrontEndServer,
    name: str,
    valid: list[bytes],
    send: Callable[[list[bytes]], None],
    serves: Callable[[], bool] = lambda: True,
) -> None:
    """Sends the frames; after each block of them, ``serves`` and a completion of every model must
    succeed."""
    print(f"\n{name}: {FRAMES} frames, CROSSPOOL_FUZZ_SEED={SEED}", flush=True)
    rng = random.Random(f"{name} {SEED}")
    before, warm = memory(server), None
    began, slowest = time.monotonic(), 0.0
    for count in range(0, FRAMES, BLOCK):
        for _ in range(min(BLOCK, FRAMES - count)):
            parts = hostile(rng, valid)
            send(parts)
        asked = time.monotonic()
        assert serves(), f"{name}: no valid answer after {count + BLOCK} frames, seed {SEED}"
        for model in MODELS:
            status, answer, _ = server.request("/v1/completions", {**COMPLETION, "model": model})
            assert status == 200, (
                name,
                SEED,
                count,
                status,
                answer,
                server.log.read_text()[-2000:],
            )
        slowest = max(slowest, time.monotonic() - asked)
        if warm is None and count >= WARM_SHARE * FRAMES:
            warm = memory(server)
    after = memory(server)
    seconds = time.monotonic() - began
    alive = [n for n, process in server.processes.items() if not has_ended(process)]
    print(
        f"{name}: {FRAMES} frames in {seconds:.0f} s, slowest round of valid requests "
        f"{slowest:.2f} s, MiB before {before}, warm {warm}, after {after}, alive: {alive}, log "
        f"{server.log.stat().st_size >> 10} KiB",
        flush=True,
    )
    assert len(alive) == len(server.processes)
    assert warm is not None
    for process, used in after.items():
        assert used - warm[process] <= GROWTH_MIB, (name, process, warm, after)


def encode_all(*found: object) -> list[bytes]:
    return [io_struct.msgpack_encode(message) for message in found]


def test_requests_of_an_attached_front_end(fuzzed: FrontEndServer) -> None:
    valid = encode_all(
        generate("a"),
        generate("b", stream=True, temperature=0.5, stop=["x", "y"], logit_bias={"5": 1.0}),
        generate("c", return_logprob=True, top_logprobs_num=3, token_ids_logprob=[4, 5]),
        generate("d", max_new_tokens=0),
        io_struct.BatchTokenizedGenerateReqInput(batch=[generate("e"), generate("f")]),
        io_struct.AbortReq(rid="a"),
        io_struct.FlushCacheReqInput(),
        io_struct.GetInternalStateReq(),
        io_struct.ConfigureLoggingReq(),
        io_struct.FreezeGCReq(),
    )
    with closing(AttachedFrontEnd(fuzzed.deployment.admin_address, MODELS[0])) as front_end:

        def send(parts: list[bytes]) -> None:
            if not asks_to_leave(parts):
                front_end.send(*parts)

        fuzz(fuzzed, "scheduler input", valid, send, front_end.serves)


def asks_to_leave(parts: list[bytes]) -> bool:
    """Whether the scheduler would rightly forget the front end that sends this."""
    try:
        return isinstance(private.decode(parts[0]), io_struct.ShutdownReq)
    except Exception:
        return False


def test_admin(fuzzed: FrontEndServer) -> None:
    address = fuzzed.deployment.admin_address
    nobody = "ipc:///tmp/nobody-is-there"
    valid = [
        admin.encode(admin.Ask(id=1, what="status")),
        admin.encode(admin.Ask(id=2, what="pools")),
        admin.encode(
            admin.Attach(
                id=3,
                model=MODELS[0],
                scheduler_input=nobody,
                tokenizer=nobody,
                detokenizer=nobody,
            )
        ),
        admin.encode(
            admin.RankGone(id=4, device="cpu:99", incarnation=1, cause="none", final=True)
        ),
    ]
    rng = random.Random(SEED)
    with zmq.Context() as context:
        peers: list[zmq.Socket[bytes]] = []

        def send(parts: list[bytes]) -> None:
            if not peers or rng.random() < 0.01:  # identities vanish before they are answered
                if peers:
                    peers.pop().close(linger=1000)
                peers.append(context.socket(zmq.DEALER))
                peers[0].connect(address)
            try:
                gone = isinstance(admin.decode_to_scheduler(parts[0]), admin.RankGone)
                if gone and b"cpu:99" not in parts[0]:
                    return  # a device may be named by chance
            except (msgspec.DecodeError, RecursionError):
                pass
            peers[0].send_multipart(parts)

        fuzz(fuzzed, "admin", valid, send, lambda: admin.status(address).ready)
        peers.pop().close(linger=0)


@pytest.mark.parametrize("name", ["tokenizer", "detokenizer", "notices"])
def test_what_http_and_the_detokenizer_read(fuzzed: FrontEndServer, name: str) -> None:
    if name == "notices":
        address = fuzzed.deployment.notice_address
        # A loss, rightly told, would end everything.
        found = [notices.Stopped(process="nobody"), notices.Continued(process="nobody")]
        valid = [msgspec.msgpack.encode(notice) for notice in found]
    else:
        address = f"ipc://{fuzzed.deployment.runtime_dir}/m0.{name}"
        abort = io_struct.AbortReq(rid="nobody's", finished_reason={"type": "abort"})
        valid = encode_all(abort, io_struct.FreezeGCReq(), *refused_outputs())
    with zmq.Context() as context, context.socket(zmq.PUSH) as peer:
        peer.setsockopt(zmq.LINGER, 0)
        peer.connect(address)

        def send(parts: list[bytes]) -> None:
            if name == "notices":
                try:
                    if not isinstance(notices.decode(parts[0]), notices.Continued):
                        return
                except (ValueError, msgspec.DecodeError, RecursionError):
                    pass
            peer.send_multipart(parts)

        fuzz(fuzzed, name, valid, send)


def refused_outputs() -> list[io_struct.BatchTokenIDOutput]:
    """What the scheduler sends of a request that nobody waits for."""
    opened = OpenRequest.of(generate("nobody's"), 1)
    return [to_token_id_output([(opened, refusal("nobody's", 0, "refused", 400, 3))])]


def test_control(fuzzed: FrontEndServer) -> None:
    result = messages.StepResult(step=1, rows=[messages.RowResult(request=1, token=5)])
    ready = messages.Ready(version=7, device="cpu", pid=1, ranks=[], models=[], resident=[])
    valid = [
        messages.encode(result),
        messages.encode(messages.Failed(device="cpu", message="it burned")),
        messages.encode(messages.Inspected(id=1, device="cpu", report=Report())),
        messages.encode(ready),
    ]
    with zmq.Context() as context, context.socket(zmq.DEALER) as peer:
        peer.setsockopt(zmq.LINGER, 0)
        peer.setsockopt(zmq.IDENTITY, b"stranger")
        peer.connect(fuzzed.deployment.control_address)
        fuzz(fuzzed, "control", valid, peer.send_multipart)


def test_sigterm_lets_requests_end(fuzzed: FrontEndServer) -> None:
    """The last test, since it ends the HTTP process."""
    (device,) = fuzzed.devices
    device.step_seconds = 0.05
    answers: list[Any] = []
    body = {"model": MODELS[0], "prompt": "x", "max_tokens": 40}
    thread = threading.Thread(
        target=lambda: answers.append(fuzzed.request("/v1/completions", body))
    )
    thread.start()
    time.sleep(0.5)
    fuzzed.processes["http"].send_signal(signal.SIGTERM)
    time.sleep(0.2)
    assert fuzzed.request("/health")[0] == 503
    status, answer, headers = fuzzed.request("/v1/completions", body)
    assert (status, answer["error"]["code"]) == (503, 503) and "retry-after" in headers
    thread.join(30)
    assert answers[0][0] == 200 and answers[0][1]["usage"]["completion_tokens"] == 40
    assert fuzzed.processes["http"].wait(20) == 0
