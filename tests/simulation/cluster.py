"""The scenario: five nodes that ask one another, through a storm; afterwards all must be well again."""

import asyncio
from collections import Counter

from meshkit import MeshkitError, PeerLost, RemoteError
from meshkit.testing import SimCluster, SimLoop, SimNode, Verdict
from tests.simulation.books import SKEW, World
from tests.simulation.storm import CALM, Forger, Storm, lie
from tests.simulation.world import (
    GRACE,
    ask_again,
    ask_many,
    ask_once,
    make_cluster,
    outcome,
    spread,
    worker_of,
)

NAMES = ["alice", "bob", "carol", "dave", "eve"]
RING = list(zip(NAMES, [*NAMES[1:], NAMES[0]], strict=True))
LONGEST = 250.0
"""Seconds within which all has ended."""
STORM = 20.0
"""Seconds of faults."""
CONVERGENCE = 5 + 2 * SKEW
"""Seconds after the last fault until all know one another again and calls succeed, however wrong the clocks are."""
SILENCE = 16.0
"""Seconds until it is known that a node has crashed: 7 by its heartbeats; 15 by the connection, if an old beat of it is
sent again to a node that started just after that, and believes it."""
EXPECTED = [
    *(f"storm: {fault.__name__}" for fault in Storm.FAULTS),
    *(f"frames: {verdict.value}" for verdict in Verdict),
    *(f"buggify: {point}" for point in ("heartbeat: one is left out", "outbox: bundles leave late")),
    "buggify: mailbox: a new worker begins late",
    *(f"dropped frame at frame: {why}" for why in ("bad_seal", "bad_signature", "replayed", "stale")),
    *(f"dropped sim:work at mailbox: {why}" for why in ("draining", "overloaded")),
    *(f"dropped {kind} at mailbox: overloaded" for kind in ("sim:flaky", "sim:news")),
    *("dropped frame at kind: wrong_sender", "dropped sim:work at dedupe: duplicate"),
    *(f"messages {what}" for what in ("handled", "failed", "retried", "cancelled", "cut")),
    *(f"told {what} (no)" for what in ("Closed", "Draining", "Overloaded", "TooFewReplies", "Unreachable")),
    *(f"told {what} (maybe)" for what in ("CallTimeout", "Closed", "PeerLost", "TooFewReplies")),
    *(f"told RemoteError {code} (yes)" for code in ("internal", "nested", "tired")),
    *("told a reply", "told CancelledError (nothing)", "probe of a breaker"),
]
"""What must happen in the course of many seeds, or it would not be tested."""


async def scenario(sim: SimLoop, storm: float = STORM) -> Counter[str]:
    """Play it, with so many seconds of faults; return what has happened, how often."""
    world = World(sim)
    cluster = make_cluster(world, NAMES)
    cluster.network.link = CALM
    for node in cluster:
        node.rate = sim.rng.uniform(0.99, 1.01)
        node.wall_offset = sim.rng.uniform(-SKEW, SKEW)
    async with cluster:
        forger = Forger(cluster, sim)
        async with asyncio.TaskGroup() as group:
            watch = group.create_task(watch_over(world))
            clients = [group.create_task(client(world, cluster, node, group)) for node in cluster for _ in range(2)]
            await Storm(world, cluster).rage(storm)
            await cluster.until(cluster.connected, timeout=CONVERGENCE)
            for each in clients:
                each.cancel()
            await asyncio.sleep(2 * SKEW)  # who has just started takes nothing that seems older than itself
            # A node that has started anew believes again what was said shortly before, by a clock that is ahead: also
            # that somebody is draining, until that one's next sign of life.
            forger.arrived.clear()
            await calm(world, cluster)
            watch.cancel()
    world.settle()
    happened = world.happened
    happened.update({f"frames: {verdict.value}": count for verdict, count in cluster.network.verdicts.items()})
    happened.update({f"buggify: {point}": count for point, count in sim.fired.items()})
    sim.note(repr(sorted(happened.items())))
    return happened


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
        rt = node.rt
        to, then = (cluster[name].id for name in rng.sample(NAMES, 2))
        seconds, timeout = rng.choice([0.0, 0.1, 1.0, 3.0]), rng.uniform(0.1, 3)
        match rng.randrange(8):
            case 0:
                ask = ask_once(world, rt, world.call(), to, seconds, timeout)
            case 1:
                ask = ask_once(world, rt, world.call(), None, seconds, timeout)
            case 2:
                ask = ask_once(world, rt, world.call(), to, 0.1, timeout, then=then)
            case 3:
                ask = worker_of(node).ask_guarded(world.call(), to, seconds, timeout)
            case 4:
                ask = ask_again(world, rt, world.call(repeats=True), to, seconds, timeout)
            case 5:
                ask = ask_many(world, rt, world.call(), timeout, rng.randrange(1, 4))
            case 6:
                ask = ask_once(world, rt, world.call(flaky=True), to, seconds / 10, timeout)
            case _:
                ask = spread(world, rt, world.call().id)
        task = group.create_task(outcome(node, ask))
        if rng.random() < 0.2:
            await asyncio.wait([task], timeout=rng.uniform(0, timeout))
            task.cancel()
        elif rng.random() < 0.7:  # else without waiting for it
            await asyncio.wait([task])


