"""Strangers attack a node: each connection ends within its limit, memory is bounded, and honest peers do not notice."""

import asyncio
import json
import statistics
import sys
import time
from dataclasses import asdict
from typing import Any

from meshkit import TcpLimits
from tests.reliability.nodes import ROOT, SLEEP, Process, meet, node, process
from tests.reliability.report import Report

AT_ONCE = 0.5  # seconds within which a connection ends that breaks the rules
MEMORY = 16 * 2**20  # bytes that all of them may cost


async def scenario(report: Report) -> None:
    lorises, repeats = (60, 3) if report.quick else (500, 20)
    limits = TcpLimits(handshake_timeout=0.5, max_unproved=20) if report.quick else TcpLimits()
    async with (
        process("worker0", "127.0.0.1:0", limits=asdict(limits)) as victim,
        process("worker1", "127.0.0.1:0", join=[victim.address]) as other,  # which is not attacked
        node("caller", None, join=[victim.address]) as rt,
    ):
        await meet(rt, "worker0", "worker1")
        taken: dict[str, list[float]] = {victim.node: [], other.node: []}

        async def call(until: float) -> None:
            """Call the two in turn until then, and note how long each call took."""
            while time.monotonic() < until:
                for worker, times in taken.items():
                    started = time.monotonic()
                    await rt.call(SLEEP, 0.0, to=worker, timeout=5.0)
                    times.append(time.monotonic() - started)

        await call(time.monotonic() + 0.5)  # warm up
        before = victim.memory("VmRSS")
        attacker = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "tests.reliability.attacker", victim.address, str(lorises), str(repeats),
            stdout=asyncio.subprocess.PIPE, cwd=ROOT,
        )  # fmt: skip
        try:
            assert attacker.stdout is not None
            await attacker.stdout.readline()  # "attacks"
            for times in taken.values():
                times.clear()
            attack = asyncio.create_task(attacker.communicate())
            newcomers = asyncio.create_task(join(victim, attack))
            while not attack.done():
                await call(time.monotonic() + 0.1)
            joined = await newcomers
            out, _ = await attack
            most = victim.memory("VmHWM")
        finally:
            if attacker.returncode is None:
                attacker.kill()
            await attacker.wait()
        lost = rt.stats().dropped
    timeout = limits.handshake_timeout
    for name, closed in json.loads(out).items():
        slow = name == "slow-loris"
        report.within(f"{len(closed)} x {name}: closed after", closed, timeout + 0.5 if slow else AT_ONCE)
    if before is None or most is None:
        report.say("this system does not tell how much memory the node takes")
    else:
        report.promise(
            f"memory of the node: {before / 2**20:.1f} MiB, at most {(most - before) / 2**20:.1f} MiB more "
            f"(limit {MEMORY / 2**20:.0f} MiB)",
            most - before <= MEMORY,
        )
    report.within("under attack, a trusted node that starts was in after", joined, 1.0)
    for name, share, limit in (("median", 50, 1.5), ("99th percentile", 99, 3.0)):
        there, elsewhere = (statistics.quantiles(times, n=100)[share - 1] for times in taken.values())
        report.promise(
            f"latency of {len(taken[victim.node]):,} honest calls, {name}: {there * 1e3:.2f} ms, "
            f"{there / elsewhere:.2f} x that of calls to a node that is not attacked (limit {limit:g} x)",
            there <= limit * elsewhere or report.quick,
        )
    report.promise("no honest call failed, and nothing was dropped", not lost)


async def join(victim: Process, attack: asyncio.Task[Any]) -> list[float]:
    """Let nodes join, one after the other, as long as the attack goes on; return how long each took."""
    taken: list[float] = []
    while not (attack.done() and taken):
        await asyncio.sleep(0.3)
        started = time.monotonic()
        number = len(taken) % 5
        async with node(f"caller{number}", None, join=[victim.address]) as rt:
            await meet(rt, "worker0")
            taken.append(time.monotonic() - started)
    return taken
