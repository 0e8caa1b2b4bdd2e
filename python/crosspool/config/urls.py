"""URLs of servers, as a user gives them."""

from __future__ import annotations

from urllib.parse import urlsplit

from crosspool.config.errors import ConfigError


def base_url(name: str, given: str) -> str:
    """Returns a server's URL without a slash at its end, so that paths can follow it.

    Raises ConfigError that names the field ``name`` where ``given`` is none. A user or a password
    in it is refused without being told again."""
    try:
        parts = urlsplit(given)
        has_address = bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number, or brackets that do not match
        raise ConfigError(f"{name}: {given!r} is no URL like http://HOST:PORT") from None
    if parts.username is not None:
        raise ConfigError(f"{name}: a URL with a user or a password is not taken; keys go apart")
    if parts.scheme not in ("http", "https") or not has_address or parts.query or parts.fragment:
        raise ConfigError(f"{name}: {given!r} is no URL like http://HOST:PORT")
    return given.rstrip("/")


def url_of(host: str, port: int) -> str:
    """Returns the URL of a server that listens on ``port`` of the address ``host``."""
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"
