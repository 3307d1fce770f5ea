import asyncio
import math
from collections import Counter
from typing import Any

import pytest

from meshkit import _time
from meshkit.errors import OutcomeUnknown, Overloaded, Unreachable
from meshkit.runtime import Message, Runtime, Service, handles, request
from meshkit.testing import Leak, Link, SimLoop, SimNetwork, SimTransport, Verdict, run, simulate, simulated


class Node:
    """A transport, and what it was told when."""

    def __init__(self, network: SimNetwork, name: str) -> None:
        self.name = name
        self.transport: SimTransport = network.transport(name)
        self.heard: list[bytes] = []
        self.events: list[tuple[float, str]] = []

    def received(self, sender: str, frame: bytes) -> None:
        self.heard.append(frame)
        self.events.append((_time.now(), f"{sender}: {frame.decode()}"))

    def found(self, node: str) -> None:
        self.events.append((_time.now(), f"found {node}"))

    def lost(self, node: str) -> None:
        self.events.append((_time.now(), f"lost {node}"))

    @property
    def told(self) -> list[str]:
        return [text for _, text in self.events if ":" not in text]

    async def start(self) -> None:
        await self.transport.start(self.name, self, None)

    def send(self, to: "Node", *frames: bytes) -> None:
        for frame in frames:
            self.transport.send(to.name, frame)


async def nodes_of(network: SimNetwork, *names: str) -> list[Node]:
    nodes = [Node(network, name) for name in names]
    for node in nodes:
        await node.start()
    await asyncio.sleep(1)
    for node in nodes:
        node.events.clear()
    return nodes


async def close(*nodes: Node) -> None:
    for node in nodes:
        await node.transport.close()


FRAMES = [b"%d" % number for number in range(1000)]


@simulate(seeds=3)
async def test_a_frame_takes_the_delay_and_at_most_the_jitter_and_overtakes_nobody(sim: SimLoop) -> None:
    network = SimNetwork(Link(delay=0.5, jitter=0.25))
    alice, bob = await nodes_of(network, "alice", "bob")
    took: list[float] = []
    for frame in FRAMES[:100]:
        begun = sim.now
        alice.send(bob, frame)
        await asyncio.sleep(1)
        took.append(bob.events[-1][0] - begun)
    assert 0.5 <= min(took) < 0.52
    assert 0.73 < max(took) <= 0.75
    for frame in FRAMES[100:]:
        alice.send(bob, frame)
        await asyncio.sleep(0.01)
    await asyncio.sleep(1)
    assert bob.heard == FRAMES
    assert network.verdicts == {Verdict.DELIVER: 1000}
    await close(alice, bob)


@simulate(seeds=3)
async def test_as_many_frames_are_lost_doubled_and_out_of_order_as_the_link_says(sim: SimLoop) -> None:
    network = SimNetwork(Link(loss=0.1, duplication=0.2, reordering=0.3))
    alice, bob = await nodes_of(network, "alice", "bob")
    alice.send(bob, *FRAMES)
    await asyncio.sleep(1)
    for verdict, chance in ((Verdict.LOSE, 0.1), (Verdict.DUPLICATE, 0.2), (Verdict.REORDER, 0.3)):
        assert abs(network.verdicts[verdict] / 1000 - chance) < 0.06
    counts = Counter(bob.heard)
    assert len(counts) == 1000 - network.verdicts[Verdict.LOSE]
    assert Counter(counts.values())[2] == network.verdicts[Verdict.DUPLICATE]
    assert set(counts.values()) == {1, 2}
    assert bob.heard != sorted(bob.heard, key=int)
    alice.transport.broadcast(b"x")
    await close(alice, bob)


@simulate(seeds=2)
async def test_a_link_of_its_own_goes_one_way(sim: SimLoop) -> None:
    network = SimNetwork()
    alice, bob = await nodes_of(network, "alice", "bob")
    network.links["alice", "bob"] = Link(loss=1.0)
    alice.send(bob, b"there")
    bob.send(alice, b"back")
    await asyncio.sleep(1)
    assert (bob.heard, alice.heard) == ([], [b"back"])
    await close(alice, bob)


