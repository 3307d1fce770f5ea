"""Who dials whom: each address that a node has been given, or has learnt, is dialled for ever, while it is of use."""

import asyncio
import logging
import random
import socket
import ssl
from collections.abc import Sequence
from ipaddress import ip_address
from typing import Protocol

import anyio

from meshkit import _time
from meshkit.retrier import Backoff
from meshkit.transports._tcp.limits import TcpLimits
from meshkit.transports._tcp.link import Link
from meshkit.transports._tcp.wire import Address, Refusal

__all__ = ["Dialler"]

_log = logging.getLogger("meshkit.transports.tcp")


class Owner(Protocol):
    """The transport, as the dialler sees it."""

    limits: TcpLimits
    client_ssl: ssl.SSLContext | None
    links: dict[str, Link]

    def outgoing(self) -> Link:
        """Return the protocol of a new connection."""
        ...


class _Target:
    """An address that is dialled, and what is known of it."""

    def __init__(self, address: Address, *, joins: bool, node: str = "") -> None:
        self.address = address
        self.joins = joins  # whether it was given, and not learnt
        self.node = node  # who was there last, or is said to be there
        self.trouble = ""  # why there is no connection
        self.logged = "" if joins else "unreachable"  # the last kind of trouble that was told; who was lost is told
        self.challenge = b""  # of the attempt under way
        self.place: tuple[str, int] | None = None  # that was dialled last, of those that a name stands for
        self.itself: tuple[str, int] | None = None  # where the last attempt has met this very node
        self.met_itself = False  # at any time
        self.attempts = 0
        self.task: asyncio.Task[None] | None = None