# --- when the storm is over


async def calm(world: World, cluster: SimCluster) -> None:
    """All can be asked by all, whatever a forger and a liar do; what is cancelled ends; all hear the news."""
    async with asyncio.TaskGroup() as group:
        for one in NAMES:
            for other in NAMES:
                if one != other:
                    group.create_task(ask_in_calm(world, cluster, one, other))
        await asyncio.sleep(0.1)
        for victim, liar in RING:
            lie(cluster, liar, victim)
    for one, other in RING:
        await give_up(world, cluster, one, other)
    await spread_in_calm(world, cluster)
    await breakers_close(world, cluster)
    await roll(world, cluster)
    await answer_while_draining(world, cluster)
    await crash_in_calm(world, cluster)
    await cluster.until(cluster.connected, timeout=CONVERGENCE)
    for rt, waiting in world.notes.items():
        world.check(not waiting or rt not in {node.rt for node in cluster}, f"{waiting} notes are lost on {rt}")
    world.look()


async def ask_in_calm(world: World, cluster: SimCluster, one: str, other: str | None) -> None:
    node, to = cluster[one], cluster[other].id if other else None
    try:
        await node.run(ask_once(world, node.rt, world.call(repeats=to is not None), to, 0.2, 5.0))
    except RemoteError as error:
        world.check(error.code == "tired", f"in calm weather {one} asked {other}: {error!r}")
    except MeshkitError as error:
        world.check(False, f"in calm weather {one} asked {other}: {error!r}")


async def give_up(world: World, cluster: SimCluster, one: str, other: str) -> None:
    """What nobody waits for any more ends where it runs."""
    node, call = cluster[one], world.call()
    task = asyncio.create_task(node.run(ask_once(world, node.rt, call, cluster[other].id, 20.0, 30.0)))
    await asyncio.sleep(0.3)
    world.check(call in world.running.values(), f"{call} did not begin within 0.3 s")
    task.cancel()
    await asyncio.wait([task])
    await asyncio.sleep(0.3)
    world.check(call not in world.running.values(), f"{call} goes on although its caller has given up")


async def spread_in_calm(world: World, cluster: SimCluster) -> None:
    alice, news = cluster["alice"], "the storm is over"
    await alice.run(spread(world, alice.rt, news))
    await asyncio.sleep(1)
    for node in cluster:
        world.check(world.heard[news, node.rt] == 1, f"{node} has not heard it")


