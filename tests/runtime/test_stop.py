"""The end of a node, when something else happens at the same time: who is told of what, and what still works."""

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any

import anyio
import pytest

from meshkit.runtime import Drop, Message, Runtime, Service, ServiceFailed, Stage, handles, local
from meshkit.testing import CancellationPoint
from tests.runtime.nodes import SLEEP, Node, Stash, everywhere
from tests.runtime.test_life import Noted, SlowTransport, nothing_is_left, now
from tests.runtime.test_messages import balanced, settle

TICK = local("clock:tick", int)
URGENT = local("clock:urgent", int, overflow="refuse")
ONE_BY_ONE = local("clock:one_by_one", int, max_mailbox=1, max_concurrent=1)


class Clock(Service):
    """Emits something all the time."""

    name = "clock"

    async def start(self) -> None:
        self.spawn(self.tick)

    async def tick(self) -> None:
        while True:
            await self.rt.emit(TICK, 1)
            await self.rt.emit(URGENT, 1)
            await asyncio.sleep(0.1)


class Hears(Service):
    """Takes a second for each of them, and as long to stop as it is told."""

    def __init__(self, name: str, stop: float = 0.0) -> None:
        self.name = name
        self.heard: list[int] = []
        self._stop = stop

    @handles(TICK)
    @handles(URGENT)
    async def hear(self, msg: Message[int]) -> None:
        self.heard.append(msg.payload)

    @handles(ONE_BY_ONE)
    async def slowly(self, msg: Message[int]) -> None:
        self.heard.append(msg.payload)
        await asyncio.sleep(1)

    async def stop(self) -> None:
        await asyncio.sleep(self._stop)


# --- services that have stopped, and those that have not


async def test_who_emits_to_a_service_that_has_stopped_goes_on_and_what_it_missed_is_counted() -> None:
    async with Node("alice", Clock(), Hears("hears", stop=9.05)) as alice:
        await asyncio.sleep(0.05)
    assert alice.logged == ""
    dropped = alice.stats().dropped
    assert dropped == {(kind.kind, "mailbox", "draining"): 91 for kind in (TICK, URGENT)}
    assert balanced(alice)


async def test_a_service_that_has_stopped_takes_nothing_from_the_others() -> None:
    still = Hears("still")
    async with Node("alice", still, Clock(), Hears("stops", stop=0.55)):
        pass
    assert len(still.heard) == 2 * 6


@pytest.mark.parametrize("others", [0, 1])
async def test_an_emit_that_waits_for_a_service_that_stops_then_waits_for_the_others_only(others: int) -> None:
    emitted: list[float] = []

    async def emit_four(service: Service) -> None:
        async def emit() -> None:
            for number in range(4):
                await service.rt.emit(ONE_BY_ONE, number)
                emitted.append(now())

        service.spawn(emit)

    listens = [Hears("listens") for _ in range(others)]
    async with Node("alice", *listens, Noted("first", [], start=emit_four), Hears("stops", stop=9.0), grace=0) as alice:
        await settle()
        assert emitted == [0, 0], "one that is handled, and one that waits"
    assert emitted == ([0, 0, 1, 2] if others else [0, 0, 0.001, 0.001])
    assert [len(service.heard) for service in listens] == [4] * others
    assert alice.stats().dropped == {(ONE_BY_ONE.kind, "mailbox", "draining"): 2}
    assert balanced(alice)


# --- what a hook awaits is cancelled, and not the hook


async def await_what_was_cancelled(service: Service) -> None:
    future = asyncio.get_running_loop().create_future()
    future.cancel()
    await future


def is_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


async def test_a_start_that_awaits_what_was_cancelled_has_failed() -> None:
    diary: list[str] = []
    with pytest.raises(ServiceFailed) as caught:
        await Node("alice", Noted("one", diary), Noted("two", diary, start=await_what_was_cancelled)).start()
    assert str(caught.value) == "start() of service 'two' on node 'alice' failed: CancelledError"
    assert isinstance(caught.value.__cause__, asyncio.CancelledError)
    assert diary[-1] == "one stopped"
    assert not is_cancelled()


