"""The runtime: a local emit beside an `asyncio.Queue` hop, and a call beside queue, responder task and future."""

import asyncio
import contextlib
import gc
import os
import subprocess
import sys
import tempfile
import tracemalloc
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import msgspec

from meshkit.logger import Logger
from meshkit.runtime import Identity, Message, Runtime, Service, handles, local, request
from meshkit.runtime.frame import Prover
from meshkit.runtime.wire import Tell, decode, encode, encode_payload
from meshkit.transports import MemoryHub, MemoryTransport
from tests.bench.harness import Compare, Fact, Measure


class Number(msgspec.Struct, frozen=True):
    value: int


TICK = local("bench:tick", Number)
DOUBLE = request("bench:double", Number, reply=Number)


class Bench(Service):
    name = "bench"

    def __init__(self, expected: int = 0) -> None:
        self.left = expected
        self.done = asyncio.Event()

    @handles(TICK)
    async def tick(self, msg: Message[Number]) -> None:
        self.left -= 1
        if not self.left:
            self.done.set()

    @handles(DOUBLE)
    async def double(self, msg: Message[Number]) -> Number:
        return Number(msg.payload.value * 2)


def runtime(name: str, service: Service, hub: MemoryHub | None = None) -> Runtime:
    return Runtime(name, [service], transport=MemoryTransport(hub) if hub else None, logger=Logger(disabled=["bench"]))


async def queue_hop(n: int) -> None:
    """Put n numbers into a bounded queue; a consumer task calls an async handler for each."""
    queue: asyncio.Queue[Number] = asyncio.Queue(1000)
    left, done = n, asyncio.Event()

    async def handler(number: Number) -> None:
        nonlocal left
        left -= 1
        if not left:
            done.set()

    async def consume() -> None:
        while True:
            await handler(await queue.get())

    consumer = asyncio.create_task(consume())
    number = Number(1)
    for _ in range(n):
        await queue.put(number)
    await done.wait()
    consumer.cancel()


async def local_emit(n: int) -> None:
    service = Bench(n)
    async with runtime("alice", service) as rt:
        emit, number = rt.emit, Number(1)
        for _ in range(n):
            await emit(TICK, number)
        await service.done.wait()


async def queue_call(n: int, callers: int) -> None:
    """Each caller puts a request and a future into a queue; a responder task handles it and sets the future."""
    queue: asyncio.Queue[tuple[Number, asyncio.Future[Number]]] = asyncio.Queue(1000)
    loop = asyncio.get_running_loop()

    async def handler(number: Number) -> Number:
        return Number(number.value * 2)

    async def respond() -> None:
        while True:
            number, future = await queue.get()
            future.set_result(await handler(number))

    async def caller(count: int) -> None:
        number = Number(1)
        for _ in range(count):
            future: asyncio.Future[Number] = loop.create_future()
            await queue.put((number, future))
            await future

    responder = asyncio.create_task(respond())
    await everybody(caller, n, callers)
    responder.cancel()


