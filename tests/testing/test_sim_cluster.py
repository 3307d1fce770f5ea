import asyncio
import contextlib
import math
import re
from collections.abc import Callable
from typing import Any

import anyio
import pytest

from meshkit import CallTimeout, Message, PeerLost, Runtime, Service, Unreachable, _time, broadcast, handles, request
from meshkit.runtime import Identity
from meshkit.testing import (
    CancellationPoint,
    Crashed,
    Leak,
    Link,
    SimCluster,
    SimLoop,
    SimNetwork,
    SimNode,
    Verdict,
    cancellation_points,
    run,
    simulate,
    simulated,
)

ADD = request("counter:add", float, reply=int)
NEWS = broadcast("counter:news", str)
NAMES = ["alice", "bob", "carol"]


class Counter(Service):
    """Counts on the disk. Each addition takes as many seconds as it is told."""

    name = "counter"

    def __init__(self, node: SimNode) -> None:
        self.node = node
        self.heard: list[str] = []

    @handles(ADD)
    async def add(self, msg: Message[float]) -> int:
        await asyncio.sleep(msg.payload)
        count: int = self.node.store.get("count", 0) + 1
        self.node.store["count"] = count
        self.node.store.sync()
        return count

    @handles(NEWS)
    async def news(self, msg: Message[str]) -> None:
        self.heard.append(msg.payload)


def make(node: SimNode) -> Runtime:
    return Runtime(node.name, [Counter(node)], transport=node.transport(), identity=node.identity)


async def add(cluster: SimCluster, one: str, other: str, seconds: float = 0.0, timeout: float = 10.0) -> int:
    node = cluster[one]
    return await node.run(node.rt.call(ADD, seconds, to=cluster[other].id, timeout=timeout))


def cluster_test(test: Callable[[SimCluster, SimLoop], Any]) -> Callable[[], None]:
    @simulate(seeds=3)
    async def run_it(sim: SimLoop) -> None:
        async with SimCluster(make, NAMES) as cluster:
            await cluster.until(cluster.connected, timeout=1)
            await test(cluster, sim)

    def named() -> None:
        run_it()

    named.__name__ = named.__qualname__ = test.__name__
    return named


@cluster_test
async def test_nodes_prove_what_they_send_and_answer_one_another(cluster: SimCluster, sim: SimLoop) -> None:
    assert [node.name for node in cluster] == NAMES
    assert cluster.network.proved
    assert len({node.id for node in cluster} | set(NAMES)) == 6
    assert [await add(cluster, one, "bob") for one in NAMES] == [1, 2, 3]


def test_an_identity_comes_from_the_seed_and_stays_over_a_restart() -> None:
    async def main(sim: SimLoop) -> list[str]:
        async with SimCluster(make, NAMES) as cluster:
            before = [node.rt.node for node in cluster]
            await cluster.restart(*NAMES)
            assert [node.rt.node for node in cluster] == before
            return before

    assert simulated(1, main) == simulated(1, main) != simulated(2, main)


@cluster_test
async def test_a_crash_takes_what_runs_there_and_others_learn_of_it_by_silence(
    cluster: SimCluster, sim: SimLoop
) -> None:
    alice, bob = cluster["alice"], cluster["bob"]
    asked = asyncio.create_task(add(cluster, "alice", "bob", 100, timeout=60))
    asking = asyncio.create_task(add(cluster, "bob", "carol", 100, timeout=60))
    await asyncio.sleep(1)
    machine = bob.machine
    cluster.crash("bob")
    assert not bob.up
    assert bob.id in alice.rt.peers
    with pytest.raises(Crashed, match="node 'bob' crashed"):
        await asking
    await sim.settle()
    assert sim.now < 2
    assert not machine.tasks
    with pytest.raises(PeerLost):
        await asked
    await cluster.until(cluster.connected, timeout=10)
    with pytest.raises(Unreachable):
        await add(cluster, "alice", "bob")
    for attempt in (lambda: bob.machine, lambda: bob.store, bob.transport, lambda: cluster.crash("bob")):
        with pytest.raises(Crashed, match="node 'bob' is off"):
            attempt()
    with pytest.raises(Crashed, match="node 'bob' is off"):
        await add(cluster, "bob", "carol")


