"""OpenSSH's server on hosts that are network namespaces."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.namespaces import Network

SECONDS = 60.0
_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
_SEPARATED = Path("/run/sshd")
"""A folder without which sshd does not start; its package makes it when the machine starts."""


def needs_sshd() -> str:
    """Returns the path of sshd, or skips the test."""
    for program in ("sshd", "ssh", "ssh-keygen"):
        if shutil.which(program, path=_PATH) is None:
            pytest.skip(f"hosts over ssh: the program {program} (openssh-server) is missing")
    return str(shutil.which("sshd", path=_PATH))


def _new_key(file: Path) -> Path:
    words = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(file)]
    subprocess.run(words, check=True, timeout=SECONDS)
    return file


@dataclass(frozen=True)
class SSHHosts:
    """Hosts of which each runs sshd."""

    command: str
    """It takes the user of the tests from one to another, without a password."""
    servers: list[int]
    """The process of each sshd, by host."""


@contextlib.contextmanager
def ssh_hosts(bed: Network, nodes: int, folder: Path) -> Iterator[SSHHosts]:
    """Has sshd run on every host."""
    sshd = needs_sshd()
    _SEPARATED.mkdir(mode=0o755, exist_ok=True)
    host_key, user_key = _new_key(folder / "host_key"), _new_key(folder / "user_key")
    server, client = folder / "sshd_config", folder / "ssh_config"
    server.write_text(
        f"HostKey {host_key}\nAuthorizedKeysFile {user_key}.pub\nStrictModes no\nUsePAM no\n"
        "PermitRootLogin yes\nPidFile none\n"
    )
    client.write_text(
        f"IdentityFile {user_key}\nIdentitiesOnly yes\nBatchMode yes\nLogLevel ERROR\n"
        "StrictHostKeyChecking no\nUserKnownHostsFile /dev/null\n"
    )
    words = [sshd, "-D", "-e", "-f", str(server)]
    servers = [bed.start(node, words, stderr=subprocess.DEVNULL) for node in range(nodes)]
    command = ["ssh", "-F", str(client)]
    try:
        for node in range(nodes):
            _wait_for(bed.words(0, *command, bed.address(node), "true"))
        yield SSHHosts(" ".join(command), [one.pid for one in servers])
    finally:
        for one in servers:
            one.terminate()
            one.wait(SECONDS)


def _wait_for(words: list[str]) -> None:
    deadline = time.monotonic() + SECONDS
    while True:
        done = subprocess.run(words, capture_output=True, text=True, timeout=SECONDS)
        if done.returncode == 0:
            return
        assert time.monotonic() < deadline, done.stderr
        time.sleep(0.1)
