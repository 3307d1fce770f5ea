"""A bad network between two nodes: with a retrier and its id, every call succeeds, and is executed exactly once."""

import asyncio
import socket
import time
from uuid import uuid4

from meshkit import OutcomeUnknown, Refused, Retrier, RetryPolicy
from meshkit.testing import ChaosProxy
from tests.reliability.nodes import DO, DONE, meet, node, process
from tests.reliability.report import Report

TASKS = 20  # that make calls at the same time


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


async def scenario(report: Report) -> None:
    calls = 50 if report.quick else 1_000
    tries: list[int] = []
    errors: list[Exception] = []
    upstream = f"127.0.0.1:{free_port()}"
    chaos = ChaosProxy(upstream, seed=1, jitter=0.02, slice=1, reset_rate=0.05)  # a connection for each 50 calls
    retrier = Retrier(
        RetryPolicy(max_retries=50, base_delay=0.05, max_delay=1.0), on=(OutcomeUnknown, Refused), idempotent=True
    )
    async with chaos:
        outside = "{}:{}".format(*chaos.address)
        async with (
            node("caller", None, join=[outside]) as rt,
            process("worker0", upstream, advertise=outside) as worker,
        ):
            await meet(rt, "worker0")
            numbers = iter(range(1, calls + 1))
            started = time.monotonic()

            async def caller() -> None:
                for number in numbers:
                    once, tried = uuid4().hex, 0

                    async def ask(number: int = number, once: str = once) -> int:
                        nonlocal tried
                        tried += 1
                        return await rt.call(DO, number, to=worker.node, timeout=2.0, id=once)

                    try:
                        assert await retrier.call(ask) == number
                    except Exception as error:  # noqa: BLE001 - all of them are counted
                        errors.append(error)
                    tries.append(tried)

            await asyncio.gather(*(caller() for _ in range(TASKS)))
            took = time.monotonic() - started
            connections = chaos._accepted
            done = await retrier.call(rt.call, DONE, 1, to=worker.node)
    succeeded = calls - len(errors)
    report.promise(f"{succeeded:,} of {calls:,} calls succeeded", succeeded == calls)
    once = sum(times == (1, 1) for times in done.values())
    report.promise(f"{once:,} of them were executed exactly once", once == calls and len(done) == calls)
    again = sum(tried > 1 for tried in tries)
    report.promise(
        f"the network was bad: {connections} connections, and {again} calls were tried more than once",
        again > 0 or report.quick,
    )
    report.say(f"it took {took:.1f} s")
    for error in errors[:3]:
        report.say(repr(error))
