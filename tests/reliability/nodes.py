"""The nodes of the scenarios: a service that works and counts, and processes that run it."""

import asyncio
import json
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import anyio

from meshkit import Event, Identity, Logger, Message, Runtime, Service, TcpLimits, TcpTransport, handles, request

PATIENCE = 60.0  # seconds after which a scenario gives up to wait
ROOT = Path(__file__).parents[2]
NAMES = ["caller", *(f"caller{n}" for n in range(5)), *(f"worker{n}" for n in range(6))]

SLEEP = request("work:sleep", float, reply=float)
DO = request("work:do", int, reply=int)
DONE = request("work:done", int, reply=dict[int, tuple[int, int]])  # from this number on: how often begun, and done


def identity(name: str) -> Identity:
    """Return the identity that the node of this name always has."""
    return Identity.from_seed(name.encode().ljust(32, b"."))


TRUST = frozenset(identity(name).node_id for name in NAMES)


class Work(Service):
    """Does tasks, which are numbers; counts how often each was begun (those aside that were cancelled), and done."""

    name = "work"

    def __init__(self) -> None:
        self.begun: Counter[int] = Counter()
        self.done: Counter[int] = Counter()

    @handles(SLEEP)
    async def sleep(self, msg: Message[float]) -> float:
        await anyio.sleep(msg.payload)
        return msg.payload

    @handles(DO)
    async def do(self, msg: Message[int]) -> int:
        self.begun[msg.payload] += 1
        try:
            await anyio.sleep(0.002)
        except asyncio.CancelledError:  # its caller has given up
            self.begun[msg.payload] -= 1
            raise
        self.done[msg.payload] += 1
        return msg.payload

    @handles(DONE)
    async def count(self, msg: Message[int]) -> dict[int, tuple[int, int]]:
        return {task: (times, self.done[task]) for task, times in self.begun.items() if task >= msg.payload}


def node(
    name: str,
    listen: str | None,
    *,
    join: list[str] | None = None,
    advertise: str | None = None,
    limits: dict[str, Any] | None = None,
    works: bool = True,
    observer: Callable[[Event], None] | None = None,
    **options: Any,
) -> Runtime:
    """Return a node, with a `Work` if it `works`, over TCP."""
    transport = TcpTransport(listen, join=join or [], advertise=advertise, limits=TcpLimits(**(limits or {})))
    return Runtime(
        name,
        [Work()] if works else [],
        transport=transport,
        identity=identity(name),
        trust=TRUST,
        logger=Logger(node=name, disabled=["runtime", "work"]),
        observer=observer,
        **options,
    )


def address(rt: Runtime) -> str:
    """Return where a node listens."""
    transport = rt._transport
    assert isinstance(transport, TcpTransport)
    assert transport.address is not None
    return transport.address


async def until(condition: Callable[[], object], *, patience: float = PATIENCE) -> float:
    """Wait until `condition` holds; return the seconds that this took."""
    started = time.monotonic()
    with anyio.fail_after(patience):
        while not condition():
            await asyncio.sleep(0.002)
    return time.monotonic() - started


async def meet(rt: Runtime, *names: str) -> float:
    """Wait until a node knows what these others handle; return the seconds that this took."""
    wanted = {identity(name).node_id for name in names}
    return await until(lambda: wanted <= {node for node, peer in rt.peers.items() if peer.kinds})


class Process:
    """A process that runs a node: see `worker`, which says what it prints and takes."""

    def __init__(self, name: str, process: asyncio.subprocess.Process) -> None:
        self.name = name
        self.node = identity(name).node_id
        self.process = process
        self.address = ""
        self.peers = 0
        self.answers: list[int] = []  # how many nodes answered, each time that it was told to ask
        self._guards: list[asyncio.subprocess.Process] = []
        self._reading = asyncio.create_task(self._read())

    async def _read(self) -> None:
        assert self.process.stdout is not None
        async for line in self.process.stdout:
            match line.decode().split():
                case ["listens", address]:
                    self.address = address
                case ["peers", count]:
                    self.peers = int(count)
                case ["answers", count]:
                    self.answers.append(int(count))
                case _:  # half a line, of one that was killed
                    pass

    async def up(self) -> None:
        """Wait until it listens, or has ended."""
        await until(lambda: self.address or self.process.returncode is not None)

    async def ask(self) -> int:
        """Let it ask all nodes that it knows, itself, too; return how many have answered."""
        assert self.process.stdin is not None
        self.process.stdin.write(b"ask\n")
        before = len(self.answers)
        await until(lambda: len(self.answers) > before)
        return self.answers[-1]

    def memory(self, what: Literal["VmRSS", "VmHWM"]) -> int | None:
        """Return the bytes of memory that it has, or the most that it ever had; None where the system does not tell."""
        with suppress(OSError, StopIteration):
            status = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
            return 1024 * next(int(line.split()[1]) for line in status if line.startswith(what))
        return None

    def signal(self, number: int) -> None:
        """Send it a signal."""
        self.process.send_signal(number)

    async def freeze(self) -> None:
        """Stop it (SIGSTOP). Stopped, it does not notice the end of its input: a shell does, and kills it."""
        kill = 'read _; kill -KILL "$0"'
        pid = str(self.process.pid)
        self._guards.append(await asyncio.create_subprocess_exec("sh", "-c", kill, pid, stdin=asyncio.subprocess.PIPE))
        self.signal(signal.SIGSTOP)

    async def end(self) -> None:
        """Kill it, if it has not ended."""
        for guard in self._guards:
            with suppress(ProcessLookupError), anyio.CancelScope(shield=True):  # Ctrl-C may have ended it
                guard.kill()
                await guard.wait()
        if self.process.returncode is None:
            with suppress(ProcessLookupError):
                os.kill(self.process.pid, signal.SIGKILL)  # not Popen.kill(): it may reap, and asyncio then complains
        with anyio.CancelScope(shield=True):
            await self.process.wait()
            await self._reading


@asynccontextmanager
async def process(name: str, listen: str, *before: str, **options: Any) -> AsyncGenerator[Process, None]:
    """Run a node in a process of its own, and end it; `options` are those of `node`. `before` starts the command."""
    command = [*before, sys.executable, "-m", "tests.reliability.worker", name, listen, json.dumps(options)]
    pipe = asyncio.subprocess.PIPE
    child = Process(name, await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe, cwd=ROOT))
    try:
        if not before:
            await child.up()
        yield child
    finally:
        await child.end()