@cluster_test
async def test_nothing_that_a_dying_node_does_reaches_anybody(cluster: SimCluster, sim: SimLoop) -> None:
    bob = cluster["bob"]
    store, seen = bob.store, []

    async def scream() -> None:
        try:
            await asyncio.sleep(1000)
        finally:
            for attempt in (
                store.sync,
                lambda: store.update(x=1),
                lambda: store["x"],
                lambda: list(store),
                store.__len__,
            ):
                with pytest.raises(OSError, match="the computer has stopped"):
                    attempt()
            bob.rt.logger.service("counter").error("a dying node is heard")
            with pytest.raises(Unreachable):
                await bob.rt.call(ADD, 0, to=cluster["alice"].id)
            await bob.rt.emit(NEWS, "I die")
            await asyncio.sleep(1)
            seen.append("it was cancelled again")

    screaming = asyncio.create_task(bob.run(scream()))
    await asyncio.sleep(1)
    sent = cluster.network.verdicts.total()
    cluster.crash("bob")
    with pytest.raises(Crashed):
        await screaming
    assert cluster.network.verdicts.total() == sent
    await asyncio.sleep(5)
    assert not seen
    assert not cluster["alice"].rt.services[0].heard  # type: ignore[attr-defined]


@cluster_test
async def test_who_shields_itself_catches_its_cancellation_or_spawns_others_ends_in_the_crash(
    cluster: SimCluster, sim: SimLoop
) -> None:
    done: list[str] = []

    async def shielded() -> None:
        try:
            with anyio.CancelScope(shield=True):
                await asyncio.sleep(100)
        finally:
            with anyio.CancelScope(shield=True):
                await asyncio.sleep(1)
                done.append("it slept in its shield")

    async def catches() -> None:
        for _ in range(20):
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(100)
                done.append("it woke up")

    async def spawns(depth: int) -> None:
        try:
            await asyncio.sleep(1.5)
            done.append("a task that was spawned went on")
        finally:
            if depth:
                cluster_task(spawns(depth - 1))
            asyncio.get_running_loop().call_later(1, again)

    def again() -> None:
        done.append("a timer fired")
        asyncio.get_running_loop().call_later(1, again)

    cluster_task = asyncio.get_running_loop().create_task
    machine = cluster["bob"].machine
    for coro in (shielded(), catches(), spawns(5)):
        machine.create_task(coro)
    await asyncio.sleep(1)
    cluster.crash("bob")
    await asyncio.sleep(0.001)
    assert not machine.tasks
    await asyncio.sleep(200)
    assert not done


@cluster_test
async def test_the_last_acts_of_a_life_do_not_reach_the_next_one(cluster: SimCluster, sim: SimLoop) -> None:
    bob, ends = cluster["bob"], []

    async def dies() -> None:
        machine = bob.machine
        try:
            await asyncio.sleep(100)
        finally:
            ends.append((bob.up and bob.machine is not machine, sim.now))
            bob.store["ghost"] = True  # an error that nobody hears of

    for _ in range(10):
        bob.machine.create_task(dies())
    await asyncio.sleep(1)
    await cluster.restart("bob")
    assert ends == [(False, ends[0][1])] * 10  # all of them have ended before it was on again
    assert not bob.store

    async def looks() -> None:
        with pytest.raises(RuntimeError, match="not for what runs on another computer, or before its restart"):
            bob.store["ghost"] = True

    await cluster["alice"].run(looks())


@cluster_test
async def test_a_restart_keeps_what_was_synced_and_nothing_else(cluster: SimCluster, sim: SimLoop) -> None:
    bob = cluster["bob"]
    assert [await add(cluster, "alice", "bob") for _ in range(3)] == [1, 2, 3]
    runtime, machine = bob.rt, bob.machine
    await cluster.restart("bob")
    assert bob.rt is not runtime
    assert bob.machine is not machine
    await cluster.until(cluster.connected, timeout=10)
    assert await add(cluster, "alice", "bob") == 4
    await cluster.stop("bob")
    assert not bob.up
    await cluster.start()
    assert await add(cluster, "alice", "bob") == 5


