"""Nodes in a network that can be parted: each in a network namespace of its own, where the machine allows it.

There, two bridges stand for two switches, and to part the nodes some of their cables are plugged into the other one:
packets vanish, and nobody is told. Else the nodes are on loopback addresses, each behind a `ChaosProxy`; to part them,
every proxy swallows all that comes, so that each node is alone.
"""

import asyncio
import functools
import os
import shutil
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, Protocol

from meshkit.testing import ChaosProxy
from tests.reliability.nodes import Process, process, until

PORT = 7001


class Network(Protocol):
    """Nodes, and what can be done to them. `parted` is how many nodes are together when they are parted."""

    what: str
    parted: int
    nodes: list[Process]

    async def part(self) -> None:
        """Part the nodes."""
        ...

    async def heal(self) -> None:
        """Let all reach all again."""
        ...


class Shell:
    """A shell in a network namespace, in which this user is root."""

    COMMAND = ("unshare", "--user", "--map-root-user", "--net", "sh")

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process

    @classmethod
    async def start(cls) -> "Shell | None":
        """Start one, if this machine allows it."""
        if not all(shutil.which(program) for program in ("unshare", "nsenter", "ip")):
            return None
        pipe, null = asyncio.subprocess.PIPE, asyncio.subprocess.DEVNULL
        shell = cls(await asyncio.create_subprocess_exec(*cls.COMMAND, stdin=pipe, stdout=pipe, stderr=null))
        try:
            done = await shell.run("ip link add west type bridge && ip link add east type bridge && unshare -n true")
        except (ConnectionError, RuntimeError):
            done = False
        if done:
            return shell
        await shell.end()
        return None

    async def run(self, command: str) -> bool:
        """Run a command; return whether it succeeded."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{command}; echo $?\n".encode())
        await self.process.stdin.drain()
        line = await self.process.stdout.readline()
        if not line:
            raise RuntimeError("the shell has ended")
        return line == b"0\n"

    async def end(self) -> None:
        """End it: its namespace goes with it."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        await self.process.wait()


class Switches:
    """Nodes in network namespaces."""

    what = "each in a network namespace of its own"

    def __init__(self, shell: Shell, count: int) -> None:
        self.parted = count // 2
        self.count = count
        self.nodes: list[Process] = []
        self._shell = shell

    async def start(self, stack: AsyncExitStack, options: dict[str, Any]) -> None:
        await self._do("ip link set west up && ip link set east up")
        pid = self._shell.process.pid
        inside = ["nsenter", f"--target={pid}", "--user", "--net", "--preserve-credentials", "unshare", "--net"]
        for number in range(self.count):
            own = f"10.77.0.{number + 1}"
            up = f'read _; ip link set lo up; ip addr add {own}/24 dev eth0; ip link set eth0 up; exec "$@"'
            join = [f"10.77.0.1:{PORT}"] if number else []
            child = await stack.enter_async_context(
                process(f"worker{number}", f"{own}:{PORT}", *inside, "sh", "-c", up, "sh", join=join, **options)
            )
            self.nodes.append(child)
            await until(functools.partial(_has_own_network, child.process.pid, pid))
            await self._do(f"ip link add v{number} type veth peer name eth0 netns {child.process.pid}")
            await self._do(f"ip link set v{number} master west up")
            assert child.process.stdin is not None
            child.process.stdin.write(b"\n")
            await child.up()

    async def _do(self, command: str) -> None:
        if not await self._shell.run(command):
            raise RuntimeError(f"this did not work: {command}")

    async def _plug(self, bridge: str) -> None:
        cables = range(self.parted, self.count)
        await self._do(" && ".join(f"ip link set v{number} master {bridge}" for number in cables))

    async def part(self) -> None:
        await self._plug("east")

    async def heal(self) -> None:
        await self._plug("west")


def _has_own_network(pid: int, other: int) -> bool:
    return os.readlink(f"/proc/{pid}/ns/net") not in {
        os.readlink(f"/proc/{other}/ns/net"), os.readlink("/proc/self/ns/net")
    }  # fmt: skip


class Proxies:
    """Nodes on loopback addresses, each behind a proxy."""

    what = "each on a loopback address, behind a proxy"
    parted = 1

    def __init__(self, count: int) -> None:
        self.count = count
        self.nodes: list[Process] = []
        self._proxies: list[ChaosProxy] = []

    async def start(self, stack: AsyncExitStack, options: dict[str, Any]) -> None:
        for number in range(self.count):
            own = f"127.0.0.{number + 1}:{PORT + number}"
            proxy = await stack.enter_async_context(ChaosProxy(own))
            self._proxies.append(proxy)
            join = ["{}:{}".format(*self._proxies[0].address)] if number else []
            advertise = "{}:{}".format(*proxy.address)
            child = process(f"worker{number}", own, join=join, advertise=advertise, **options)
            self.nodes.append(await stack.enter_async_context(child))

    async def part(self) -> None:
        for proxy in self._proxies:
            proxy.blackhole()

    async def heal(self) -> None:
        for proxy in self._proxies:
            proxy.heal()


@asynccontextmanager
async def network(count: int, **options: Any) -> AsyncGenerator[Network, None]:
    """Run so many nodes, which have been told the address of the first one."""
    async with AsyncExitStack() as stack:
        shell = await Shell.start()
        network: Switches | Proxies
        if shell is not None:
            stack.push_async_callback(shell.end)
            network = Switches(shell, count)
        else:
            network = Proxies(count)
        await network.start(stack, options)
        yield network
