"""How a node leaves: announced, refusing what is new, finishing what it has, and losing nobody's call."""

import asyncio
import itertools
import random
from typing import Any, cast

import pytest

from meshkit.errors import CallTimeout, Draining, MeshkitError, PeerLost, Refused, Unreachable
from meshkit.retrier import Retrier, RetryPolicy
from meshkit.runtime import Message, Service, handles, request
from meshkit.runtime.outbox import PLAIN
from meshkit.runtime.wire import Ask, Goodbye, Reply, Tell, Wire, decode, encode_payload
from meshkit.transports import MemoryHub
from tests.runtime.lag import LaggingHub
from tests.runtime.nodes import SLEEP, STORE, TEASE, Node, Stash, Store, mesh, plain
from tests.runtime.test_messages import balanced, settle

WORK = request("work:do", int, reply=str)


def now() -> float:
    return asyncio.get_running_loop().time()


class Work(Service):
    """Notes what it has begun and finished, each after `seconds`, and up to 50 ms more."""

    name = "work"
    max_mailbox = 2000
    max_concurrent = 1000

    def __init__(self, begun: list[int], done: list[int], seconds: float = 0.01) -> None:
        self.begun = begun
        self.done = done
        self.seconds = seconds

    @handles(WORK)
    async def do(self, msg: Message[int]) -> str:
        self.begun.append(msg.payload)
        await asyncio.sleep(self.seconds + msg.payload % 50 / 1000)
        self.done.append(msg.payload)
        return f"{self.rt.name}:{msg.payload}"


@pytest.mark.parametrize("lag", [0.0, 0.02])
@pytest.mark.parametrize("to_one", [False, True])
async def test_a_rolling_restart_under_a_thousand_calls_costs_no_more_than_a_draining_that_a_retrier_absorbs(
    lag: float, to_one: bool
) -> None:
    hub = LaggingHub(lag) if lag else MemoryHub()
    rng = random.Random(1)
    begun: list[int] = []
    done: list[int] = []
    names = ("bob", "carol", "dave")
    nodes = {name: Node(name, Work(begun, done, 0.5), hub=hub) for name in names}
    seen: list[Exception] = []
    numbers = itertools.count()
    replies: dict[int, str] = {}
    restarted = False

    def refused(error: Exception) -> bool:
        seen.append(error)
        return isinstance(error, Draining)

    retrier = Retrier(RetryPolicy(max_retries=20, base_delay=0.05, max_delay=0.2), on=refused)
    async with Node("alice", hub=hub) as alice:
        for node in nodes.values():
            await node.start()
        await asyncio.sleep(0.1)

        async def one(number: int) -> str:
            # Who insists on one node is refused by it; who asks any of them is not even told.
            to = rng.choice(names) if to_one else None
            return await retrier.call(lambda: alice.call(WORK, number, to=to and up(to), timeout=5))

        def up(name: str) -> str:
            return name if name in hub.nodes else next(name for name in names if name in hub.nodes)

        async def one_after_the_other() -> None:
            await asyncio.sleep(rng.random() * 0.5)
            while not restarted:
                number = next(numbers)
                replies[number] = await one(number)

        callers = [asyncio.create_task(one_after_the_other()) for _ in range(1000)]
        await asyncio.sleep(0.5)
        for name in names:
            await asyncio.sleep(0.25)
            assert alice.stats().pending == 1000, "all of them are under way at once"
            assert nodes[name].stats().running > 200, "and it has its share of them"
            await nodes[name].stop()
            assert balanced(nodes[name])
            assert nodes[name].stats().cut == 0
            nodes[name] = Node(name, Work(begun, done, 0.5), hub=hub)
            await nodes[name].start()
        await asyncio.sleep(0.25)
        restarted = True
        await asyncio.gather(*callers)
        assert replies.keys() == set(range(next(numbers)))
        assert all(reply.endswith(f":{number}") for number, reply in replies.items())
        assert sorted(begun) == sorted(done) == sorted(replies), "nothing ran twice"
        assert all(isinstance(error, Draining) for error in seen)
        assert seen or not to_one
        for node in nodes.values():
            assert node.stats().handled > 100, "and each that came took its part"
            await node.stop()