@cluster_test
async def test_who_was_asked_before_a_restart_has_lost_the_call_and_answers_the_next(
    cluster: SimCluster, sim: SimLoop
) -> None:
    asked = asyncio.create_task(add(cluster, "alice", "bob", 100, timeout=60))
    await asyncio.sleep(1)
    await cluster.restart("bob")
    with pytest.raises(PeerLost):
        await asked
    assert sim.now < 2
    assert await add(cluster, "alice", "bob") == 1


@cluster_test
async def test_a_paused_node_does_nothing_and_then_all_of_it(cluster: SimCluster, sim: SimLoop) -> None:
    cluster.pause("bob")
    assert cluster["bob"].paused
    with pytest.raises(CallTimeout):
        await add(cluster, "alice", "bob", timeout=2)
    asked = asyncio.create_task(add(cluster, "alice", "bob", timeout=5))
    await asyncio.sleep(1)
    cluster.resume("bob")
    assert await asked == 1
    cluster.pause("bob")
    cluster.crash("bob")
    await cluster.restart("bob")
    cluster.pause("bob")  # it is resumed in the end, or could not stop


@cluster_test
async def test_cuts_and_holds_take_names_and_end(cluster: SimCluster, sim: SimLoop) -> None:
    bob, both = cluster["bob"], ["alice", "carol"]
    cluster.cut("bob")
    await cluster.until(lambda: not bob.rt.peers, timeout=10)
    assert len(cluster["alice"].rt.peers) == 1
    cluster.heal()
    await cluster.until(cluster.connected, timeout=10)
    cluster.cut(both, "bob", one_way=True)
    await cluster.until(lambda: not bob.rt.peers, timeout=10)
    cluster.heal("bob", both)
    cluster.hold("alice", "bob")
    with pytest.raises(CallTimeout):
        await add(cluster, "alice", "bob", timeout=1)
    assert cluster.network.verdicts[Verdict.HOLD]
    cluster.release("alice", "bob")
    cluster.release()
    await cluster.until(cluster.connected, timeout=10)
    assert await add(cluster, "alice", "bob") == 1
    with pytest.raises(KeyError, match="there is no node 'dave'; there are alice, bob, carol"):
        cluster.cut("dave")


@simulate(seeds=3)
async def test_clocks_are_those_of_the_node(sim: SimLoop) -> None:
    cluster = SimCluster(make, NAMES)
    bob = cluster["bob"]
    bob.rate, bob.wall_offset = 2.0, -10.0
    async with cluster:
        begun = sim.now
        await bob.run(asyncio.sleep(10))
        assert sim.now - begun == pytest.approx(5)

        async def wall() -> float:
            return _time.wall()

        assert await bob.run(wall()) - sim.wall_time() == pytest.approx(sim.now - 10)
        bob.wall_offset += 60
        assert await bob.run(wall()) - sim.wall_time() == pytest.approx(sim.now + 50)
        assert await add(cluster, "alice", "carol") == 1
        with pytest.raises(CallTimeout):  # a minute is out of the window
            await add(cluster, "bob", "carol", timeout=3)
        await cluster.restart("bob")
        assert await bob.run(wall()) - sim.wall_time() == pytest.approx(sim.now + 50)


@cluster_test
async def test_until_shows_where_everybody_is_when_time_is_over(cluster: SimCluster, sim: SimLoop) -> None:
    cluster.cut("bob", "carol")
    cluster.crash("alice")
    begun = sim.now
    with pytest.raises(AssertionError) as caught:
        await cluster.until(lambda: False, timeout=3)
    assert sim.now - begun == pytest.approx(3, abs=cluster.POLL)
    text = str(caught.value)
    assert re.search(r"after 3 s it is not so: .*<lambda> \(.*test_sim_cluster\.py:\d+\)\nat [\d.]+ s, SimNet", text)
    assert "('bob', 'carol')" in text
    assert "('carol', 'bob')" in text
    assert "\n  alice: off\n  bob: up, knows " in text
    assert "0 calls pending, 0 messages queued, 0 being handled" in text
    begun = sim.now
    await cluster.until(lambda: sim.now > begun + 1, timeout=2)
    await cluster.until(lambda: True, timeout=0)
    assert repr(cluster) == "SimCluster(alice off, bob up, carol up)"


