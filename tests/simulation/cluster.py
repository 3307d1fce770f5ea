"""The scenario: five nodes that ask one another, through a storm; afterwards all must be well again."""

import asyncio

from meshkit import MeshkitError, OutcomeUnknown, Refused, RemoteError, Retrier, RetryPolicy
from meshkit.testing import SimCluster, SimLoop, SimNode
from tests.simulation.storm import CALM, SKEW, Forger, Storm, lie
from tests.simulation.world import NEWS, WORK, Call, Work, World, ask_once, make_cluster, outcome, worker_of

NAMES = ["alice", "bob", "carol", "dave", "eve"]
LONGEST = 200.0
"""Seconds within which all has ended."""
STORM = 20.0
"""Seconds of faults."""
CONVERGENCE = 5 + 2 * SKEW
"""Seconds after the last fault until all know one another again and calls succeed, however wrong the clocks are."""


async def scenario(sim: SimLoop, storm: float = STORM) -> str:
    """Play it, with so many seconds of faults; return the trace."""
    world = World(sim)
    cluster = make_cluster(world, NAMES)
    cluster.network.link = CALM
    for node in cluster:
        node.rate = sim.rng.uniform(0.99, 1.01)
        node.wall_offset = sim.rng.uniform(-SKEW, SKEW)
    async with cluster:
        Forger(cluster, sim)
        async with asyncio.TaskGroup() as group:
            watch = group.create_task(watch_over(world))
            clients = [group.create_task(client(world, cluster, node, group)) for node in cluster for _ in range(2)]
            await Storm(world, cluster).rage(storm)
            await cluster.until(cluster.connected, timeout=CONVERGENCE)
            for each in clients:
                each.cancel()
            await asyncio.sleep(2 * SKEW)  # who has just started takes nothing that seems older than itself
            await calm(world, cluster)
            watch.cancel()
    world.settle()
    sim.note(repr(sorted(world.outcomes.items())))
    return sim.trace


async def watch_over(world: World) -> None:
    while True:
        assert world.sim.now < LONGEST, world.sim.where_tasks_wait()
        world.look()
        await asyncio.sleep(0.1)


async def client(world: World, cluster: SimCluster, node: SimNode, group: asyncio.TaskGroup) -> None:
    """Ask others for work, in all the ways that there are."""
    rng = world.sim.rng
    while True:
        await asyncio.sleep(rng.expovariate(4))
        if not node.up or not node.has_runtime:
            continue
        call = world.call()
        to, then = (cluster[name].id for name in rng.sample(NAMES, 2))
        seconds, timeout = rng.choice([0.0, 0.1, 1.0, 3.0]), rng.uniform(0.1, 3)
        rt, worker = node.rt, worker_of(node)
        ask = rng.choice(
            [
                lambda: ask_once(world, rt, call, to, seconds, timeout),  # noqa: B023
                lambda: ask_once(world, rt, call, None, seconds, timeout),  # noqa: B023
                lambda: ask_once(world, rt, call, to, 0.1, timeout, then=then),  # noqa: B023
                lambda: worker.ask_guarded(call, to, seconds, timeout),  # noqa: B023
                lambda: ask_again(world, node, call, to, seconds, timeout),  # noqa: B023
                lambda: ask_many(node, call, timeout, world),  # noqa: B023
                lambda: tell(node, call),  # noqa: B023
            ]
        )
        task = group.create_task(outcome(world, call, node, ask))
        if rng.random() < 0.2:
            await asyncio.wait([task], timeout=rng.uniform(0, timeout))
            task.cancel()
        elif rng.random() < 0.7:  # else without waiting for it
            await asyncio.wait([task])


async def ask_again(world: World, node: SimNode, call: Call, to: str, seconds: float, timeout: float) -> None:
    policy = RetryPolicy(max_retries=4, base_delay=0.2, timeout=20)
    retrier = Retrier(policy, on=(Refused, OutcomeUnknown, RemoteError), idempotent=True)
    await retrier.call(ask_once, world, node.rt, call, to, seconds, timeout, repeats=True)


async def ask_many(node: SimNode, call: Call, timeout: float, world: World) -> None:
    call.deadline = world.sim.now + timeout
    replies = await node.rt.call_many(WORK, Work(call.id, 0.1), timeout=timeout, quorum=world.sim.rng.randrange(1, 4))
    call.replied = bool(replies.replies)


async def tell(node: SimNode, call: Call) -> None:
    await node.rt.emit(NEWS, call.id)
    call.replied = False


# --- when the storm is over


async def calm(world: World, cluster: SimCluster) -> None:
    """All can be asked by all, whatever a forger and a liar do; what is cancelled ends; all hear the news."""
    calls = {(one, other): world.call() for one in NAMES for other in NAMES if one != other}

    async def ask(one: str, other: str, call: Call) -> None:
        node = cluster[one]
        try:
            await node.run(ask_once(world, node.rt, call, cluster[other].id, 0.2, 5.0, repeats=True))
        except RemoteError as error:
            world.check(error.code == "tired", f"in calm weather {one} asked {other}: {error!r}")
        except MeshkitError as error:
            world.check(False, f"in calm weather {one} asked {other}: {error!r}")

    async with asyncio.TaskGroup() as group:
        for (one, other), call in calls.items():
            group.create_task(ask(one, other, call))
        await asyncio.sleep(0.1)
        for victim, liar in zip(NAMES, [*NAMES[1:], NAMES[0]], strict=True):
            lie(cluster, liar, victim)
    for one, other in zip(NAMES, [*NAMES[1:], NAMES[0]], strict=True):
        await give_up(world, cluster, one, other)
    alice = cluster["alice"]
    await alice.run(alice.rt.emit(NEWS, "the storm is over"))
    await asyncio.sleep(1)
    for node in cluster:
        world.check(world.news["the storm is over", node.rt] == 1, f"{node} has not heard it")
    world.look()


async def give_up(world: World, cluster: SimCluster, one: str, other: str) -> None:
    """What nobody waits for any more ends where it runs."""
    node, call = cluster[one], world.call()
    task = asyncio.create_task(node.run(ask_once(world, node.rt, call, cluster[other].id, 20.0, 30.0)))
    await asyncio.sleep(0.3)
    world.check(world.running[call.id], f"{call} did not begin within 0.3 s")
    task.cancel()
    await asyncio.wait([task])
    await asyncio.sleep(0.3)
    world.check(not world.running[call.id], f"{call} goes on although its caller has given up")
