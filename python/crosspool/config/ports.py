"""Ports on which a server is to listen."""

from __future__ import annotations

import socket

from crosspool.config.errors import ConfigError


def probe(host: str, port: int) -> int:
    """Returns ``port`` if nothing listens there, or any free port for 0; else raises OSError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        trial.bind((host, port))
        return int(trial.getsockname()[1])


def free_port(host: str, port: int) -> int:
    """Returns what :func:`probe` does; raises ConfigError where that raises OSError."""
    try:
        return probe(host, port)
    except OSError as error:
        raise ConfigError(
            f"port {port} on {host}: {error.strerror}; choose another --port or --host"
        ) from None