def test_what_is_called_outside_of_its_computer_is_refused_and_fails_the_test() -> None:
    async def main(sim: SimLoop, verb: Callable[[SimCluster], Any]) -> None:
        async with SimCluster(make, NAMES) as cluster:
            await cluster.until(cluster.connected, timeout=1)
            with contextlib.suppress(Unreachable):
                await verb(cluster)

    verbs: list[Callable[[SimCluster], Any]] = [
        lambda cluster: cluster["alice"].rt.call(ADD, 0, to=cluster["bob"].id),
        lambda cluster: cluster["alice"].rt.emit(NEWS, "nobody hears it"),
        lambda cluster: cluster["alice"].rt.emit(NEWS, "nobody hears it", to=cluster["bob"].id),
    ]
    for verb in verbs:
        with pytest.raises(Leak, match=r"runs outside of its computer: `await cluster\['alice'\].run"):
            simulated(1, lambda sim, verb=verb: main(sim, verb))  # type: ignore[misc]


@cluster_test
async def test_who_waits_for_a_node_and_is_cancelled_cancels_it(cluster: SimCluster, sim: SimLoop) -> None:
    ended: list[str] = []

    async def work() -> None:
        try:
            await asyncio.sleep(100)
        finally:
            ended.append("cancelled")

    task = asyncio.create_task(cluster["alice"].run(work()))
    await asyncio.sleep(1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended == ["cancelled"]


@cluster_test
async def test_a_rule_of_the_network_may_crash_the_sender_at_a_frame(cluster: SimCluster, sim: SimLoop) -> None:
    def crash(sender: str, to: str, frame: bytes) -> Verdict | None:
        if sender != "bob" or not cluster["bob"].store.get("count"):
            return None
        cluster.network.rules.clear()
        cluster.crash("bob")
        return Verdict.LOSE

    cluster.network.rules.append(crash)
    with pytest.raises((PeerLost, CallTimeout)):
        await add(cluster, "alice", "bob")
    await cluster.restart("bob")
    assert await add(cluster, "alice", "bob") == 2  # it had crashed after its effect, and before its reply


class Fails(Service):
    name = "fails"

    async def start(self) -> None:
        raise OSError("no room")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda node: Runtime(node.name, [Fails()], transport=node.transport(), identity=node.identity), "failed"),
        (lambda node: Runtime(node.name, transport=node.transport(), identity=Identity.generate()), "has the id"),
        (lambda node: Runtime(node.name, identity=node.identity), "is not on the network: give it node.transport"),
        (lambda node: 1 / 0, "division"),
        (lambda node: None, "make must return a Runtime, not None"),
        (lambda node: asyncio.sleep(1), "make must return a Runtime, not <coroutine"),
    ],
)
@simulate(seeds=2)
async def test_a_node_that_cannot_start_takes_the_cluster_down(sim: SimLoop, wrong: Any, message: str) -> None:
    cluster = SimCluster(lambda node: wrong(node) if node.name == "bob" else make(node), NAMES)
    with pytest.raises(Exception, match=message):
        async with cluster:
            pytest.fail("it has started")
    assert not any(node.up for node in cluster)


@simulate(seeds=2)
async def test_when_the_block_fails_that_is_what_is_raised_and_all_crash(sim: SimLoop) -> None:
    cluster = SimCluster(make, NAMES)
    with pytest.raises(ZeroDivisionError):
        async with cluster:
            cluster.pause("bob")
            await asyncio.sleep(1 / 0)
    assert not any(node.up for node in cluster)
    assert sim.now < 0.1