async def test_an_init_that_ends_with_a_cancellation_or_a_group_has_failed() -> None:
    class Odd(Service):
        name = "odd"
        error: BaseException

        def init(self) -> None:
            raise self.error

    for Odd.error in (asyncio.CancelledError(), BaseExceptionGroup("odd", [asyncio.CancelledError()])):
        with pytest.raises(ServiceFailed, match=r"init\(\) of service 'odd'"):
            await Node("alice", Odd()).start()


async def test_a_transport_that_awaits_what_was_cancelled_as_it_starts_does_not_cancel_the_host() -> None:
    class Broken(SlowTransport):
        async def start(self, *args: object) -> None:
            raise asyncio.CancelledError

    with pytest.raises(RuntimeError, match="the transport of node 'alice' awaited something that was cancelled"):
        await Runtime("alice", transport=Broken()).start()
    assert nothing_is_left()


async def test_a_stop_that_cancels_a_task_and_awaits_it_costs_nobody_his_grace() -> None:
    class Feed(Service):
        name = "feed"

        async def start(self) -> None:
            self.task = asyncio.create_task(asyncio.sleep(3600))

        async def stop(self) -> None:
            self.task.cancel()
            await self.task

    stash = Stash()
    asked: list[asyncio.Task[float]] = []

    async def ask(service: Service) -> None:
        asked.append(asyncio.create_task(service.rt.call(SLEEP, 3.0, to="alice")))
        await settle()

    async with Node("alice", stash, Feed(), Noted("asks", [], stop=ask)) as alice:
        pass
    assert await asked[0] == 3.0
    assert stash.cancelled == []
    text = "node 'alice' stops: stop() awaited something that was cancelled, and what comes after that has not run"
    assert f"[feed] WARNING {text}" in alice.logged
    assert alice.logged.count("\n") == 1


# --- the body fails, too


async def stop_badly(service: Service) -> None:
    raise OSError("cannot close the file")


@pytest.mark.parametrize("error", [ValueError("my bug"), SystemExit(3), BaseExceptionGroup("", [SystemExit(3)])])
async def test_what_the_body_raised_is_not_lost_where_a_stop_fails(error: BaseException) -> None:
    alice = Node("alice", Noted("one", [], stop=stop_badly))
    with pytest.raises(type(error)) as caught:
        async with alice:
            raise error
    assert caught.value is error
    assert error.__notes__ == [
        "as the runtime stopped, stop() of service 'one' on node 'alice' failed: OSError: cannot close the file"
    ]
    assert "OSError: cannot close the file" in alice.logged, "with its traceback"


async def test_a_body_that_is_cancelled_tells_that_a_stop_failed() -> None:
    with anyio.move_on_after(1), pytest.raises(ServiceFailed, match="cannot close the file"):
        async with Node("alice", Noted("one", [], stop=stop_badly)):
            await asyncio.sleep(1000)
    assert now() == 1


async def test_a_body_that_stops_its_runtime_gets_the_failure_once() -> None:
    with pytest.raises(ServiceFailed, match="cannot close the file") as caught:
        async with Node("alice", Noted("one", [], stop=stop_badly)) as alice:
            await alice.stop()
    assert caught.value.__context__ is None


# --- the body, or a hook, makes its own runtime fail


def fail(message: Message[int]) -> Drop:
    raise ZeroDivisionError("a stage")


FATAL = local("fatal:now", int, on_error="raise", stages=[Stage("fails", fail)])


class Fatal(Service):
    """Handles what never comes to it."""

    name = "fatal"

    @handles(FATAL)
    async def handle(self, msg: Message[int]) -> None: ...


@pytest.mark.parametrize("then", [0.0, 1000.0, None])
async def test_a_body_that_makes_its_runtime_fail_is_told_why(then: float | None) -> None:
    with pytest.raises(ServiceFailed, match="a stage"):
        async with Node("alice", Fatal()) as alice:
            await alice.emit(FATAL, 1)
            if then is not None:
                await asyncio.sleep(then)
    assert now() == 0
    assert not is_cancelled()
    await asyncio.sleep(1)  # and nothing is to come
    assert nothing_is_left()