async def breakers_close(world: World, cluster: SimCluster) -> None:
    """Breakers that had opened let calls through again: first one, however many there are, and then all."""
    alice, bob = cluster["alice"], cluster["bob"]
    asker = worker_of(alice)

    async def ask(seconds: float, timeout: float) -> None:
        await outcome(alice, asker.ask_guarded(world.call(), bob.id, seconds, timeout))

    cluster.cut("alice", "bob")
    for _ in range(2):
        await ask(0.0, 0.2)
    cluster.heal()
    await asyncio.sleep(CONVERGENCE)  # what was lost may have been a sign of life
    await cluster.until(cluster.connected, timeout=CONVERGENCE)
    async with asyncio.TaskGroup() as group:
        for _ in range(5):
            group.create_task(ask(0.2, 5.0))
    for node in cluster:
        worker = worker_of(node)
        for to in worker.breakers:
            try:
                await node.run(worker.ask_guarded(world.call(), to, 0.0, 5.0))
            except MeshkitError as error:
                world.check(False, f"in calm weather {node} asked through {worker.breakers[to]}: {error!r}")


async def roll(world: World, cluster: SimCluster) -> None:
    """All nodes are stopped and started, one after the other; who asks any of them notices nothing of it."""
    for node in cluster:
        node.wall_offset = 0.0  # else who has just started does not take what seems to be older
    await asyncio.sleep(2 * SKEW)
    for name in NAMES:
        async with asyncio.TaskGroup() as group:
            stop = group.create_task(cluster.stop(name))
            while not stop.done():
                for other in NAMES:
                    if other != name:
                        group.create_task(ask_in_calm(world, cluster, other, None))
                await asyncio.sleep(0.05)
        await cluster.start(name)
        await cluster.until(lambda: all_are_known(cluster), timeout=CONVERGENCE)
        await asyncio.sleep(3)  # who has just started believes what was said 2 s before that, whoever repeats it


def all_are_known(cluster: SimCluster) -> bool:
    """Return whether all have heard of all what they handle: a node that stops waits only for those of whom it has."""
    return cluster.connected() and all(peer.kinds for node in cluster for peer in node.rt.peers.values())


async def answer_while_draining(world: World, cluster: SimCluster) -> None:
    """A node that stops takes nothing new, but repeats what it has answered."""
    alice, bob = cluster["alice"], cluster["bob"]
    again, long = world.call(repeats=True), world.call()
    cluster.cut("bob", "alice", one_way=True)
    lost = asyncio.create_task(outcome(alice, ask_once(world, alice.rt, again, bob.id, 0.0, 0.5)))
    await asyncio.wait([lost])
    world.check([run for run in again.runs if run.effect], f"{again} has not been done within 0.5 s")
    cluster.heal()
    work = asyncio.create_task(outcome(alice, ask_once(world, alice.rt, long, bob.id, GRACE / 2, 5.0)))
    await asyncio.sleep(0.2)
    stop = asyncio.create_task(cluster.stop("bob"))
    await asyncio.sleep(0.15)
    try:
        await alice.run(ask_once(world, alice.rt, again, bob.id, 0.0, 5.0))
    except MeshkitError as error:
        world.check(False, f"{alice} was not told again by {bob}, which stops: {error!r}")
    await asyncio.wait([work, stop])
    stop.result()
    await cluster.start("bob")
    await cluster.until(cluster.connected, timeout=CONVERGENCE)


async def crash_in_calm(world: World, cluster: SimCluster) -> None:
    """Who waits for a node that has crashed is told; what a node works for one that has crashed, ends."""
    alice, bob, carol = (cluster[name] for name in NAMES[:3])
    calls = world.call(), world.call()

    async def ask_carol() -> None:
        await bob.run(ask_once(world, bob.rt, calls[1], carol.id, 60.0, 70.0))

    async def ask_bob() -> None:
        await alice.run(ask_once(world, alice.rt, calls[0], bob.id, 60.0, 70.0))

    tasks = [asyncio.create_task(ask()) for ask in (ask_bob, ask_carol)]
    await asyncio.sleep(0.3)
    world.check(all(call in world.running.values() for call in calls), f"{calls} did not begin within 0.3 s")
    cluster.crash("bob")
    await asyncio.wait(tasks, timeout=SILENCE)
    told = tasks[0].exception() if tasks[0].done() else "nothing"
    world.check(isinstance(told, PeerLost), f"within {SILENCE:g} s of a crash, {alice} was told: {told!r}")
    await asyncio.sleep(SILENCE)
    world.check(calls[1] not in world.running.values(), f"{calls[1]} goes on although its caller has crashed")
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    await cluster.start("bob")