@simulate(seeds=2)
async def test_a_cut_loses_what_is_sent_from_then_on_both_ways_until_it_is_healed(sim: SimLoop) -> None:
    network = SimNetwork()
    alice, bob, carol = await nodes_of(network, "alice", "bob", "carol")
    alice.send(bob, b"before")
    network.cut("alice", "bob")
    for node in (alice, bob, carol):
        node.transport.broadcast(f"from {node.name}".encode())
    await asyncio.sleep(1)
    assert bob.heard == [b"before", b"from carol"]
    assert alice.heard == [b"from carol"]
    assert sorted(carol.heard) == [b"from alice", b"from bob"]
    network.heal("bob", "alice")
    alice.send(bob, b"after")
    await asyncio.sleep(1)
    assert bob.heard[-1] == b"after"
    assert not alice.told + bob.told + carol.told
    await close(alice, bob, carol)


@simulate(seeds=2)
async def test_groups_are_cut_off_one_another_one_way_or_from_all_others(sim: SimLoop) -> None:
    network = SimNetwork()
    names = ["a", "b", "c", "d"]
    nodes = await nodes_of(network, *names)

    async def who_hears_whom() -> set[str]:
        for node in nodes:
            node.heard.clear()
        for node in nodes:
            node.transport.broadcast(node.name.encode())
        await asyncio.sleep(1)
        return {frame.decode() + node.name for node in nodes for frame in node.heard}

    everybody = {one + other for one in names for other in names if one != other}
    assert await who_hears_whom() == everybody
    network.cut(["a", "b"], ["c", "d"])
    assert await who_hears_whom() == {"ab", "ba", "cd", "dc"}
    network.heal()
    network.cut("a", one_way=True)
    assert await who_hears_whom() == everybody - {"ab", "ac", "ad"}
    network.heal("a")
    network.cut("d")
    assert await who_hears_whom() == {pair for pair in everybody if "d" not in pair}
    network.heal("d", "a", one_way=True)
    assert await who_hears_whom() == {pair for pair in everybody if "d" not in pair} | {"da"}
    network.heal()
    assert await who_hears_whom() == everybody
    await close(*nodes)


@simulate(seeds=2)
async def test_what_is_held_arrives_in_order_when_it_is_released(sim: SimLoop) -> None:
    network = SimNetwork(Link(delay=0.5, jitter=0.5))
    alice, bob = await nodes_of(network, "alice", "bob")
    network.hold("alice", "bob", one_way=True)
    alice.send(bob, *FRAMES)
    bob.send(alice, b"not held")
    await asyncio.sleep(10)
    assert (bob.heard, alice.heard) == ([], [b"not held"])
    assert network.verdicts[Verdict.HOLD] == 1000
    network.release()
    alice.send(bob, b"later")
    await asyncio.sleep(0.4)
    assert not bob.heard
    await asyncio.sleep(1)
    assert bob.heard == [*FRAMES, b"later"]
    await close(alice, bob)


@simulate(seeds=2)
async def test_what_is_doubled_comes_again_later_and_never_before_its_turn(sim: SimLoop) -> None:
    network = SimNetwork(Link(delay=0.01, jitter=0.5, duplication=1.0))
    alice, bob = await nodes_of(network, "alice", "bob")
    alice.send(bob, *FRAMES)
    await asyncio.sleep(10)
    assert list(dict.fromkeys(bob.heard)) == FRAMES
    assert set(Counter(bob.heard).values()) == {2}
    await close(alice, bob)


