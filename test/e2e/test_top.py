"""`crosspool top` against a real server: one frame for scripts, and in a pseudo-terminal."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator

import pytest
from support.server import TINY_MODELS, Server, free_port

MODEL = TINY_MODELS[0]


def generate(server: Server) -> None:
    body = {"model": MODEL, "prompt": "x", "max_tokens": 4, "ignore_eos": True}
    assert server.post("/v1/completions", body)[0] == 200


def test_one_frame_has_all_models_and_what_their_requests_took(server: Server) -> None:
    generate(server)
    shown = server.command("top", "--once")
    assert (shown.returncode, shown.stderr) == (0, "")
    lines = shown.stdout.splitlines()
    assert "TTFT -" not in lines[2] and "since the start" in lines[2]
    (line,) = [line for line in lines if MODEL in line]
    assert line.count("ms") + line.count("s ") >= 4 and "resident" in line


def test_without_a_terminal_or_a_server_it_says_so(server: Server) -> None:
    for words, text in (
        ((), "give --once"),
        (("--once", "--url", f"http://127.0.0.1:{free_port()}"), "does not answer"),
        (("--once", "--url", "nowhere"), "is no address"),
    ):
        told = server.command("top", *words)
        assert told.returncode == 2
        (line,) = told.stderr.splitlines()
        assert text in line


class Terminal:
    """A process of `crosspool top` on a terminal of 80 x 24."""

    def __init__(self, server: Server) -> None:
        self._master, self.slave = pty.openpty()
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        self.before = termios.tcgetattr(self.slave)
        command = [sys.executable, "-m", "crosspool.cli.main", "top"]
        environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")}
        self.process = subprocess.Popen(
            [*command, "--port", str(server.port), "--every", "0.3", "--sort", "name"],
            stdin=self.slave,
            stdout=self.slave,
            stderr=self.slave,
            env={**environment, "TERM": "xterm-256color"},
            start_new_session=True,
        )

    def wait_for(self, text: str, timeout: float = 60.0) -> None:
        seen = b""
        deadline = time.monotonic() + timeout
        while text.encode() not in seen:
            assert time.monotonic() < deadline, seen.decode(errors="replace")
            if select.select([self._master], [], [], 0.2)[0]:
                seen += os.read(self._master, 65536)

    def press(self, keys: bytes) -> None:
        os.write(self._master, keys)

    def end(self) -> int:
        """Its exit status, once it has ended by itself."""
        deadline = time.monotonic() + 30
        while self.process.poll() is None and time.monotonic() < deadline:
            if select.select([self._master], [], [], 0.1)[0]:
                os.read(self._master, 65536)
        return self.process.wait(1)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        for fd in (self._master, self.slave):
            os.close(fd)


@pytest.fixture
def terminal(server: Server) -> Iterator[Terminal]:
    made = Terminal(server)
    with contextlib.closing(made):
        yield made


def keep_of(server: Server, name: str) -> str:
    (found,) = [m["keep"] for m in server.get("/crosspool/models") if m["name"] == name]
    return str(found)


def test_keys_choose_pin_and_quit(server: Server, terminal: Terminal) -> None:
    before, name = keep_of(server, sorted(TINY_MODELS)[1]), sorted(TINY_MODELS)[1]
    other = "demand" if before == "pinned" else "pinned"
    terminal.wait_for("q quit")
    terminal.press(b"z")
    terminal.wait_for("choose a model first")
    terminal.press(b"\x1b[B\x1b[B")
    terminal.wait_for("▸")
    for keep in (other, before):
        terminal.press(b"p")
        terminal.wait_for(f"keep is {keep}")
        assert keep_of(server, name) == keep
    generate(server)
    terminal.wait_for("last ")
    terminal.press(b"q")
    assert terminal.end() == 0
    after = termios.tcgetattr(terminal.slave)
    assert after == terminal.before