class Dialler:
    """Keeps one node connected. Delays between attempts double from `FIRST_DELAY` to `LAST_DELAY` seconds, jittered."""

    FIRST_DELAY = 0.1
    LAST_DELAY = 5.0
    HEAD_START = 0.3
    """Seconds that the node with the smaller id has to dial the other one: it decides about the connection anyway."""

    def __init__(self, owner: Owner, node: str, name: str) -> None:
        self._owner = owner
        self._node = node
        self._name = name
        self._loop = asyncio.get_running_loop()
        self._targets: dict[Address, _Target] = {}
        self._backoff = Backoff(base_delay=self.FIRST_DELAY, max_delay=self.LAST_DELAY, jitter=True)

    def join(self, addresses: Sequence[Address]) -> None:
        """Dial these addresses, whoever is there."""
        for address in addresses:
            self._begin(_Target(address, joins=True))

    def _begin(self, target: _Target) -> None:
        self._targets[target.address] = target
        target.task = self._loop.create_task(self._keep(target), name=f"meshkit:{self._name}:tcp:dial {target.address}")

    async def close(self) -> None:
        """End all attempts."""
        tasks = [target.task for target in self._targets.values() if target.task is not None]
        self._targets.clear()
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    # --- what is known

    def know(self, node: str, address: Address, *, surely: bool = False) -> None:
        """Dial this address while there is no connection to `node`, which is said (`surely`: by itself) to be there.

        What others say may not be true: it changes nothing about an address that is known, and drives none out.
        """
        target = self._targets.get(address)
        if target is not None:
            if not target.node or (surely and target.node not in self._owner.links):
                target.node = node
        elif len(self._targets) < self._owner.limits.max_peers or (surely and self._forget_one()):
            self._begin(_Target(address, joins=False, node=node))

    def met(self, node: str, address: Address | None) -> None:
        """Take note that there is a connection to `node`, which says itself where it listens (None: nowhere)."""
        for target in list(self._targets.values()):
            if target.node == node:
                if not target.joins and target.address != address:
                    self._forget(target)
                target.trouble, target.logged = "", "unreachable"
        if address is not None:
            self.know(node, address, surely=True)

    def _forget_one(self) -> bool:
        """Make room by forgetting an address that is of no use now; return whether there was one."""
        for target in self._targets.values():
            if not target.joins and target.node not in self._owner.links:
                self._forget(target)
                return True
        return False

    def _forget(self, target: _Target) -> None:
        del self._targets[target.address]
        if target.task is not None:
            target.task.cancel()

    def is_own(self, challenge: bytes) -> bool:
        """Return whether the connection with this challenge was made by this very node.

        It goes on dialling that address: a name may stand for all nodes of a mesh, and whoever is there for a moment
        may hand over what this node says.
        """
        for target in self._targets.values():
            if target.challenge == challenge:
                if target.joins and not target.met_itself:
                    _log.info("the join address %s leads to this node itself", target.address)
                target.itself, target.met_itself = target.place, True
                return True
        return False

    def trouble(self, node: str) -> str:
        """Return why there is no connection to `node`, as far as that is known."""
        known = (f"{t.address}: {t.trouble}" for t in self._targets.values() if t.node == node and t.trouble)
        return next(known, "there is no connection to it")

    # --- one address

    async def _keep(self, target: _Target) -> None:
        failures = 0
        if not target.joins and target.node < self._node:
            await asyncio.sleep(self.HEAD_START * (1 + random.random()))
        while True:
            link = self._owner.links.get(target.node)
            if link is not None:
                await link.gone.wait()
                if _time.now() - link.began >= self.LAST_DELAY:  # else it may well be lost again at once
                    failures = 0
            else:
                await self._dial(target)
                if target.node in self._owner.links:
                    continue
            failures += 1
            await asyncio.sleep(self._backoff.delay(failures, random.random))

    async def _dial(self, target: _Target) -> None:
        limits, link = self._owner.limits, self._owner.outgoing()
        target.challenge = link.handshake.challenge
        trouble = f"no answer within {limits.handshake_timeout:g} s"
        try:
            with anyio.move_on_after(limits.handshake_timeout):
                await self._connect(target, link)
                await link.settled.wait()
                trouble = link.reason
        except (OSError, ValueError) as error:  # the latter for a host name that is none
            trouble = "nobody listens there" if isinstance(error, ConnectionRefusedError) else str(error)
        finally:
            target.challenge = b""
            if not link.opened:
                link.drop("it took too long")
        target.node = link.peer or target.node
        target.trouble = trouble
        if trouble and link.refusal is not Refusal.DUPLICATE and target.node not in self._owner.links:
            self._complain(target, link)

    async def _connect(self, target: _Target, link: Link) -> None:
        """Connect to the first of the addresses of a target where somebody listens."""
        tls, limits = self._owner.client_ssl, self._owner.limits
        places = await self._places(target)
        for host, port in places:
            target.place = host, port
            try:
                await self._loop.create_connection(
                    lambda: link,
                    host,
                    port,
                    ssl=tls,
                    server_hostname=None if tls is None else target.address.host,
                    ssl_handshake_timeout=None if tls is None else limits.handshake_timeout,
                )
                break
            except OSError:
                if link.ended or (host, port) == places[-1]:
                    raise

    async def _places(self, target: _Target) -> list[tuple[str, int]]:
        """Return the addresses that a name stands for. Each attempt begins with another one: the first may be dead."""
        itself, target.itself = target.itself, None
        try:
            ip_address(target.address.host.partition("%")[0])
            return [target.address]
        except ValueError:
            found = await self._loop.getaddrinfo(*target.address, type=socket.SOCK_STREAM)
        places = list(dict.fromkeys((str(where[0]), int(where[1])) for *_, where in found))
        if not places:
            raise OSError("the name stands for no address")
        first = target.attempts % len(places)
        target.attempts += 1
        return sorted(places[first:] + places[:first], key=lambda place: place == itself)  # where it met itself, last

    def _complain(self, target: _Target, link: Link) -> None:
        """Say once what the trouble is, and not each time."""
        kind = link.reason if link.refusal is not None or link.rejected else "unreachable"
        if kind != target.logged and target.itself is None:
            target.logged = kind
            _log.warning("%s cannot be joined, and is tried again and again: %s", target.address, target.trouble)