async def everybody(caller: Any, n: int, callers: int) -> None:
    callers = min(n, callers)
    async with asyncio.TaskGroup() as group:
        for _ in range(callers):
            group.create_task(caller(n // callers))


async def own_call(n: int, callers: int) -> None:
    async with runtime("alice", Bench()) as rt:
        await everybody(caller_of(rt, "alice"), n, callers)


async def hub_call(n: int, callers: int) -> None:
    hub = MemoryHub()
    async with runtime("alice", Bench(), hub) as alice, runtime("bob", Bench(), hub):
        await everybody(caller_of(alice, "bob"), n, callers)


def caller_of(rt: Runtime, to: str) -> Any:
    async def caller(count: int) -> None:
        call, number = rt.call, Number(1)
        for _ in range(count):
            await call(DOUBLE, number, to, timeout=30)

    return caller


async def bytes_of_idle_runtimes(n: int) -> float:
    runtimes = [runtime(f"node{i}", Bench()) for i in range(n)]  # the object of the user's and its logger do not count
    async with runtime("warm", Bench()):
        pass
    with traced() as allocated:
        for rt in runtimes:
            await rt.start()
        each = allocated() / n
    for rt in runtimes:
        await rt.stop()
    return each


async def bytes_of_pending_calls(n: int) -> float:
    """Allocated for each call that waits for a node that is silent; the task of its caller included."""
    hub = MemoryHub()
    async with runtime("alice", Bench(), hub) as alice, runtime("bob", Bench(), hub):
        hub.silence("bob")
        number = Number(1)
        return await bytes_of_waiting_tasks(lambda: alice.call(DOUBLE, number, "bob", timeout=3600), n)


async def bytes_of_futures(n: int) -> float:
    """Allocated for each task that waits for a future: what a pending call cannot do without."""
    loop = asyncio.get_running_loop()

    async def wait() -> None:
        await loop.create_future()

    return await bytes_of_waiting_tasks(wait, n)


async def bytes_of_waiting_tasks(wait: Callable[[], Coroutine[Any, Any, object]], n: int) -> float:
    warm = asyncio.create_task(wait())
    await asyncio.sleep(0)
    with traced() as allocated:
        tasks = {asyncio.create_task(wait()) for _ in range(n)}
        for _ in range(3):
            await asyncio.sleep(0)
        each = (allocated() - sys.getsizeof(tasks)) / n
    for task in {*tasks, warm}:
        task.cancel()
    await asyncio.wait({*tasks, warm})
    return each


@contextlib.contextmanager
def traced() -> Iterator[Callable[[], int]]:
    """Give a function that returns how many bytes have been allocated since, and not been freed."""
    gc.collect()
    tracemalloc.start()
    try:
        yield lambda: gc.collect() * 0 + tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()


def import_time(_: int) -> float:
    """Return the ms that importing the runtime takes in a fresh process that has imported its dependencies.

    Everything is there as bytecode, as it is when a package has been installed.
    """
    name = "meshkit.runtime"
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "PYTHONPYCACHEPREFIX": cache, "PYTHONDONTWRITEBYTECODE": ""}

        def python(code: str) -> str:
            run = [sys.executable, "-c", code]
            return subprocess.run(run, capture_output=True, text=True, check=True, env=environment).stdout

        needed = python(f"import sys, {name}; print(*(m for m in sys.modules if not m.startswith('meshkit')))")
        before = f"import contextlib, importlib, time\nfor m in {needed.split()}:\n"
        before += "    with contextlib.suppress(ImportError): importlib.import_module(m)\n"
        return float(python(f"{before}t = time.thread_time()\nimport {name}\nprint((time.thread_time() - t) * 1000)"))


def seal_and_open(messages: int, *, coded: bool = False) -> Any:
    """Return a round that seals and opens bundles of so many messages; if `coded`, it also encodes and decodes them."""

    def rounds(n: int) -> None:
        alice, bob = (Prover(Identity.generate(), started=0.0, max_remembered=n) for _ in "ab")
        tell = Tell("5f" * 16, "bench:tick", 1, 1e9, encode_payload(Number(1)))
        wires, to, now = [tell] * messages, bob.identity.node_id, 1e9
        bundle = encode(wires)
        for _ in range(n):
            if coded:
                decode(bob.open(alice.seal(to, encode(wires), now), now).bundle)
            else:
                bob.open(alice.seal(to, bundle, now), now)

    return rounds


def measures() -> list[Measure]:
    """Return the comparisons."""
    return [
        Compare("local emit / asyncio.Queue hop", queue_hop, local_emit, 50_000, goal=3),
        *(
            Compare(
                f"{name}, {callers:,} callers / queue + responder + future",
                lambda n, callers=callers: queue_call(n, callers),
                lambda n, callers=callers, ours=ours: ours(n, callers),
                20_000,
                goal=2,
            )
            for name, ours in (("call of its own node", own_call), ("call through the hub", hub_call))
            for callers in (1, 1000)
        ),
        Compare(
            "sealing and opening a bundle of 50 messages / of one", seal_and_open(1), seal_and_open(50), 10_000, goal=2
        ),
        Compare(
            "the same, with encoding and decoding", seal_and_open(1, coded=True), seal_and_open(50, coded=True), 5_000
        ),
        Fact("an idle runtime", lambda n: asyncio.run(bytes_of_idle_runtimes(n)), 1_000, "bytes", rounds=1),
        Fact("a pending call", lambda n: asyncio.run(bytes_of_pending_calls(n)), 100_000, "bytes", rounds=1),
        Fact(
            "... of which a task and a future", lambda n: asyncio.run(bytes_of_futures(n)), 100_000, "bytes", rounds=1
        ),
        Fact("importing the runtime, its dependencies aside", import_time, 1, "ms", goal=120),
    ]