@simulate(seeds=3)
async def test_a_node_may_crash_while_it_starts_or_stops(sim: SimLoop) -> None:
    cut_short = 0
    for number in range(20):
        async with SimCluster(make, NAMES) as cluster:
            await cluster.until(cluster.connected, timeout=1)
            verb = asyncio.create_task(cluster.restart("bob") if number % 2 else cluster.stop("bob"))
            for _ in range(number // 2):
                await asyncio.sleep(0)
            if cluster["bob"].up:
                cluster.crash("bob")
            try:
                await verb
            except Crashed:
                cut_short += 1
            await cluster.until(cluster.connected, timeout=16)
    assert cut_short > 5


@cluster_test
async def test_a_node_that_is_up_is_not_started(cluster: SimCluster, sim: SimLoop) -> None:
    with pytest.raises(RuntimeError, match="node 'bob' is up already"):
        await cluster.start("bob")
    await cluster.stop("bob")
    results = await asyncio.gather(cluster.start("bob"), cluster.start("bob"), return_exceptions=True)
    assert {type(result) for result in results} == {RuntimeError, type(None)}
    assert await add(cluster, "alice", "bob") == 1


def signal_when_made(cluster: SimCluster) -> asyncio.Event:
    """Return what is set when a runtime is made: the moment at which a node is up, and starts."""
    made = asyncio.Event()

    def make_and_tell(node: SimNode) -> Runtime:
        made.set()
        return make(node)

    cluster._make = make_and_tell
    return made


@cluster_test
async def test_a_start_that_is_cut_short_leaves_the_next_one_alone(cluster: SimCluster, sim: SimLoop) -> None:
    bob, made, cut_short = cluster["bob"], signal_when_made(cluster), 0
    for steps in range(8):
        cluster.crash("bob")
        made.clear()
        first = asyncio.create_task(cluster.start("bob"))
        await made.wait()
        for _ in range(steps):
            await asyncio.sleep(0)
        cluster.crash("bob")
        second = asyncio.create_task(cluster.start("bob"))
        results = await asyncio.gather(first, second, return_exceptions=True)
        cut_short += isinstance(results[0], Crashed)
        assert results[1] is None
        assert bob.up
    assert cut_short > 2
    assert await add(cluster, "alice", "bob") == 1


@cluster_test
async def test_a_stop_waits_for_the_start_and_a_second_stop_for_the_first(cluster: SimCluster, sim: SimLoop) -> None:
    bob, made = cluster["bob"], signal_when_made(cluster)
    for steps in range(8):
        cluster.crash("bob")
        made.clear()
        start = asyncio.create_task(cluster.start("bob"))
        await made.wait()
        for _ in range(steps):
            await asyncio.sleep(0)
        await asyncio.gather(cluster.stop("bob"), cluster.stop("bob"), cluster.stop())
        await start
        assert not bob.up
        await cluster.start()
    for verb in (cluster.pause, cluster.resume, cluster.crash):
        await cluster.stop("bob")
        with pytest.raises(Crashed, match="node 'bob' is off"):
            verb("alice", "bob")
        assert cluster["alice"].up
        assert not cluster["alice"].paused
        await cluster.start("bob")
    with pytest.raises(Crashed, match="node 'bob' is off"):
        await asyncio.gather(cluster.stop("bob"), cluster.stop("bob"))
        await cluster.stop("bob")


class Slow(Service):
    name = "slow"

    async def start(self) -> None:
        await asyncio.sleep(2)

    async def stop(self) -> None:
        await asyncio.sleep(2)


@simulate(seeds=3)
async def test_a_start_or_stop_that_is_cancelled_ends_as_a_crash(sim: SimLoop) -> None:
    async with SimCluster(
        lambda node: Runtime(node.name, [Slow()], transport=node.transport(), identity=node.identity), NAMES
    ) as cluster:
        bob = cluster["bob"]
        for verb in (cluster.stop, cluster.start):
            machine, begun = bob.machine if bob.up else None, sim.now
            with anyio.move_on_after(1) as scope:
                await verb("bob")
            assert scope.cancelled_caught
            assert sim.now == begun + 1
            assert not bob.up
            assert not (machine and machine.tasks)
        await cluster.start("bob")
        assert bob.up


@pytest.mark.parametrize("verb", ["start", "stop", "restart", "run"])
def test_a_verb_that_is_cancelled_at_any_await_leaves_a_cluster_that_goes_on(verb: str) -> None:
    def slow(node: SimNode) -> Runtime:
        rt = Runtime(node.name, [Slow()], transport=node.transport(), identity=node.identity)
        rt.logger.set_service_enabled("slow", False)
        return rt

    for point in cancellation_points():

        async def main(sim: SimLoop, point: CancellationPoint = point) -> None:
            async with SimCluster(slow, ["alice", "bob"]) as cluster:
                if verb == "start":
                    cluster.crash()
                await point.cancel(cluster["bob"].run(asyncio.sleep(1)) if verb == "run" else getattr(cluster, verb)())
                for node in cluster:
                    await node.over()
                assert not [task for task in sim.tasks if "meshkit:bob" in task.get_name() and not cluster["bob"].up]
                await cluster.start()
                await cluster.until(cluster.connected, timeout=20)

        simulated(1, main)


@cluster_test
async def test_who_waits_for_what_runs_on_a_paused_node_may_give_up(cluster: SimCluster, sim: SimLoop) -> None:
    ended: list[float] = []

    async def work() -> None:
        try:
            await asyncio.sleep(100)
        finally:
            ended.append(sim.now)

    for pause in (cluster.pause, lambda _: None):
        begun = sim.now
        task = asyncio.create_task(cluster["bob"].run(work()))
        await asyncio.sleep(1)
        pause("bob")
        with anyio.move_on_after(1) as scope:
            await cluster["bob"].run(work())
        task.cancel()
        await asyncio.wait([task])
        assert scope.cancelled_caught
        assert task.cancelled()
        assert sim.now == begun + 2
        cluster.resume("bob")
        await sim.settle()
    assert len(ended) == 3  # one had not begun


@cluster_test
async def test_without_names_verbs_mean_all(cluster: SimCluster, sim: SimLoop) -> None:
    cluster.crash("bob")
    cluster.pause()
    assert repr(cluster) == "SimCluster(alice paused, bob off, carol paused)"
    cluster.resume()
    before = [node.rt for node in cluster]
    await cluster.restart()
    assert all(node.up and node.rt is not rt for node, rt in zip(cluster, before, strict=True))
    await cluster.stop()
    assert repr(cluster) == "SimCluster(alice off, bob off, carol off)"
    for verb in (cluster.crash, cluster.pause, cluster.resume):
        verb()
    await cluster.stop()
    await cluster.start("carol")
    await cluster.restart("bob", "bob")
    cluster.crash()
    assert not any(node.up for node in cluster)


@cluster_test
async def test_links_and_the_trace_know_nodes_by_their_names(cluster: SimCluster, sim: SimLoop) -> None:
    log: list[str] = []
    sim.log = lambda line: log.append(line.partition(" ")[2])
    cluster.network.links["alice", "bob"] = Link(loss=1.0)
    with pytest.raises(CallTimeout):
        await add(cluster, "alice", "bob", timeout=1)
    assert cluster.network.verdicts[Verdict.LOSE]
    cluster["bob"].wall_offset = 3
    cluster.cut("alice", "bob")
    cluster.network.heal()
    cluster.pause("bob")
    cluster.resume("bob")
    await cluster.restart("bob")
    notes = [line for line in log if "#" not in line and " bytes, " not in line]
    assert notes == [
        "wall clock of bob +3 s",
        "cut alice > bob, bob > alice",
        "heal all",
        "pause bob",
        "resume bob",
        "crash bob",
        "bob is gone from the network",
        "start bob",
    ]
    assert any(re.fullmatch(r"alice > bob: \d+ bytes, lose", line) for line in log)


@cluster_test
async def test_nonsense_is_refused_where_it_is_said(cluster: SimCluster, sim: SimLoop) -> None:
    for names in ("alice", [], ["alice", "alice"]):
        with pytest.raises(ValueError, match=r"nodes must be one name or more, each once, like \['alice', 'bob'\]"):
            SimCluster(make, names)
    for rate in (0, -1, math.nan, math.inf):
        with pytest.raises(ValueError, match="rate must be finite"):
            cluster["bob"].rate = rate
    for offset in (math.nan, -math.inf):
        with pytest.raises(ValueError, match="wall_offset must be finite"):
            cluster["bob"].wall_offset = offset

    async def condition() -> bool:
        return False

    with pytest.raises(TypeError, match=r"a condition must answer at once, and not be async: .*condition \("):
        await cluster.until(condition, timeout=1)


@simulate(seeds=2)
async def test_what_was_used_before_a_restart_is_refused_after_it(sim: SimLoop) -> None:
    service, runtimes = Slow(), list[Runtime]()

    def same_service(node: SimNode) -> Runtime:
        return Runtime(node.name, [service], transport=node.transport(), identity=node.identity)

    def same_runtime(node: SimNode) -> Runtime:
        runtimes[:] = runtimes or [make(node)]
        return runtimes[0]

    for wrong in (same_service, same_runtime):
        async with SimCluster(wrong, ["alice"]) as cluster:
            with pytest.raises(ValueError, match="or a service of it, has been used before its restart: make new ones"):
                await cluster.restart("alice")
            assert not cluster["alice"].up


def test_what_a_stop_leaves_running_is_a_leak() -> None:
    async def main(sim: SimLoop) -> None:
        async with SimCluster(make, ["alice"]) as cluster:
            cluster["alice"].machine.create_task(asyncio.sleep(100), name="the one that was forgotten")

    with pytest.raises(Leak, match="the one that was forgotten"):
        simulated(1, main)


def test_a_task_that_refuses_to_end_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SimNode, "PATIENCE", 100)

    async def refuse() -> None:
        for _ in range(200):
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(1)

    async def main(sim: SimLoop) -> None:
        async with SimCluster(make, ["alice"]) as cluster:
            cluster["alice"].machine.create_task(refuse(), name="the stubborn one")
            await asyncio.sleep(1)
            cluster.crash("alice")

    with pytest.raises(RuntimeError, match="these tasks refuse to end: the stubborn one"):
        simulated(1, main)