@simulate(seeds=2)
async def test_frames_overtake_one_another_on_a_link_without_a_delay_too(sim: SimLoop) -> None:
    network = SimNetwork(Link(delay=0.0, reordering=1.0))
    alice, bob = await nodes_of(network, "alice", "bob")
    alice.send(bob, *FRAMES)
    await asyncio.sleep(0.01)
    assert sorted(bob.heard, key=int) == FRAMES != bob.heard
    await close(alice, bob)


@simulate(seeds=2)
async def test_a_way_is_cut_or_not_however_often_it_was_cut(sim: SimLoop) -> None:
    network = SimNetwork()
    alice, bob, carol = await nodes_of(network, "alice", "bob", "carol")
    network.cut("alice")
    network.cut(["alice", "bob"], "carol")
    network.heal("alice")
    network.heal("alice")
    for node in (alice, bob):
        node.transport.broadcast(node.name.encode())
    await asyncio.sleep(1)
    assert (alice.heard, bob.heard, carol.heard) == ([b"bob"], [b"alice"], [b"alice"])
    await close(alice, bob, carol)


@simulate(seeds=2)
async def test_what_is_released_over_a_cut_is_lost(sim: SimLoop) -> None:
    network = SimNetwork()
    alice, bob, carol = await nodes_of(network, "alice", "bob", "carol")
    network.hold("alice")
    for node in (alice, carol):
        node.send(bob, *FRAMES[:10])
    alice.send(carol, b"1")
    await close(alice)
    network.cut("alice", "bob")
    network.release()
    await asyncio.sleep(1)
    assert (bob.heard, carol.heard) == (FRAMES[:10], [b"1"])
    assert (bob.told, carol.told) == ([], ["lost alice"])
    assert network.verdicts[Verdict.LOSE] == 10
    network.heal()
    bob.send(alice, b"are you there?")
    await asyncio.sleep(1)
    assert bob.told == ["lost alice"]
    await close(bob, carol)


@simulate(seeds=1)
async def test_ten_thousand_frames_are_held_and_arrive_in_order(sim: SimLoop) -> None:
    network = SimNetwork(Link(jitter=1.0))
    alice, bob = await nodes_of(network, "alice", "bob")
    network.hold("alice")
    for _ in range(10):
        alice.send(bob, *FRAMES)
    network.release()
    network.release()
    await asyncio.sleep(2)
    assert bob.heard == FRAMES * 10
    await close(alice, bob)


@simulate(seeds=2)
async def test_a_rule_decides_about_a_frame_before_chance_does(sim: SimLoop) -> None:
    network = SimNetwork(Link(loss=1.0))
    alice, bob = await nodes_of(network, "alice", "bob")
    asked: list[tuple[str, str, bytes]] = []

    def even_ones(sender: str, to: str, frame: bytes) -> Verdict | None:
        asked.append((sender, to, frame))
        return Verdict.DELIVER if int(frame) % 2 == 0 else None

    def three(sender: str, to: str, frame: bytes) -> Verdict | None:
        return Verdict.HOLD if frame == b"3" else None

    network.rules += [even_ones, three]
    alice.send(bob, b"1", b"2", b"3", b"4")
    await asyncio.sleep(1)
    assert bob.heard == [b"2", b"4"]
    assert asked[0] == ("alice", "bob", b"1")
    network.release("alice")
    await asyncio.sleep(1)
    assert bob.heard == [b"2", b"4", b"3"]
    await close(alice, bob)


def test_a_rule_that_fails_or_answers_nonsense_fails_the_test() -> None:
    async def main(sim: SimLoop, rule: Any) -> None:
        network = SimNetwork()
        network.rules.append(rule)
        async with Runtime("alice", transport=network.transport()), Runtime("bob", transport=network.transport()):
            await asyncio.sleep(1)

    for rule, message in (
        (lambda *_: 1 / 0, "ZeroDivisionError"),
        (lambda *_: False, "must return a Verdict or None, not False"),
        (lambda *_: "lose", "must return a Verdict or None, not 'lose'"),
    ):
        with pytest.raises(Leak, match=r"a frame from (alice to bob|bob to alice) is lost") as caught:
            simulated(1, lambda sim, rule=rule: main(sim, rule))  # type: ignore[misc]
        assert message in str(caught.value)


