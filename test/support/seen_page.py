"""Addresses at which a browser finds a server: one that is the admin's, and one of an application
in this process."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import uvicorn


@contextlib.contextmanager
def as_admin(admin_socket: Path) -> Iterator[str]:
    """A URL whose requests reach a server over its admin socket."""

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(1 << 16):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inner_reader, inner_writer = await asyncio.open_unix_connection(str(admin_socket))
        await asyncio.gather(pump(reader, inner_writer), pump(inner_reader, writer))

    async def forward(listener: socket.socket) -> None:
        server = await asyncio.start_server(connect, sock=listener)
        while not ending.is_set():
            await asyncio.sleep(0.05)
        server.close()

    ending = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        work = forward(listener)
        thread = threading.Thread(target=asyncio.run, args=(work,), daemon=True)
        thread.start()
        yield url
        ending.set()
        thread.join(30)


@contextlib.contextmanager
def served(app: Any) -> Iterator[str]:
    """The URL at which an application is served by a thread of this process."""
    config = uvicorn.Config(app, lifespan="off", log_config=None, ws="none")
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        yield url
        server.should_exit = True
        thread.join(30)
