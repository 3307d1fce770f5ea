"""Calls over TCP beside those of other libraries: 100 in flight, 128 bytes each way, everything on one machine.

Client and server share one process, and one event loop where the library has one; `pyzmq` and `grpcio` have threads of
their own beside it, and NATS a server, so that wall time is what is compared. Ours is sealed and authenticated, theirs
are plaintext. A library that is not installed is left out.
"""

import asyncio
import importlib
import importlib.util
import statistics
from collections.abc import Callable
from typing import Any

from tests.bench.bench_nats import bare_request
from tests.bench.bench_tcp import bare_call, tcp
from tests.bench.harness import Fact, Measure
from tests.bench.mesh import NewLoop, Work, everybody, microseconds, sealed_call, seconds
from tests.transports.nats_servers import any_url, binary

IN_FLIGHT = 100
SIZE = 128


async def zmq_call(n: int) -> None:
    """A DEALER asks a ROUTER; a task at each end reads, and the client keeps a future for each request."""
    zmq: Any = importlib.import_module("zmq")
    context = importlib.import_module("zmq.asyncio").Context()
    server, client = context.socket(zmq.ROUTER), context.socket(zmq.DEALER)
    port = server.bind_to_random_port("tcp://127.0.0.1")
    client.connect(f"tcp://127.0.0.1:{port}")
    waiting: dict[bytes, asyncio.Future[bytes]] = {}
    number, body = 0, bytes(SIZE)

    async def serve() -> None:
        while True:
            await server.send_multipart(await server.recv_multipart())

    async def read() -> None:
        while True:
            key, answer = await client.recv_multipart()
            waiting.pop(key).set_result(answer)

    async def call() -> None:
        nonlocal number
        number += 1
        key = number.to_bytes(8)
        waiting[key] = asyncio.get_running_loop().create_future()
        future = waiting[key]
        await client.send_multipart([key, body])
        await future

    tasks = [asyncio.create_task(serve()), asyncio.create_task(read())]
    await everybody(call, n, IN_FLIGHT)
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    server.close(0)
    client.close(0)
    context.term()


async def grpc_call(n: int) -> None:
    """A unary call of a generic handler of `grpc.aio`, bytes in and bytes out, over one insecure channel."""
    grpc: Any = importlib.import_module("grpc")
    grpc_aio: Any = importlib.import_module("grpc.aio")

    async def echo(request: bytes, context: Any) -> bytes:
        return request

    handlers = {"echo": grpc.unary_unary_rpc_method_handler(echo)}
    server = grpc_aio.server()
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bench", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    body = bytes(SIZE)
    async with grpc_aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        method = channel.unary_unary("/bench/echo")

        async def call() -> None:
            await method(body, timeout=60)

        await everybody(call, n, IN_FLIGHT)
    await server.stop(0)


async def nats_call(n: int) -> None:
    """A request of nats-py over a real server, which is a process of its own."""
    await bare_request(IN_FLIGHT, SIZE)(n)


PEERS: dict[str, tuple[str, Work]] = {
    "pyzmq": ("zmq", zmq_call),
    "grpc.aio": ("grpc", grpc_call),
    "nats-py": ("nats", nats_call),
}


def ratio(ours: Work, theirs: Work, new_loop: NewLoop = None) -> Callable[[int], float]:
    """Return a measure of how much longer ours takes, in pairs, one after the other."""

    def measure(n: int) -> float:
        return statistics.median(seconds(ours, n, new_loop) / seconds(theirs, n, new_loop) for _ in range(3))

    return measure


def measures() -> list[Measure]:
    """Return the comparisons."""
    ours = sealed_call(tcp, IN_FLIGHT, SIZE)
    found: list[Measure] = [Fact("sealed call", microseconds(ours), 5_000, "us")]
    if binary() is not None:
        any_url()  # the server is started here, and not where time is taken
    for name, (module, theirs) in PEERS.items():
        if importlib.util.find_spec(module) and not (module == "nats" and binary() is None):
            found += [
                Fact(name, microseconds(theirs), 5_000, "us"),
                Fact(f"sealed call / {name}", ratio(ours, theirs), 5_000, "x", goal=1.0, rounds=3),
            ]
    if importlib.util.find_spec("uvloop"):
        uv: NewLoop = importlib.import_module("uvloop").new_event_loop
        bare = bare_call(IN_FLIGHT, SIZE)
        found += [
            Fact("sealed call, on uvloop", microseconds(ours, uv), 5_000, "us"),
            Fact("sealed call / bare echo, both on uvloop", ratio(ours, bare, uv), 5_000, "x", rounds=3),
            Fact("sealed call / bare echo, wall time", ratio(ours, bare), 5_000, "x", rounds=3),
        ]
    return found