@simulate(seeds=1)
async def test_a_rule_may_crash_the_sender_of_a_broadcast(sim: SimLoop) -> None:
    network = SimNetwork()
    alice, bob, carol = await nodes_of(network, "alice", "bob", "carol")

    def crash(sender: str, to: str, frame: bytes) -> Verdict:
        network.crash(sender)
        return Verdict.DELIVER

    network.rules.append(crash)
    alice.transport.broadcast(b"last words")
    await asyncio.sleep(1)
    assert bob.heard + carol.heard == [b"last words"]
    await close(alice, bob, carol)


# --- names


@simulate(seeds=1)
async def test_a_node_goes_by_its_name_where_it_has_one_and_to_nodes_by_its_id(sim: SimLoop) -> None:
    network, log = SimNetwork(), list[str]()
    alice, bob = Node(network, "alice"), Node(network, "bob")
    network.links["alice", "bob"] = Link(delay=2.0)
    await alice.transport.start("key 1", alice, None)
    network.cut("bob")
    await bob.transport.start("key 2", bob, None)
    network.heal("alice", "bob")
    await asyncio.sleep(1)
    assert (alice.told, bob.told) == (["found key 2"], ["found key 1"])
    assert network.nodes == ("alice", "bob")
    assert list(alice.transport.peers) == ["key 2"]
    asked = list[tuple[str, str, bytes]]()
    network.rules.append(lambda *frame: asked.append(frame))
    sim.log = log.append
    alice.transport.send("key 2", b"x")
    await asyncio.sleep(1.5)
    assert not bob.heard
    await asyncio.sleep(1)
    assert bob.events[-1][1] == "key 1: x"
    assert asked == [("alice", "bob", b"x")]
    network.cut("bob", one_way=True)
    network.hold("bob")
    network.release()
    network.crash("bob")
    assert [line.partition(" ")[2] for line in log if "#" not in line] == [
        "alice > bob: 1 bytes, deliver",
        "cut bob > alice",
        "hold bob > alice, alice > bob",
        "release all",
        "bob is gone from the network",
    ]
    await close(alice, bob)


@simulate(seeds=1)
async def test_names_and_ids_are_there_once_and_only_those_that_are_known_have_faults(sim: SimLoop) -> None:
    network = SimNetwork()
    [alice] = await nodes_of(network, "alice")
    for name, node in (("alice", "another"), ("another", "alice")):
        with pytest.raises(ValueError, match="there is a node of that name, or of its id"):
            await network.transport(name).start(node, alice, None)
    for verb in (network.cut, network.heal, network.hold, network.release):
        with pytest.raises(KeyError, match="there is no node 'bob'; there are alice, another"):
            verb("alice", "bob")
        verb("alice", "another")
    for end in (network.heal, network.release):
        with pytest.raises(ValueError, match="needs the nodes on this side, too"):
            end(other="alice")
    await close(alice)


# --- nodes that come and go


@simulate(seeds=3)
async def test_who_crashes_says_nothing_and_who_comes_back_is_lost_and_found(sim: SimLoop) -> None:
    network = SimNetwork()
    alice, bob = await nodes_of(network, "alice", "bob")
    bob.send(alice, b"last words")
    network.crash("bob")
    assert network.nodes == ("alice",)
    alice.send(bob, b"into the void")
    bob.transport.broadcast(b"of a dead one")
    with pytest.raises(Unreachable):
        bob.send(alice, b"of a dead one")
    await asyncio.sleep(14)
    assert alice.events[-1][1] == "bob: last words"
    assert list(alice.transport.peers) == ["bob"]
    assert not list(bob.transport.peers)
    with pytest.raises(ValueError, match="there is no node 'bob' to crash"):
        network.crash("bob")
    await bob.start()
    await asyncio.sleep(1)
    assert alice.told == ["lost bob", "found bob"]
    assert not bob.heard
    alice.send(bob, b"welcome")
    await asyncio.sleep(1)
    assert bob.heard == [b"welcome"]
    await asyncio.sleep(60)
    assert list(alice.transport.peers) == ["bob"]
    await close(bob, alice)


