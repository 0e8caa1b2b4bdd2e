"""The keys that prove to the hosts of a deployment that they belong together.

A key file is JSON, of mode 0600, and the same on every host: who can read it is a part of the
deployment. It has a pair of CURVE keys (https://rfc.zeromq.org/spec/26) for the launcher of node 0,
one for all who connect to that host, and 32 bytes for the data path.
"""

from __future__ import annotations

import base64
import binascii
import os
import re
import secrets
import stat
from pathlib import Path

import msgspec
import zmq

from crosspool.config.errors import ConfigError

DATA_KEY_BYTES = 32
_FORMAT = 1
_MAX_FILE_BYTES = 1 << 16
_Z85_KEY = re.compile(r"[0-9A-Za-z.\-:+=^!/*?&<>()\[\]{}@%$#]{40}")
_DEPLOYMENT = re.compile(r"[0-9a-f]{32}")


class CurveKeys(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A pair of CURVE keys, each as Z85 text. Neither ``repr`` nor a message shows the secret."""

    public: str
    secret: str

    @classmethod
    def new(cls) -> CurveKeys:
        public, secret = zmq.curve_keypair()
        return cls(public=public.decode(), secret=secret.decode())

    def __repr__(self) -> str:
        return f"CurveKeys(public={self.public!r})"

    @property
    def is_pair(self) -> bool:
        """Whether the public key is that of the secret one."""
        return zmq.curve_public(self.secret.encode()) == self.public.encode()


class DeploymentKeys(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All keys of a deployment over several hosts. ``repr`` shows none of them."""

    format: int
    """Version of this form; see ``_FORMAT``."""
    deployment: str
    """The deployment's id: 32 hexadecimal digits. It is no secret."""
    server: CurveKeys
    """The launcher of node 0."""
    client: CurveKeys
    """Who connects to node 0."""
    data: str
    """Key of the data path: 32 bytes as base64."""

    @classmethod
    def new(cls) -> DeploymentKeys:
        return cls(
            format=_FORMAT,
            deployment=secrets.token_hex(16),
            server=CurveKeys.new(),
            client=CurveKeys.new(),
            data=base64.b64encode(secrets.token_bytes(DATA_KEY_BYTES)).decode(),
        )

    def __repr__(self) -> str:
        return f"DeploymentKeys(deployment={self.deployment!r})"

    @property
    def data_key(self) -> bytes:
        return base64.b64decode(self.data)


def write_keys(file: Path, keys: DeploymentKeys | CurveKeys) -> None:
    """Writes a new file that only its owner may read, with all of it or not at all. Raises
    ConfigError where there is one already, or where none can be written."""
    try:
        fd = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    except FileExistsError:
        raise ConfigError(
            f"{file} exists already, and is left as it is: name another file"
        ) from None
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}") from None
    try:
        with os.fdopen(fd, "wb") as out:
            out.write(msgspec.json.format(msgspec.json.encode(keys)) + b"\n")
            out.flush()
            os.fsync(out.fileno())
    except OSError as error:
        file.unlink(missing_ok=True)
        raise ConfigError(f"{file}: {error.strerror}") from None


def read_deployment_keys(file: Path) -> DeploymentKeys:
    """Raises ConfigError, which has no key, for a file that is missing, that others may read, or
    that has no keys of this form."""
    content = _private_content(file)
    try:
        keys = msgspec.json.decode(content, type=DeploymentKeys)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):  # its text may quote the file
        raise ConfigError(f"{file} has no keys as `crosspool keys new` makes them") from None
    if keys.format != _FORMAT:
        raise ConfigError(
            f"{file} has keys of form {keys.format}, and this version of CrossPool reads form "
            f"{_FORMAT}: make new ones with `crosspool keys new`"
        )
    if (wrong := _wrong_field(keys)) is not None:
        raise ConfigError(f"{file}: {wrong}: make new keys with `crosspool keys new`")
    return keys


def _private_content(file: Path) -> bytes:
    """Returns what stands in a file of this user that nobody else may read. Raises ConfigError."""
    try:
        # Without blocking: it might be a pipe.
        with os.fdopen(os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as stream:
            status = os.fstat(stream.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise ConfigError(f"{file} is no file with keys")
            mode = stat.S_IMODE(status.st_mode)
            if mode & 0o077:
                raise ConfigError(
                    f"{file} has keys, and its mode is {mode:o}, so that others may read it: "
                    f"chmod 600 {file}"
                )
            content = stream.read(_MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}") from None
    if len(content) > _MAX_FILE_BYTES:
        raise ConfigError(f"{file} has more than {_MAX_FILE_BYTES} bytes, and so no keys")
    return content


def _wrong_field(keys: DeploymentKeys) -> str | None:
    """Says which field is wrong, and not what stands in it; None if all are right."""
    if not _DEPLOYMENT.fullmatch(keys.deployment):
        return "deployment must be 32 hexadecimal digits"
    for name, pair in (("server", keys.server), ("client", keys.client)):
        if not (_Z85_KEY.fullmatch(pair.public) and _Z85_KEY.fullmatch(pair.secret)):
            return f"{name} must have two keys of 40 characters"
        if not pair.is_pair:
            return f"the public key of {name} is not that of its secret key"
    if keys.server.public == keys.client.public:
        return "server and client must have different keys"
    try:
        is_whole = len(base64.b64decode(keys.data, validate=True)) == DATA_KEY_BYTES
    except (binascii.Error, ValueError):
        is_whole = False
    return None if is_whole else f"data must be {DATA_KEY_BYTES} bytes as base64"
