"""Three workers are restarted one after the other (SIGTERM) under load: no call fails, and nobody retries."""

import asyncio
import signal
import time
from contextlib import AsyncExitStack

import anyio

from tests.reliability.nodes import DO, PATIENCE, Process, address, meet, node, process
from tests.reliability.report import Report

WORKERS = ["worker0", "worker1", "worker2"]
TASKS = 8


async def scenario(report: Report) -> None:
    errors: list[Exception] = []
    slowest: list[float] = []
    codes: list[int | None] = []
    over = False
    async with AsyncExitStack() as outer:
        rt = await outer.enter_async_context(node("caller", "127.0.0.1:0", works=False))
        stacks = {name: await outer.enter_async_context(AsyncExitStack()) for name in WORKERS}

        async def start(name: str) -> Process:
            return await stacks[name].enter_async_context(process(name, "127.0.0.1:0", join=[address(rt)]))

        workers = dict(zip(WORKERS, await asyncio.gather(*map(start, WORKERS)), strict=True))
        await meet(rt, *WORKERS)

        async def caller() -> None:
            while not over:
                started = time.monotonic()
                try:
                    await rt.call(DO, 1, timeout=5.0)
                except Exception as error:  # noqa: BLE001 - all of them are counted
                    errors.append(error)
                slowest.append(time.monotonic() - started)

        async with asyncio.TaskGroup() as callers:
            for _ in range(TASKS):
                callers.create_task(caller())
            for name in WORKERS[:1] if report.quick else WORKERS * 3:
                workers[name].signal(signal.SIGTERM)
                with anyio.fail_after(PATIENCE):
                    codes.append(await workers[name].process.wait())
                await stacks[name].aclose()
                workers[name] = await start(name)
                await meet(rt, name)
            over = True
    report.promise(f"{len(codes)} restarts, {len(slowest):,} calls, {len(errors)} failed", not errors)
    report.promise("each worker ended with exit code 0", set(codes) == {0})
    report.say(f"the slowest call took {max(slowest) * 1e3:.0f} ms")
    for error in errors[:3]:
        report.say(repr(error))
