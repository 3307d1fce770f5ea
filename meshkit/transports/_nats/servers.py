"""The addresses of NATS servers, and in which order they are tried. No sockets here."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Self
from urllib.parse import unquote, urlsplit

__all__ = ["Server", "Servers"]

_DEFAULT_PORT = 4222
_MAX_DISCOVERED = 100  # servers of a cluster that are remembered


@dataclass(frozen=True, slots=True)
class Server:
    """Where a server is, and how to get in. Its text does not show what is secret."""

    host: str
    port: int
    tls: bool = False
    user: str | None = field(default=None, repr=False)
    password: str | None = field(default=None, repr=False)
    token: str | None = field(default=None, repr=False)
    certified: str = ""
    """The name that its certificate must have, if that is not its host."""

    @classmethod
    def parse(cls, url: object) -> Self:
        """Return the server of "nats://host:port", "tls://user:password@host", "nats://token@host" or "host:port".

        Raises:
            ValueError: It is no such text. The message does not repeat it, since it may hold a password.
        """
        if isinstance(url, str) and url.isprintable() and " " not in url:
            try:
                parts = urlsplit(url if "://" in url else f"nats://{url}")
                host, port = parts.hostname, parts.port
            except ValueError:
                host = port = None
            else:
                there = parts.path in {"", "/"} and not parts.query and not parts.fragment
                if host and port != 0 and there and parts.scheme in {"nats", "tls"}:
                    user, password = (text and unquote(text) for text in (parts.username, parts.password))
                    token, user = (None, user) if password else (user, None)
                    return cls(host, port or _DEFAULT_PORT, parts.scheme == "tls", user, password, token or None)
        shown = f", not {url!r:.200}" if not isinstance(url, str) or "@" not in url else ""
        raise ValueError(f'a server must be a URL such as "nats://127.0.0.1:4222" or "tls://user:password@host"{shown}')

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def url(self) -> str:
        """The URL, without what is secret."""
        return f"{'tls' if self.tls else 'nats'}://{self}"

    def other(self, host: str, port: int) -> "Server":
        """Return a server of the same cluster: the same credentials, and a certificate for the same name, will do."""
        return replace(self, host=host, port=port, certified=self.certified or self.host)


class Servers:
    """The core: the servers that were given, and those that the one in use told of, which change as a cluster does."""

    def __init__(self, given: Sequence[Server]) -> None:
        self._given = list(given)
        self._discovered: list[Server] = []
        self._lost: Server | None = None

    def discovered(self, servers: Iterable[Server]) -> None:
        """Take note of the other servers of the cluster. They replace those that another server told of before."""
        known = {(server.host, server.port) for server in self._given}
        fresh = {(server.host, server.port): server for server in servers}
        others = [server for at, server in fresh.items() if at not in known][:_MAX_DISCOVERED]
        self._discovered = others or self._discovered  # one that knows no other is cut off from them

    def lost(self, server: Server) -> None:
        """Take note that a server was lost: it is tried last."""
        self._lost = server

    def in_order(self) -> list[Server]:
        """Return all servers in the order in which they are to be tried."""
        return sorted([*self._given, *self._discovered], key=lambda server: server == self._lost)
