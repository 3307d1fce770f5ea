"""Nodes are parted, in silence, and come together again: the mesh re-forms by itself, and no process restarts."""

import asyncio
import time

from tests.reliability.networks import Network, network
from tests.reliability.nodes import until
from tests.reliability.report import Report


async def everyone_knows(mesh: Network, others: int) -> float:
    """Wait until each node knows so many others; return the seconds that it took."""
    return await until(lambda: all(node.peers == others for node in mesh.nodes))


async def scenario(report: Report) -> None:
    if report.quick:
        short = {"ping_interval": 0.2, "silence_timeout": 1.0, "write_timeout": 1.0, "handshake_timeout": 0.5}
        nodes, heartbeat, limits, partitions = 4, 0.2, short, [1.5]
    else:
        nodes, heartbeat, limits, partitions = 6, 2.0, {}, [10.0, 40.0]
    async with network(nodes, heartbeat=heartbeat, limits=limits) as mesh:
        report.say(f"{nodes} nodes, {mesh.what}; {mesh.parted} of them stay together")
        await everyone_knows(mesh, nodes - 1)
        for seconds in partitions:
            parted_at = time.monotonic()
            await mesh.part()
            noticed = await everyone_knows(mesh, mesh.parted - 1)
            answers = [await node.ask() for node in mesh.nodes]
            report.within(f"parted for {seconds:g} s: all knew it after", [noticed], 4 * heartbeat)
            report.promise(f"each asked everyone it knew, and {mesh.parted} answered", answers == [mesh.parted] * nodes)
            await asyncio.sleep(seconds - (time.monotonic() - parted_at))
            await mesh.heal()
            healed = await everyone_knows(mesh, nodes - 1)
            answers = [await node.ask() for node in mesh.nodes]
            report.within("when they could reach each other again, all knew all others after", [healed], 15.0)
            report.promise(f"each asked everyone, and {nodes} answered", answers == [nodes] * nodes)
        report.promise("no process has ended", all(node.process.returncode is None for node in mesh.nodes))
