"""What goes wrong: faults of the network and of computers, drawn from the seed; and two who do not mean well."""

import asyncio
import itertools
import random
from contextlib import suppress

from msgspec import Raw

from meshkit.runtime.wire import Reply
from meshkit.testing import Crashed, Link, SimCluster, SimLoop, Verdict
from meshkit.testing._sim_wires import Packet, Place
from tests.simulation.books import SKEW, World
from tests.simulation.world import ask_once, outcome

LINKS = [
    Link(delay=0.005, jitter=0.01),
    Link(delay=0.02, jitter=0.02, loss=0.1, duplication=0.1, reordering=0.1),
    Link(delay=0.01, jitter=0.03, loss=0.3),
    Link(delay=0.005, jitter=0.04, reordering=0.5),
]
CALM = LINKS[0]
FLOOD = 50
"""Calls at once: more than wait or run at one node."""


class Storm:
    """Does one thing after the other, for some seconds; in the end all is mended."""

    def __init__(self, world: World, cluster: SimCluster) -> None:
        self.world = world
        self.cluster = cluster
        self.rng: random.Random = world.sim.stream("storm")
        self.names = [node.name for node in cluster]

    async def rage(self, seconds: float) -> None:
        until = self.world.sim.now + seconds
        async with asyncio.TaskGroup() as group:
            while self.world.sim.now < until:
                fault = self.rng.choice(self.FAULTS)
                self.world.happened[f"storm: {fault.__name__}"] += 1
                group.create_task(fault(self))
                await asyncio.sleep(self.rng.uniform(0.2, 5))
        self.cluster.heal()
        self.cluster.release()
        self.cluster.network.link = CALM
        await self.cluster.start()

    def some(self) -> list[str]:
        return self.rng.sample(self.names, self.rng.randrange(1, len(self.names)))

    def one_up(self) -> str | None:
        up = [node.name for node in self.cluster if node.up]
        return self.rng.choice(up) if up else None

    async def crash(self) -> None:
        if (name := self.one_up()) is not None:
            self.cluster.crash(name)
            await asyncio.sleep(self.rng.choice([0.0, self.rng.uniform(0, 10)]))
            await self.start(name)

    async def stop(self) -> None:
        if (name := self.one_up()) is not None:
            try:
                await self.cluster.stop(name)
            except Crashed:
                return
            await self.start(name)

    async def start(self, name: str) -> None:
        if not self.cluster[name].up:
            with suppress(RuntimeError):  # it has crashed, or somebody else was quicker
                await self.cluster.start(name)

    async def pause(self) -> None:
        name = self.one_up()
        if name is None or self.cluster[name].paused:
            return
        machine = self.cluster[name].machine
        with self.world.stalled([name]):
            machine.pause()
            try:
                await asyncio.sleep(self.rng.uniform(0.1, 10))
            finally:  # or nothing on it could ever end, not even when something was wrong
                machine.resume()

    async def partition(self) -> None:
        ones = self.some()
        self.cluster.cut(ones)
        await asyncio.sleep(self.rng.uniform(0.1, 10))
        self.cluster.heal(ones)

    async def one_way(self) -> None:
        one, other = self.rng.sample(self.names, 2)
        self.cluster.cut(one, other, one_way=True)
        await asyncio.sleep(self.rng.uniform(0.1, 10))
        self.cluster.heal(one, other, one_way=True)

    async def weather(self) -> None:
        self.cluster.network.link = self.rng.choice(LINKS)

    async def jump(self) -> None:
        self.cluster[self.rng.choice(self.names)].wall_offset = self.rng.uniform(-SKEW, SKEW)

    async def swizzle(self) -> None:
        """Clog some links one after the other, then let them go in another order."""
        pairs = list(itertools.permutations(self.names, 2))
        chosen = self.rng.sample(pairs, self.rng.randrange(1, len(pairs) // 2))
        with self.world.stalled(chosen):
            for one, other in chosen:
                self.cluster.hold(one, other, one_way=True)
                await asyncio.sleep(self.rng.uniform(0, 0.3))
            for one, other in self.rng.sample(chosen, len(chosen)):
                self.cluster.release(one, other, one_way=True)
                await asyncio.sleep(self.rng.uniform(0, 0.3))

    async def flood(self) -> None:
        """Let one node ask another for more than it can take."""
        one, other = (self.cluster[name] for name in self.rng.sample(self.names, 2))
        if one.up and one.has_runtime:
            async with asyncio.TaskGroup() as group:
                for number in range(FLOOD):
                    call = self.world.call(flaky=number % 5 == 0)
                    group.create_task(outcome(one, ask_once(self.world, one.rt, call, other.id, 0.3, 2.0)))

    FAULTS = (crash, stop, pause, partition, one_way, weather, jump, swizzle, flood)


class Forger:
    """Hears all that is sent. Before some frames it sends a copy that is not genuine; what has arrived, again.

    What arrived at a node is sent again also when that has started anew, and has forgotten it.
    """

    def __init__(self, cluster: SimCluster, sim: SimLoop) -> None:
        self.network = cluster.network
        self.rng = sim.stream("forger")
        self.arrived: list[tuple[str, str, bytes]] = []  # to whom, from whom, and what
        self.network.rules.append(self.rule)

    def rule(self, sender: str, to: str, frame: bytes) -> Verdict | None:
        wires = self.network._wires
        assert wires is not None
        one, other = wires.places.get(sender), wires.places.get(to)
        if one is None or other is None:
            return None
        if not isinstance(other.receiver, Ear):
            other.receiver = Ear(other, self.arrived)
        drawn = self.rng.random()
        if drawn < 0.2:
            place, bit = self.rng.randrange(90, len(frame)), 1 << self.rng.randrange(8)
            wires.carry(Packet(one, other, frame[:place] + bytes([frame[place] ^ bit]) + frame[place + 1 :]))
        elif drawn < 0.3 and self.arrived:
            to, sender, frame = self.rng.choice(self.arrived[-5000:])
            again = wires.places.get(to)
            if again is not None and (peer := again.peers.get(sender)) is not None:
                wires.carry(Packet(peer, again, frame))
        return None


class Ear:
    """Stands where the receiver of a node stood, and remembers what has arrived: only that may never count again."""

    def __init__(self, place: Place, arrived: list[tuple[str, str, bytes]]) -> None:
        self.node = place.name
        self.receiver = place.receiver
        self.found, self.lost = self.receiver.found, self.receiver.lost
        self.arrived = arrived

    def received(self, sender: str, frame: bytes) -> None:
        self.arrived.append((self.node, sender, frame))
        self.receiver.received(sender, frame)


def lie(cluster: SimCluster, liar: str, victim: str) -> None:
    """Let a node answer, wrongly, whatever its victim has asked of others: it is trusted, and has learned the ids."""
    node, life = cluster[liar], cluster[victim].rt._life
    assert life is not None
    ids = [call_id for call_id, (to, *_) in life.router.calls._asked.items() if to != node.id]

    async def answer() -> None:
        own = node.rt._life
        assert own is not None
        for call_id in ids:
            own.router.outbox.post(cluster[victim].id, Reply(call_id, Raw(b"\xa4lies")))
        await asyncio.sleep(0)

    node.machine.create_task(answer())
