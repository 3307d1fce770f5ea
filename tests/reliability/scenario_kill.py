"""A node is killed (SIGKILL) in the middle of calls: its callers know at once, and it can come back."""

import asyncio
import signal
import time
from contextlib import AsyncExitStack

from meshkit import PeerLost
from tests.reliability.nodes import SLEEP, address, meet, node, process
from tests.reliability.report import Report

CALLERS, CALLS = ["caller0", "caller1", "caller2"], 20


async def scenario(report: Report) -> None:
    known: list[float] = []
    back: list[float] = []
    outcomes: list[object] = []
    async with AsyncExitStack() as stack:
        callers = [await stack.enter_async_context(node(CALLERS[0], "127.0.0.1:0"))]
        first = address(callers[0])
        callers += [await stack.enter_async_context(node(name, "127.0.0.1:0", join=[first])) for name in CALLERS[1:]]
        for _ in range(1 if report.quick else 7):
            started = time.monotonic()
            async with process("worker0", "127.0.0.1:0", join=[first]) as worker:
                for caller in callers:
                    await meet(caller, "worker0")
                back.append(time.monotonic() - started)
                calls = [
                    asyncio.ensure_future(caller.call(SLEEP, 60.0, to=worker.node, timeout=60.0))
                    for caller in callers
                    for _ in range(CALLS)
                ]
                for caller in callers:  # what was asked before is being done when this is answered
                    await caller.call(SLEEP, 0.0, to=worker.node)
                killed = time.monotonic()
                worker.signal(signal.SIGKILL)
                for call in calls:
                    call.add_done_callback(lambda _: known.append(time.monotonic() - killed))  # noqa: B023 - awaited here
                outcomes += await asyncio.gather(*calls, return_exceptions=True)
        pending = sum(caller.stats().pending for caller in callers)
    report.promise(
        f"{len(outcomes)} calls of a node that was killed failed with PeerLost, and none with anything else",
        all(type(outcome) is PeerLost for outcome in outcomes),
    )
    report.within("its callers knew after", known, 0.1)
    report.promise("no call was left pending", pending == 0)
    report.say(f"a process that starts is known to all after {sorted(back)[len(back) // 2]:.2f} s")