def test_timers_of_a_crashed_node_do_not_fire() -> None:
    async def main(sim: SimLoop) -> None:
        async with SimCluster(make, ["alice", "bob"]) as cluster:

            async def later() -> None:
                asyncio.get_running_loop().call_later(5, pytest.fail, "it fired")

            await cluster["alice"].run(later())
            cluster.crash("alice")
            await asyncio.sleep(10)

    simulated(1, main)


def test_without_a_simulation_it_says_what_is_missing() -> None:
    async def main() -> None:
        SimCluster(make, NAMES)

    with pytest.raises(RuntimeError, match="a SimCluster needs a SimLoop"):
        run(main)


@simulate(seeds=1)
async def test_a_network_that_is_not_proved_needs_no_identities(sim: SimLoop) -> None:
    async with SimCluster(make, NAMES, network=SimNetwork()) as cluster:
        assert [node.id for node in cluster] == NAMES
        assert await add(cluster, "alice", "bob") == 1


# --- the store


def test_of_what_was_not_synced_each_key_survives_or_not() -> None:
    async def main(sim: SimLoop) -> str:
        async with SimCluster(make, ["alice"]) as cluster:
            alice = cluster["alice"]
            alice.store.update(old=1, deleted=1, list=[1])
            alice.store.sync()
            del alice.store["deleted"]
            alice.store.update(old=2, new=2)
            alice.store["list"].append(2)  # a copy
            assert dict(alice.store) == {"old": 2, "list": [1], "new": 2}
            assert len(alice.store) == 3
            await cluster.restart("alice")
            return repr(sorted(alice.store.items()))

    seen = {simulated(seed, main) for seed in range(60)}
    assert len(seen) == 8
    assert all("('list', [1])" in each for each in seen)


def test_what_stops_in_good_order_keeps_all_that_was_written() -> None:
    async def main(sim: SimLoop) -> None:
        async with SimCluster(make, ["alice"]) as cluster:
            alice = cluster["alice"]
            store = alice.store
            store["old"] = 1
            await cluster.stop()
            with pytest.raises(OSError, match="the computer has stopped"):
                store["new"] = 1
            await cluster.start()
            assert dict(alice.store) == {"old": 1}
            with pytest.raises(KeyError):
                alice.store["new"]
            with pytest.raises(KeyError):
                del alice.store["new"]
            assert repr(alice.store) == "SimStore(1 keys, 0 not synced)"

    simulated(1, main)