@simulate(seeds=3)
async def test_a_connection_with_a_node_that_has_crashed_times_out(sim: SimLoop) -> None:
    network = SimNetwork()
    alice, _ = await nodes_of(network, "alice", "bob")
    network.crash("bob")
    await asyncio.sleep(16)
    assert alice.events == [(16.0, "lost bob")]
    assert not alice.transport.peers
    await close(alice)


@simulate(seeds=3)
async def test_who_leaves_behind_a_cut_is_missed_when_something_is_sent_to_it_again(sim: SimLoop) -> None:
    network = SimNetwork()
    alice, bob = await nodes_of(network, "alice", "bob")
    network.cut("alice", "bob")
    await close(bob)
    alice.send(bob, b"lost")
    await asyncio.sleep(1)
    assert not alice.told
    network.heal()
    alice.send(bob, b"are you there?", b"hello?")
    await asyncio.sleep(1)
    assert alice.told == ["lost bob"]
    assert not list(alice.transport.peers)
    await close(alice)


@simulate(seeds=3)
async def test_who_joins_behind_a_cut_or_a_hold_is_connected_when_it_ends(sim: SimLoop) -> None:
    network = SimNetwork()
    [alice] = await nodes_of(network, "alice")
    for begin, end in ((network.cut, network.heal), (network.hold, network.release)):
        bob = Node(network, "bob")
        begin("alice", "bob")
        await bob.start()
        await asyncio.sleep(1)
        assert not [*alice.told, *alice.transport.peers, *bob.transport.peers]
        end()
        await asyncio.sleep(1)
        assert (alice.told, bob.told) == (["found bob"], ["found alice"])
        await close(bob)
        await asyncio.sleep(1)
        assert alice.told == ["found bob", "lost bob"]
        alice.events.clear()
    await close(alice)


@simulate(seeds=3)
async def test_a_held_farewell_comes_after_what_was_sent_before_it(sim: SimLoop) -> None:
    network = SimNetwork()
    alice, bob = await nodes_of(network, "alice", "bob")
    network.hold("alice", "bob")
    bob.send(alice, b"1", b"2")
    await close(bob)
    await asyncio.sleep(1)
    assert not alice.events
    network.release()
    await asyncio.sleep(1)
    assert [text for _, text in alice.events] == ["bob: 1", "bob: 2", "lost bob"]
    await close(alice)


