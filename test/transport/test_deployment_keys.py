"""Key files: who may read them, what is refused, and that nothing shows a secret."""

from __future__ import annotations

import json
import os
import stat
import traceback
from pathlib import Path
from typing import Any

import pytest
import zmq
from crosspool.cli.main import main
from crosspool.config.errors import ConfigError
from crosspool.transport.deployment_keys import (
    CurveKeys,
    DeploymentKeys,
    read_deployment_keys,
    write_keys,
)


def secrets_of(keys: DeploymentKeys) -> list[str]:
    return [keys.server.secret, keys.client.secret, keys.data]


def changed(folder: Path, **fields: Any) -> Path:
    """A file with new keys, of which some fields are others."""
    file = folder / "keys"
    write_keys(file, DeploymentKeys.new())
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))
    return file


def test_a_new_file_is_private_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        assert main(["keys", "new", "--out", str(tmp_path / "keys")]) == 0
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "keys").stat().st_mode) == 0o600


def test_what_is_written_is_read(tmp_path: Path) -> None:
    keys = DeploymentKeys.new()
    write_keys(tmp_path / "keys", keys)
    assert read_deployment_keys(tmp_path / "keys") == keys
    assert len(keys.data_key) == 32
    for pair in (keys.server, keys.client):
        assert zmq.curve_public(pair.secret.encode()).decode() == pair.public
    other = DeploymentKeys.new()
    assert not set(secrets_of(keys)) & set(secrets_of(other))
    assert keys.deployment != other.deployment


def test_a_file_that_exists_stays_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "keys"
    file.write_text("mine")
    assert main(["keys", "new", "--out", str(file)]) == 2
    assert f"{file} exists already" in capsys.readouterr().err
    assert file.read_text() == "mine"
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "nowhere")
    assert main(["keys", "new", "--out", str(link)]) == 2
    assert not (tmp_path / "nowhere").exists()


def test_a_folder_that_is_not_there_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["keys", "new", "--out", str(tmp_path / "no" / "keys")]) == 2
    assert "No such file or directory" in capsys.readouterr().err


def test_nothing_shows_a_secret(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["keys", "new", "--out", str(tmp_path / "keys")]) == 0
    keys = read_deployment_keys(tmp_path / "keys")
    said = capsys.readouterr()
    shown = [said.out, said.err, repr(keys), str(keys), f"{keys.client!r} {keys.server}"]
    assert keys.deployment in said.out
    assert not [one for one in shown for secret in secrets_of(keys) if secret in one]


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o644, 0o610])
def test_a_file_that_others_may_read_is_refused(tmp_path: Path, mode: int) -> None:
    write_keys(tmp_path / "keys", DeploymentKeys.new())
    (tmp_path / "keys").chmod(mode)
    with pytest.raises(ConfigError, match=f"its mode is {mode:o}.*chmod 600"):
        read_deployment_keys(tmp_path / "keys")


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"format": 2}, "keys of form 2"),
        ({"deployment": "x" * 32}, "deployment must be 32 hexadecimal digits"),
        ({"data": "AAAA"}, "data must be 32 bytes"),
        ({"data": "no base64!"}, "data must be 32 bytes"),
        ({"server": {"public": "a", "secret": "b"}}, "server must have two keys"),
        ({"client": {"public": "a" * 40}}, "has no keys as"),
        ({"further": 1}, "has no keys as"),
        ({"format": "1"}, "has no keys as"),
    ],
)
def test_a_wrong_field_is_named_and_its_value_is_not(
    tmp_path: Path, fields: dict[str, Any], problem: str
) -> None:
    file = changed(tmp_path, **fields)
    content = json.loads(file.read_text())
    with pytest.raises(ConfigError, match=problem) as error:
        read_deployment_keys(file)
    said = "".join(traceback.format_exception(error.value, chain=False))
    assert content["data"] not in said or content["data"] == "AAAA"


def test_keys_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    one, other = CurveKeys.new(), CurveKeys.new()
    mixed = {"public": one.public, "secret": other.secret}
    with pytest.raises(ConfigError, match="the public key of client is not that of its secret"):
        read_deployment_keys(changed(tmp_path, client=mixed))


def test_both_ends_need_keys_of_their_own(tmp_path: Path) -> None:
    pair = CurveKeys.new()
    both = {"public": pair.public, "secret": pair.secret}
    with pytest.raises(ConfigError, match="different keys"):
        read_deployment_keys(changed(tmp_path, server=both, client=both))


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[" * 100_000, b"{}", b"x" * 70_000])
def test_what_is_no_key_file_is_refused(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "keys"
    file.write_bytes(content)
    file.chmod(0o600)
    with pytest.raises(ConfigError, match="no keys"):
        read_deployment_keys(file)


def test_a_pipe_and_a_folder_are_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe", 0o600)
    for name in ("pipe", "."):
        with pytest.raises(ConfigError, match=r"is no file with keys|Is a directory"):
            read_deployment_keys(tmp_path / name)
    with pytest.raises(ConfigError, match="No such file"):
        read_deployment_keys(tmp_path / "nowhere")