async def test_what_is_under_way_when_a_node_begins_to_drain_is_refused_and_not_lost() -> None:
    hub = LaggingHub(0.1)
    stash = Stash()
    async with Node("alice", hub=hub) as alice:
        bob = Node("bob", stash, hub=hub)
        await bob.start()
        await asyncio.sleep(1)
        ended: list[float] = []
        stopping = asyncio.create_task(bob.stop())
        stopping.add_done_callback(lambda _: ended.append(now()))
        await asyncio.sleep(0.05)
        assert not alice.peers["bob"].draining, "it has not heard of it yet"
        begun = now()
        with pytest.raises(Draining) as caught:
            await alice.call(STORE, Store("x"), to="bob")
        assert caught.value.executed == "no"
        assert now() - begun == pytest.approx(0.2)
        await stopping
        assert ended == [pytest.approx(1.2)], "there and back again, and no longer"
        assert stash.begun == []


async def test_a_node_that_does_not_answer_holds_up_nobody_that_drains_for_long() -> None:
    async with mesh("alice", "bob", "carol") as (hub, [alice, *_], _):
        await settle()
        hub.cut("alice", "bob")
        begun = now()
        await alice.stop()
        assert now() == begun + 1


async def test_one_that_goes_while_another_waits_for_its_word_is_waited_for_no_longer() -> None:
    async with mesh("alice", "bob") as (hub, [alice, _], _):
        await settle()
        hub.cut("alice", "bob")
        begun = now()
        stopping = asyncio.create_task(alice.stop())
        await asyncio.sleep(0.5)
        hub.heal()
        hub.send("bob", "alice", plain(Goodbye()))
        await stopping
        assert now() == begun + 0.5


async def test_a_sign_of_life_from_before_is_not_taken_for_knowing() -> None:
    hub = LaggingHub(0.3)
    async with Node("alice", hub=hub, heartbeat=0.25), Node("bob", hub=hub) as bob:
        await asyncio.sleep(1)
        begun = now()
        await bob.stop()
        assert now() - begun == pytest.approx(0.6), "though alice was heard of in between"


async def test_two_nodes_that_drain_at_once_do_not_wait_for_each_other() -> None:
    hub = LaggingHub(0.1)
    nodes = [Node(name, Stash(), hub=hub) for name in ("alice", "bob")]
    for node in nodes:
        await node.start()
    await asyncio.sleep(1)
    await asyncio.gather(*(node.stop() for node in nodes))
    assert now() == pytest.approx(1.2)


async def test_without_grace_there_is_no_waiting() -> None:
    hub = LaggingHub(0.1)
    async with Node("alice", hub=hub):
        bob = Node("bob", hub=hub, grace=0)
        await bob.start()
        await asyncio.sleep(1)
        await bob.stop()
        assert now() == 1


async def test_who_waits_for_a_handler_that_never_began_is_told_so_before_the_goodbye() -> None:
    """Though something for every node was waiting to be sent in the same turn, before it."""

    class LastWords(Stash):
        max_concurrent = 1

    hub = MemoryHub()
    async with Node("alice", hub=hub) as alice:
        bob = Node("bob", LastWords(), hub=hub, grace=0)
        await bob.start()
        await settle()
        running = asyncio.create_task(alice.call(SLEEP, 50.0, to="bob", timeout=100))
        await settle()
        queued = [asyncio.create_task(alice.call(STORE, Store("x"), to="bob")) for _ in range(3)]
        await settle()
        await bob.emit(TEASE, "x")
        await bob.stop()
        errors: list[Any] = await asyncio.gather(running, *queued, return_exceptions=True)
        assert [type(error) for error in errors] == [PeerLost, Draining, Draining, Draining]
        assert [error.executed for error in errors] == ["maybe", "no", "no", "no"]


async def test_what_has_not_left_when_its_node_is_gone_was_not_executed() -> None:
    async with mesh("alice", "bob") as (hub, [alice, _], _):
        await settle()
        asked = asyncio.create_task(alice.call(STORE, Store("x"), to="bob"))
        await asyncio.sleep(0)  # it is in the outbox
        assert alice.stats().pending == 1
        hub.leave("bob")
        with pytest.raises(Unreachable) as caught:
            await asked
        assert caught.value.executed == "no"