@simulate(seeds=1)
async def test_what_is_on_its_way_is_bounded(sim: SimLoop) -> None:
    network = SimNetwork()
    alice, bob = await nodes_of(network, "alice", "bob")
    half = bytes(SimNetwork.MAX_BUFFER // 2)
    network.hold("alice", "bob")
    alice.send(bob, half, half)
    with pytest.raises(Overloaded, match="link from node 'alice' to 'bob'"):
        alice.send(bob, b"x")
    alice.transport.broadcast(b"missed")
    network.release()
    await asyncio.sleep(1)
    alice.send(bob, half, half)
    await asyncio.sleep(1)
    assert len(bob.heard) == 4
    await close(alice, bob)


def test_a_network_is_for_simulations() -> None:
    async def main() -> None:
        with pytest.raises(RuntimeError, match="a SimNetwork needs a SimLoop"):
            await Node(SimNetwork(), "alice").start()

    run(main)


@simulate(seeds=1)
async def test_two_nodes_of_one_name_are_refused(sim: SimLoop) -> None:
    network = SimNetwork()
    alice, bob = await nodes_of(network, "alice", "bob")
    with pytest.raises(ValueError, match=r"'bob' cannot join SimNetwork.*there is a node of that name"):
        await Node(network, "bob").start()
    await close(alice, bob)


@simulate(seeds=1)
async def test_a_fault_between_nobody_is_refused(sim: SimLoop) -> None:
    network = SimNetwork()
    network.heal()
    network.release()
    [alice] = await nodes_of(network, "alice")
    for verb in (network.cut, network.heal, network.hold, network.release):
        with pytest.raises(
            ValueError, match=r"no links from \['alice'\] to \[\]; the nodes that there are: \['alice'\]"
        ):
            verb("alice")
    await close(alice)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"delay": -1}, "delay must be finite and zero or more"),
        ({"jitter": math.nan}, "jitter must be finite"),
        ({"loss": 1.5}, "loss must be a probability"),
        ({"duplication": math.nan}, "duplication must be a probability"),
        ({"loss": 0.6, "reordering": 0.6}, "the probabilities must be 1 at most together"),
    ],
)
def test_a_link_is_checked(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Link(**arguments)


def test_probabilities_that_are_one_together_are_a_link() -> None:
    assert Link(loss=0.33, duplication=0.56, reordering=0.11).loss == 0.33


# --- machines


@simulate(seeds=2)
async def test_each_node_is_called_on_its_machine_and_the_network_keeps_its_own_time(sim: SimLoop) -> None:
    network = SimNetwork(Link(delay=1.0))
    machines = [sim.machine("fast", rate=2.0), sim.machine("slow", rate=0.5)]
    alice, bob = Node(network, "alice"), Node(network, "bob")
    for machine, node in zip(machines, (alice, bob), strict=True):
        await machine.create_task(node.start())
    begun = sim.now
    clocks = [machine.local(begun) for machine in machines]

    async def shout(node: Node) -> None:
        node.transport.broadcast(b"x")

    await machines[0].create_task(shout(alice))
    await machines[1].create_task(shout(bob))
    machines[1].pause()
    await asyncio.sleep(5)
    assert [at - clocks[0] for at, text in alice.events if ":" in text] == [2.0]
    assert not bob.events
    machines[1].resume()
    await asyncio.sleep(1)
    assert [at - clocks[1] for at, text in bob.events if ":" in text] == [2.5]
    await close(alice, bob)


# --- runtimes

ADD = request("counter:add", int, reply=int)


class Adder(Service):
    name = "adder"

    def __init__(self) -> None:
        self.added: Counter[int] = Counter()

    @handles(ADD)
    async def add(self, msg: Message[int]) -> int:
        self.added[msg.payload] += 1
        return msg.payload


async def calls_over_a_bad_network(sim: SimLoop) -> str:
    network = SimNetwork(Link(delay=0.01, jitter=0.01, loss=0.1, duplication=0.1, reordering=0.1))
    adder = Adder()
    async with (
        Runtime("alice", transport=network.transport()) as alice,
        Runtime("bob", services=[adder], transport=network.transport()),
    ):

        async def call(number: int) -> None:
            await asyncio.sleep(sim.rng.random())
            while True:
                try:
                    assert await alice.call(ADD, number, to="bob", timeout=0.5, id=f"call {number}") == number
                    return
                except (OutcomeUnknown, Unreachable):
                    await asyncio.sleep(0.1)

        async with asyncio.TaskGroup() as group:
            for number in range(100):
                group.create_task(call(number))
        assert min(network.verdicts[verdict] for verdict in (Verdict.LOSE, Verdict.DUPLICATE, Verdict.REORDER)) > 5
    assert adder.added == dict.fromkeys(range(100), 1)
    return sim.trace


def test_calls_with_retries_take_effect_once_over_a_network_that_loses_and_doubles_and_the_trace_is_the_same() -> None:
    traces = [simulated(seed, calls_over_a_bad_network) for seed in range(5)]
    assert len(set(traces)) == 5
    assert [simulated(seed, calls_over_a_bad_network) for seed in range(2)] == traces[:2]