@pytest.mark.parametrize("then", [0.0, 1000.0, None])
async def test_a_start_that_makes_its_runtime_fail_is_told_why(then: float | None) -> None:
    async def emit(service: Service) -> None:
        await service.rt.emit(FATAL, 1)
        if then is not None:
            await asyncio.sleep(then)

    diary: list[str] = []
    with pytest.raises(ServiceFailed, match="a stage"):
        async with Node("alice", Noted("first", diary, stop=1.0), Fatal(), Noted("two", diary, start=emit)):
            pass
    assert diary[-1] == "first stopped"
    assert now() == 1
    assert not is_cancelled()


async def test_a_task_that_fails_while_a_failed_start_is_undone_cuts_nothing_short() -> None:
    async def fail_after_a_second() -> None:
        await asyncio.sleep(1)
        raise ValueError("second")

    async def spawn(service: Service) -> None:
        service.spawn(fail_after_a_second)

    diary: list[str] = []
    spawns = Noted("spawns", diary, start=spawn)
    spawns.max_restarts = 0
    alice = Node("alice", spawns, Noted("slow", diary, stop=3.0), Noted("fails", diary, start=stop_badly))
    with pytest.raises(ServiceFailed):
        await alice.start()
    assert now() == 3
    assert diary[-4:] == ["slow stopping", "slow stopped", "spawns stopping", "spawns stopped"]


@pytest.mark.parametrize("group", [asyncio.TaskGroup, anyio.create_task_group])
@pytest.mark.parametrize("inside", [True, False])
async def test_it_fails_within_a_task_group_or_around_it(group: Callable[[], Any], inside: bool) -> None:
    alice = Node("alice", Fatal())
    failed: list[BaseException] = []

    async def body() -> None:
        async with contextlib.AsyncExitStack() as stack:
            for context in (group(), alice) if inside else (alice, group()):
                await stack.enter_async_context(context)
            await alice.emit(FATAL, 1)
            await asyncio.sleep(1000)

    try:
        await body()
    except* ServiceFailed as errors:
        failed.extend(errors.exceptions)
    assert len(failed) == 1
    assert now() == 0
    assert not is_cancelled()
    assert nothing_is_left()


# --- an init that fails


async def test_where_the_first_init_fails_it_is_told_although_the_others_have_not_begun() -> None:
    class Fails(Service):
        name = "fails"

        def init(self) -> None:
            raise ValueError("no")

    diary: list[str] = []
    with pytest.raises(ServiceFailed, match=r"init\(\) of service 'fails' on node 'alice' failed: ValueError: no"):
        await Node("alice", Fails(), Noted("one", diary)).start()
    assert diary == []
    assert nothing_is_left()


# --- nodes that stop each other


class Stops(Service):
    """Stops other nodes when it stops, or as soon as it has started."""

    stop_timeout = 2.0

    def __init__(self, *others: Runtime, aside: bool = False) -> None:
        self.name = "stops"
        self.others = list(others)
        self.aside = aside

    async def stop(self) -> None:
        if self.aside:  # in tasks of their own
            async with asyncio.TaskGroup() as group:
                for other in self.others:
                    group.create_task(other.stop())
        for other in self.others:
            await other.stop()


@pytest.mark.parametrize("aside", [False, True])
async def test_nodes_that_stop_each_other_all_stop_at_once_and_none_waits_for_itself(aside: bool) -> None:
    services = [Stops(aside=aside) for _ in range(3)]
    nodes = [Node(name, service) for name, service in zip("abc", services, strict=True)]
    for number, service in enumerate(services):
        service.others = [nodes[number - 1], nodes[number - 2], nodes[number]]
    for node in nodes:
        await node.start()
    await nodes[0].stop()
    for node in nodes:
        await node.wait()
    assert now() == 0
    assert nothing_is_left()


def test_a_stop_of_nodes_that_stop_each_other_may_be_cancelled_anywhere() -> None:
    async def scenario(point: CancellationPoint) -> None:
        services = [Stops(), Stops()]
        nodes = [Node(name, service) for name, service in zip("ab", services, strict=True)]
        for node, service in zip(nodes, reversed(services), strict=True):
            service.others = [node]
            await node.start()
        await point.cancel(nodes[0].stop())
        for node in nodes:
            await node.stop()
        assert nothing_is_left()

    everywhere(scenario)
