"""The two sockets at which clients reach the HTTP process.

The launcher binds them and holds them for as long as it lives. A connection that comes while one
HTTP process is dead and the next not there yet waits in the socket; none is refused.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass

from crosspool.config.deployment import ConfigError, Deployment


@dataclass(frozen=True)
class Listeners:
    """Sockets that are bound, and refuse connections until somebody has listened at them."""

    public: socket.socket
    """The one at the deployment's host and port."""
    admin: socket.socket
    """A Unix socket that only the user of the server can reach."""

    @classmethod
    def bind(cls, deployment: Deployment) -> Listeners:
        """Raises ConfigError when the address is taken or not this machine's."""
        host, port = deployment.host, deployment.port
        public = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        public.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if public.family == socket.AF_INET6:
            public.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        try:
            public.bind((host, port))
        except OSError as error:
            public.close()
            raise ConfigError(f"port: cannot listen on {host}:{port}: {error.strerror}") from error
        admin = socket.socket(socket.AF_UNIX)
        admin.bind(str(deployment.admin_socket))
        os.chmod(deployment.admin_socket, 0o600)
        return cls(public, admin)

    @classmethod
    def inherited(cls, fds: Sequence[int]) -> Listeners:
        """The sockets with these descriptors, which the parent had from :attr:`fds`."""
        public, admin = (socket.socket(fileno=fd) for fd in fds)
        return cls(public, admin)

    @property
    def fds(self) -> list[int]:
        return [self.public.fileno(), self.admin.fileno()]

    def refuse(self) -> None:
        """Has connections refused from now on, although other processes hold the sockets, too."""
        for listener in (self.public, self.admin):
            listener.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.public.close()
        self.admin.close()
