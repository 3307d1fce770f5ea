"""How a node gets connected to one of its servers, and connected again. It logs one line at the end of each."""

import logging
import math
import random
from collections.abc import Awaitable, Callable

import anyio

from meshkit import _time
from meshkit.retrier import Backoff
from meshkit.transports._nats.link import Link, Unfit
from meshkit.transports._nats.servers import Server, Servers

__all__ = ["Connector"]

_log = logging.getLogger("meshkit.transports.nats")


class Connector:
    """Connects to one server after the other, until one lets this node in.

    `connect(server)` returns a connection or raises `OSError`. Delays between two rounds double, and are jittered: all
    nodes of a mesh lose a server at the same moment.
    """

    FIRST_DELAY, LAST_DELAY = 0.1, 2.0
    """Seconds before a round; the latter, at most."""
    STABLE = 1.0
    """Seconds that a connection must have lasted for its loss to be worth a line in the log, and a quick attempt."""

    def __init__(self, servers: Servers, connect: Callable[[Server], Awaitable[Link]]) -> None:
        self.trouble = "this node is not connected to a NATS server"
        self._servers = servers
        self._connect = connect
        self._backoff = Backoff(base_delay=self.FIRST_DELAY, max_delay=self.LAST_DELAY, jitter=True)
        self._failures = 0  # to connect, or to stay connected for a while, in a row
        self._began = 0.0  # when the present connection was made
        self._outage = math.nan  # when the last one was lost, if a line was logged about that

    async def first(self) -> Link:
        """Connect; each server is tried once. Raise what they say, if none lets this node in."""
        errors: list[OSError] = []
        for server in self._servers.in_order():
            try:
                return self._connected(await self._connect(server))
            except OSError as error:
                errors.append(error)
        if len(errors) == 1:
            raise errors[0]
        denied = all(isinstance(error, PermissionError) for error in errors)
        raise (PermissionError if denied else ConnectionError)("; ".join(map(str, errors)))

    def lost(self, link: Link) -> None:
        """Take note that a connection is lost; what it told of the cluster is remembered."""
        self._servers.discovered(link.cluster)
        self._servers.lost(link.server)
        now = _time.now()
        self.trouble = f"the connection to the NATS server {link.server} is lost ({link.ended.result()})"
        if now - self._began >= self.STABLE:
            self._failures = 0
        if not self._failures:
            self._outage = now
            _log.warning("%s; this node tries to connect again", self.trouble)
        self._failures += 1

    async def again(self) -> Link:
        """Connect again, however long it takes."""
        told = False
        while True:
            await anyio.sleep(self._backoff.delay(self._failures, random.random))
            for server in self._servers.in_order():
                try:
                    return self._connected(await self._connect(server))
                except OSError as error:
                    self.trouble = str(error)
                    if isinstance(error, PermissionError | Unfit) and not told:  # this does not heal by itself
                        told = True
                        _log.warning("%s; this node goes on trying", self.trouble)
            self._failures += 1

    def _connected(self, link: Link) -> Link:
        self._began, self.trouble = _time.now(), ""
        if not math.isnan(self._outage):
            _log.info("connected to the NATS server %s after %.1f s", link.server, self._began - self._outage)
            self._outage = math.nan
        return link