async def test_while_it_drains_a_node_repeats_its_answers_and_lets_repeated_requests_join() -> None:
    async with mesh("alice") as (hub, [alice], _):
        stash = Stash()
        bob = Node("bob", stash, hub=hub, grace=20)
        await bob.start()
        assert await alice.call(SLEEP, 1.0, to="bob", id="first") == 1.0
        with pytest.raises(CallTimeout):
            hub.cut("alice", "bob")
            await alice.call(SLEEP, 0.5, to="bob", id="lost", timeout=0.2)
        hub.heal()
        busy = asyncio.create_task(alice.call(SLEEP, 9.0, to="bob", id="busy"))
        await settle()
        stopping = asyncio.create_task(bob.stop())
        await settle()
        assert await alice.call(SLEEP, 1.0, to="bob", id="first") == 1.0, (
            "it is told what came of it, not that it did not run"
        )
        with pytest.raises(Draining):
            await alice.call(SLEEP, 0.5, to="bob", id="lost")
        hub.send("alice", "bob", plain(Ask("busy", "stash:sleep", 1, 0.0, 5000, encode_payload(9.0))))
        assert await busy == 9.0
        await stopping
        assert stash.begun == [1.0, 9.0]


async def test_a_draining_node_is_known_to_be_and_is_alive_as_long_as_it_drains() -> None:
    async with mesh("alice") as (hub, [alice], _):
        bob = Node("bob", Stash(), hub=hub, grace=60)
        await bob.start()
        await settle()
        asked = asyncio.create_task(alice.call(SLEEP, 50.0, to="bob", timeout=100))
        await settle()
        stopping = asyncio.create_task(bob.stop())
        await asyncio.sleep(40)
        assert alice.peers["bob"].draining, "its heart beats on, or its calls would be given up"
        sent = bob.stats().dropped
        with pytest.raises(Draining) as caught:
            await alice.call(STORE, Store("x"), to="bob")
        assert isinstance(caught.value, Refused)
        assert bob.stats().dropped == sent, "it was not even asked"
        assert await asked == 50.0
        await stopping


async def test_each_error_of_a_node_that_leaves_says_whether_the_work_ran() -> None:
    """Whatever its grace, whatever the lag: who is told "no" has not run, and who got a reply has."""
    for seed in range(20):
        rng = random.Random(seed)
        hub = LaggingHub(rng.choice([0.0, 0.01, 0.2]))
        begun: list[int] = []
        done: list[int] = []
        bob = Node("bob", Work(begun, done), hub=hub, grace=rng.choice([0, 0.03, 1]))
        async with Node("alice", hub=hub) as alice:
            await bob.start()
            await asyncio.sleep(0.5)

            async def one(number: int, rng: random.Random = rng, alice: Node = alice) -> str:
                await asyncio.sleep(rng.random() * 0.3)
                return await alice.call(WORK, number, to="bob", timeout=3)

            calls = [asyncio.create_task(one(number)) for number in range(100)]
            await asyncio.sleep(0.15)
            await bob.stop()
            outcomes: list[Any] = await asyncio.gather(*calls, return_exceptions=True)
            for number, outcome in enumerate(outcomes):
                assert begun.count(number) <= 1
                if isinstance(outcome, MeshkitError):
                    assert outcome.executed != "no" or number not in begun
                else:
                    assert number in done
            assert balanced(bob)
            assert alice.stats().pending == 0


async def test_a_goodbye_is_the_last_that_is_heard_of_a_node() -> None:
    """Though something for every node has waited to be sent since before an answer, in the same turn of the loop."""
    heard: list[Wire] = []

    class Listens:
        def received(self, sender: str, frame: bytes) -> None:
            heard.extend(decode(frame.removeprefix(PLAIN)))

        def found(self, node: str) -> None: ...

        def lost(self, node: str) -> None: ...

    async with mesh("bob") as (hub, [bob], _):
        hub.join("zoe", Listens())
        await settle()
        heard.clear()
        router = cast("Any", bob)._life.router
        await bob.emit(TEASE, "x")
        router._answer("zoe", Reply("5f", encode_payload(1.0)))
        router.say_goodbye()
        assert [type(wire) for wire in heard] == [Tell, Reply, Goodbye]
        hub.leave("zoe")
