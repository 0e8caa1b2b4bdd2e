"""The device's end of the control path."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq
from crosspool.transport.device_socket import DeviceSocket
from crosspool.transport.messages import (
    Failed,
    Release,
    Shutdown,
    ToDevice,
    decode_from_device,
    encode,
)


@pytest.fixture
def router(tmp_path: Path) -> Iterator[tuple[zmq.Socket[bytes], str]]:
    address = f"ipc://{tmp_path}/control"
    with zmq.Context() as context, context.socket(zmq.ROUTER) as socket:
        socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        socket.setsockopt(zmq.LINGER, 0)
        yield socket, address


def test_connects_before_the_scheduler_binds_and_keeps_the_order(
    router: tuple[zmq.Socket[bytes], str],
) -> None:
    socket, address = router
    device = DeviceSocket(address, "cpu:0-3")
    failed = Failed(device="cpu:0-3", message="no")
    device.send(failed)
    assert device.receive() is None
    socket.bind(address)
    identity, frame = socket.recv_multipart()
    assert identity == b"cpu:0-3#1"
    assert decode_from_device(frame) == failed
    sent: list[ToDevice] = [
        *(Release(model=i, requests=[i], unmap_chunks=[]) for i in range(50)),
        Shutdown(),
    ]
    for message in sent:
        socket.send_multipart([identity, encode(message)])
    received: list[ToDevice] = []
    while len(received) < len(sent):
        device.wait(10.0)
        message_or_none = device.receive()
        assert message_or_none is not None
        received.append(message_or_none)
    assert received == sent
    device.close()


def test_a_frame_that_is_no_message(router: tuple[zmq.Socket[bytes], str]) -> None:
    socket, address = router
    socket.bind(address)
    device = DeviceSocket(address, "cpu")
    device.send(Failed(device="cpu", message=""))
    identity, _ = socket.recv_multipart()
    socket.send_multipart([identity, b"\x01nonsense"])
    device.wait(10.0)
    with pytest.raises(ValueError, match="no message"):
        device.receive()
    device.close()
