"""The life of a node: start, readiness, failing starts, stop, drain, cancellation of all that."""

import asyncio
import contextlib
import logging
import re
from typing import Any, cast

import anyio
import pytest

from meshkit.errors import Closed, Draining, PeerLost
from meshkit.logger import Logger
from meshkit.runtime import Message, Runtime, Service, ServiceFailed, handles
from meshkit.runtime.frame import Prover
from meshkit.runtime.transport import Alone, Receiver
from meshkit.testing import CancellationPoint, run
from meshkit.transports import MemoryHub, MemoryTransport
from tests.runtime.nodes import SLEEP, STORE, STORED, TEASE, Node, Stash, Store, everywhere, mesh
from tests.runtime.test_messages import balanced, settle


class Noted(Service):
    """Notes its life in a diary that several share."""

    def __init__(self, name: str, diary: list[str], **hooks: Any) -> None:
        self.name = name
        self.diary = diary
        self.hooks = hooks

    def init(self) -> None:
        self.note("init")

    async def start(self) -> None:
        self.note("starting")
        await self.do("start")
        self.note("started")

    async def stop(self) -> None:
        self.note("stopping")
        await self.do("stop")
        self.note("stopped")

    def note(self, what: str) -> None:
        self.diary.append(f"{self.name} {what}")

    async def do(self, hook: str) -> None:
        what = self.hooks.get(hook, 0.0)
        if isinstance(what, Exception):
            raise what
        if callable(what):
            await what(self)
        else:
            await asyncio.sleep(what)


def now() -> float:
    return asyncio.get_running_loop().time()


def nothing_is_left() -> bool:
    return asyncio.all_tasks() <= {asyncio.current_task()}


async def test_services_start_in_order_and_stop_in_reverse() -> None:
    diary: list[str] = []
    async with Node("alice", Noted("one", diary, start=1.0), Noted("two", diary), Noted("three", diary)) as alice:
        diary.append("body")
        assert repr(alice) == "Runtime('alice', services=[one, two, three], running)"
    assert diary == [
        *["one init", "two init", "three init"],
        *["one starting", "one started", "two starting", "two started", "three starting", "three started"],
        "body",
        *["three stopping", "three stopped", "two stopping", "two stopped", "one stopping", "one stopped"],
    ]
    assert nothing_is_left()


async def test_a_service_has_its_runtime_and_its_log_from_init_on() -> None:
    class Looks(Service):
        name, emoji = "looks", "👀"

        def init(self) -> None:
            assert self.rt is alice
            assert self.log is self.rt.log("looks") is self.rt.logger.service("looks")
            self.log.info("here")

    alice = Node("alice", Looks())
    async with alice:
        pass
    assert "👀 [looks] here" in alice.logged


async def test_every_task_says_whose_it_is() -> None:
    class Busy(Stash):
        async def start(self) -> None:
            self.spawn(asyncio.sleep, 1000.0, name="beat")
            self.spawn(self.named_after_its_function)

        async def named_after_its_function(self) -> None:
            await asyncio.sleep(1000)

    async with Node("alice", Busy()) as alice:
        await alice.call(STORE, Store("x"), to="alice")
        names = {task.get_name() for task in asyncio.all_tasks() - {asyncio.current_task()}}
        assert names == {
            "meshkit:alice:runtime:life",
            "meshkit:alice:stash:worker-1",
            "meshkit:alice:stash:beat",
            "meshkit:alice:stash:named_after_its_function",
        }
    assert nothing_is_left()


async def test_messages_wait_until_their_service_is_ready() -> None:
    async def ask_later_one(service: Service) -> None:
        with pytest.raises(TimeoutError):
            await service.rt.call(STORE, Store("x"), to="bob", timeout=1)

    diary: list[str] = []
    async with mesh("alice") as (hub, [alice], _):
        stash = Stash()
        bob = Node("bob", Noted("first", diary, start=ask_later_one), stash, Noted("last", diary, start=5.0), hub=hub)
        starting = asyncio.create_task(bob.start())
        await settle()
        assert repr(bob).endswith("starting)")
        asked = asyncio.create_task(alice.call(STORE, Store("y"), to="bob"))
        await asyncio.sleep(0.9)
        assert stash.begun == []
        await asked
        assert 1 <= now() < 5, "it did not wait for services that start later"
        await starting
        assert stash.begun == ["y"], "and what had expired never started"
        await bob.stop()


async def test_a_failing_start_stops_what_had_started_and_raises_the_cause() -> None:
    diary: list[str] = []
    hub: Any = MemoryHub()
    services = [Noted("one", diary), Noted("two", diary, start=ValueError("no disk")), Noted("three", diary)]
    alice = Node("alice", *services, hub=hub)
    with pytest.raises(ServiceFailed) as caught:
        async with alice:
            pytest.fail("it did not start")
    assert str(caught.value) == "start() of service 'two' on node 'alice' failed: ValueError: no disk"
    assert isinstance(caught.value.__cause__, ValueError)
    assert diary[3:] == ["one starting", "one started", "two starting", "one stopping", "one stopped"]
    assert hub.nodes == ()
    assert nothing_is_left()
    assert repr(alice).endswith("stopped)")
    services[1].hooks.clear()
    async with alice:
        assert hub.nodes == ("alice",)


async def test_a_failing_init_starts_nothing() -> None:
    class Fails(Service):
        name = "fails"

        def init(self) -> None:
            raise ValueError("no")

    diary: list[str] = []
    with pytest.raises(ServiceFailed, match=r"init\(\) of service 'fails' on node 'alice' failed: ValueError: no"):
        await Node("alice", Noted("one", diary), Fails()).start()
    assert diary == ["one init"]
    assert nothing_is_left()


async def test_a_start_that_takes_too_long_fails() -> None:
    diary: list[str] = []
    slow = Noted("slow", diary, start=100.0)
    slow.start_timeout = 3.0
    with pytest.raises(ServiceFailed, match="TimeoutError: it took longer than 3 s"):
        await Node("alice", slow).start()
    assert now() == 3
    assert nothing_is_left()


async def test_background_tasks_of_a_service_whose_start_fails_are_ended() -> None:
    async def spawn_and_fail(service: Service) -> None:
        service.spawn(asyncio.sleep, 1000.0)
        await asyncio.sleep(1)
        raise ValueError

    with pytest.raises(ServiceFailed):
        await Node("alice", Noted("one", [], start=spawn_and_fail)).start()
    assert nothing_is_left()


async def test_what_is_declared_wrongly_is_told_before_anything_starts() -> None:
    diary: list[str] = []
    with pytest.raises(ValueError, match="node 'alice' cannot start:\n  service 'one': the name is taken"):
        await Node("alice", Noted("one", diary), Noted("one", diary)).start()
    assert diary == []


async def test_a_service_object_runs_in_one_runtime_at_a_time() -> None:
    stash = Stash()
    async with Node("alice", stash):
        with pytest.raises(ValueError, match="service 'stash': this object runs already; each runtime needs one of i"):
            await Node("bob", stash).start()
    async with Node("bob", stash):
        pass


async def test_after_a_failed_start_there_is_nothing_to_stop() -> None:
    alice = Node("alice", Noted("one", [], start=ValueError("no")))
    for _ in range(2):
        with pytest.raises(ServiceFailed):
            await alice.start()
        await alice.stop()
        with pytest.raises(ServiceFailed):
            await alice.wait()


async def test_what_is_not_a_service_is_told_and_shown() -> None:
    alice = Node("alice", cast("Any", 3))
    assert repr(alice) == "Runtime('alice', services=[?], not started)"
    with pytest.raises(ValueError, match="3 is not a service"):
        await alice.start()


async def test_a_runtime_runs_once_at_a_time_and_again_when_it_has_stopped() -> None:
    alice = Node("alice", Stash())
    for _ in range(3):
        async with alice:
            assert (await alice.call(STORE, Store("x"), to="alice")).size == 0
            assert alice.stats().handled == 1
            with pytest.raises(RuntimeError, match="node 'alice' is running already"):
                await alice.start()
            with pytest.raises(RuntimeError, match="node 'alice' is running already"):
                async with alice:
                    pass
        assert alice.stats().handled == 1
    assert nothing_is_left()


def test_a_runtime_may_run_in_two_loops_one_after_the_other() -> None:
    stash, hub = Stash(), MemoryHub()
    alice = Node("alice", stash, hub=hub)

    async def main() -> None:
        async with alice:
            await alice.call(STORE, Store("x"), to="alice")

    run(main)
    run(main)
    assert stash.begun == ["x", "x"]


def test_a_runtime_whose_loop_was_closed_under_it_can_start_in_another() -> None:
    stash, hub = Stash(), MemoryHub()
    alice = Node("alice", stash, hub=hub)
    loop = asyncio.new_event_loop()
    loop.run_until_complete(alice.start())
    loop.close()

    async def main() -> None:
        async with alice:
            await alice.call(STORE, Store("x"), to="alice")

    async def other_loop() -> None:
        await alice.stop()
        for verb in (alice.wait(), alice.emit(STORED, [])):
            with pytest.raises(RuntimeError, match="node 'alice' runs on another event loop: await it there"):
                await verb

    run(other_loop)
    run(main)
    assert stash.begun == ["x"]


def test_construction_needs_no_loop() -> None:
    alice = Runtime("alice", [Stash()], transport=MemoryTransport(MemoryHub()))
    assert repr(alice) == "Runtime('alice', services=[stash], not started)"
    assert alice.peers == {}
    assert alice.stats().sent == 0


@pytest.mark.parametrize("name", ["", "a b", None, 3])
def test_a_node_needs_a_name(name: Any) -> None:
    with pytest.raises(ValueError, match="the name of a node must be text without spaces"):
        Runtime(name)


@pytest.mark.parametrize(
    ("what", "given", "fault"),
    [
        ("services", Stash(), "services must be a list of services, not <"),
        ("identity", "alice", "identity must be an Identity, such as Identity.load_or_create(path), not 'alice'"),
        ("transport", MemoryHub(), "transport must be one, such as MemoryTransport(hub), not MemoryHub("),
        ("transport", MemoryTransport, "transport must be one, such as MemoryTransport(hub), not <class"),
        ("logger", logging.getLogger(), "logger must be a meshkit.Logger, not <RootLogger"),
    ],
)
def test_what_a_runtime_is_made_of_is_checked(what: str, given: Any, fault: str) -> None:
    with pytest.raises(TypeError, match="^" + re.escape(fault)):
        Runtime("alice", **{what: given})


def test_a_service_says_from_when_on_it_has_a_runtime_and_a_log() -> None:
    service: Any = Stash()
    for name in ("rt", "log"):
        with pytest.raises(AttributeError, match=rf"self\.{name} of Stash is there from init\(\) on, when its runtime"):
            getattr(service, name)
    with pytest.raises(AttributeError, match=r"^'Stash' object has no attribute 'lgo'$"):
        service.lgo  # noqa: B018


@pytest.mark.parametrize("grace", [-1, float("nan"), float("inf"), "1"])
def test_the_grace_is_checked(grace: Any) -> None:
    with pytest.raises((ValueError, TypeError), match="grace must be"):
        Runtime("alice", grace=grace)


async def test_loggers_can_be_disabled_and_verbose(capsys: pytest.CaptureFixture[str]) -> None:
    alice = Runtime("alice", [Stash()], disabled_loggers=["social"], verbose_loggers=["stash"])
    async with alice:
        alice.log("social").error("not seen")
        alice.log("stash").debug("seen")
        alice.log("other").event("tease", "bob", target="carol")
    err = capsys.readouterr().err
    assert "not seen" not in err
    assert "seen" in err
    assert "bob teased carol" in err, "what was grouped is written when it stops"
    async with alice:
        alice.log("stash").event("tease", "dave")


async def test_what_was_set_on_its_own_logger_holds_after_a_restart(capsys: pytest.CaptureFixture[str]) -> None:
    alice = Runtime("alice", [Stash()])
    alice.logger.register_formatter("stash", "store", lambda entries: f"{len(entries)} nodes stored")
    alice.logger.set_service_enabled("noisy", False)
    log = alice.log("stash")
    for times in (1, 2):
        async with alice:
            log.event("store", "bob")
            alice.log("stash").event("store", "carol")
            alice.log("noisy").error("not seen")
        assert capsys.readouterr().err.count("2 nodes stored\n") == 1, f"start {times}"
    assert alice.log("stash") is log


async def test_a_logger_that_was_given_is_flushed_and_stays_open() -> None:
    async with mesh("alice") as (_, [alice], _):
        alice.log("stash").event("tease", "bob", target="carol")
    assert "bob teased carol" in alice.logged
    alice.log("stash").event("store", "dave", target="carol")
    assert "dave" not in alice.logged
    alice.logger.close()
    assert "dave stored carol" in alice.logged


async def test_when_stop_runs_neither_handlers_nor_background_tasks_do() -> None:
    running: list[str] = []

    class Careful(Service):
        name = "careful"

        async def start(self) -> None:
            self.spawn(self.work, "task")

        async def work(self, what: str) -> None:
            running.append(what)
            try:
                await asyncio.sleep(1000)
            finally:
                await asyncio.sleep(0.5)
                running.remove(what)

        @handles(TEASE)
        async def tease(self, msg: Message[str]) -> None:
            await self.work("handler")

        async def stop(self) -> None:
            assert running == []
            with pytest.raises(RuntimeError, match="cannot begin: its service has stopped"):
                self.spawn(self.work, "late")

    async with Node("alice", Careful(), grace=1) as alice:
        await alice.emit(TEASE, "x")
        await settle()
        assert running == ["task", "handler"]
    assert nothing_is_left()


async def test_spawn_needs_a_service_that_runs() -> None:
    service = Noted("one", [])
    with pytest.raises(RuntimeError, match=r"Noted does not run: spawn its background tasks in start\(\)"):
        service.spawn(asyncio.sleep, 1.0)
    async with Node("alice", service):
        await service.spawn(asyncio.sleep, 1.0)
    with pytest.raises(RuntimeError, match="Noted does not run"):
        service.spawn(asyncio.sleep, 1.0)


async def test_while_a_service_stops_it_can_use_those_that_started_before_it_and_other_nodes() -> None:
    async def say_goodbye(service: Service) -> None:
        for to in ("alice", "bob"):
            await service.rt.call(STORE, Store("goodbye"), to=to)
        await service.rt.emit(STORED, ["goodbye"])
        await service.rt.emit(TEASE, "goodbye")

    async with mesh("bob") as (hub, _, [bobs]):
        stash = Stash()
        async with Node("alice", stash, Noted("last", [], stop=say_goodbye), hub=hub):
            pass
        await settle()
        assert stash.begun == bobs.begun == ["goodbye"]
        assert len(stash.stored) == 1
        assert [tease.payload for tease in bobs.teases] == ["goodbye"]


async def test_a_service_that_stops_too_late_is_refused_by_those_that_have_stopped() -> None:
    async def ask_too_late(service: Service) -> None:
        with pytest.raises(Draining):
            await service.rt.call(STORE, Store("x"), to="alice")
        await service.rt.emit(TEASE, "x")
        await service.rt.emit(STORED, ["x"])

    async with Node("alice", Noted("first", [], stop=ask_too_late), Stash()) as alice:
        pass
    assert alice.stats().dropped == {
        ("stash:stored", "mailbox", "draining"): 1,
        ("stash:store", "mailbox", "draining"): 1,
        ("social:tease", "mailbox", "draining"): 1,
    }


def plain_task_factory(loop: asyncio.AbstractEventLoop, coro: Any, **options: Any) -> asyncio.Task[Any]:
    return asyncio.Task(coro, loop=loop, **options)


async def test_it_runs_where_tasks_are_eager_to_begin() -> None:
    loop = asyncio.get_running_loop()
    loop.set_task_factory(getattr(asyncio, "eager_task_factory", plain_task_factory))  # eager from 3.12 on
    hub = MemoryHub()
    try:
        one, two = Node("alice", Stash(), Noted("x", []), hub=hub), Node("bob", Stash(), hub=hub)
        async with one as alice, two:
            calls = [alice.call(SLEEP, 1.0, to="bob") for _ in range(200)]
            assert await asyncio.gather(*calls) == [1.0] * 200
            for _ in range(2000):
                await alice.emit(STORED, [])
            assert await alice.call(SLEEP, 1.0, to="alice") == 1.0
            assert balanced(alice)
    finally:
        loop.set_task_factory(None)
    assert nothing_is_left()


async def test_a_failing_stop_does_not_keep_the_others_from_stopping_and_is_raised_at_the_end() -> None:
    diary: list[str] = []
    one, two = Noted("one", diary, stop=ValueError("disk")), Noted("two", diary, stop=ValueError("first"))
    alice = Node("alice", Noted("zero", diary), one, two)
    with pytest.raises(ServiceFailed) as caught:
        async with alice:
            pass
    assert str(caught.value) == "stop() of service 'two' on node 'alice' failed: ValueError: first"
    assert diary[-4:] == ["two stopping", "one stopping", "zero stopping", "zero stopped"]
    assert "ValueError: disk" in alice.logged
    assert nothing_is_left()


async def test_a_stop_that_takes_too_long_is_cut() -> None:
    diary: list[str] = []
    slow = Noted("slow", diary, stop=100.0)
    slow.stop_timeout = 3.0
    with pytest.raises(ServiceFailed, match="TimeoutError: it took longer than 3 s"):
        async with Node("alice", slow):
            pass
    assert now() == 3
    assert nothing_is_left()


async def test_a_handler_that_ignores_its_cancellation_is_left_behind_named_and_its_caller_is_answered() -> None:
    release = asyncio.Event()

    class Stubborn(Service):
        name = "stubborn"
        stop_timeout = 2.0

        @handles(SLEEP)
        async def sleep(self, msg: Message[float]) -> float:
            while not release.is_set():
                with contextlib.suppress(asyncio.CancelledError):
                    await release.wait()
            return 0.0

    async with mesh("alice") as (hub, [alice], _):
        bob = Node("bob", Stubborn(), hub=hub, grace=1)
        await bob.start()
        asked = asyncio.create_task(alice.call(SLEEP, 1.0, to="bob", timeout=100))
        await settle()
        await bob.stop()
        assert now() == pytest.approx(3.001)
        assert "tasks that ignored their cancellation are left behind: meshkit:bob:stubborn:worker-1" in bob.logged
        assert "PeerLost" in repr((await asyncio.gather(asked, return_exceptions=True))[0])
        release.set()
        await settle()


async def test_the_transport_fails_to_start() -> None:
    hub, diary = MemoryHub(), list[str]()
    async with Node("alice", hub=hub):
        with pytest.raises(ValueError, match="there is a node of that name"):
            await Node("alice", Noted("one", diary), hub=hub).start()
        assert hub.nodes == ("alice",)
    assert diary == ["one init"]
    assert nothing_is_left()


async def test_one_transport_cannot_serve_two_runtimes() -> None:
    transport = MemoryTransport(MemoryHub())
    async with Runtime("alice", transport=transport):
        with pytest.raises(RuntimeError, match="give each runtime a MemoryTransport of its own"):
            await Runtime("bob", transport=transport).start()
        assert not transport.peers
        assert "node='alice'" in repr(transport)


class SlowTransport(Alone):
    """Takes a second to start and to close."""

    def __init__(self, close: float | Exception = 1.0) -> None:
        self.diary: list[str] = []
        self._close = close

    async def start(self, node: str, receiver: Receiver, prover: Prover | None) -> None:
        await asyncio.sleep(1)
        self.diary.append("started")

    async def close(self) -> None:
        if isinstance(self._close, Exception):
            raise self._close
        await asyncio.sleep(self._close)
        self.diary.append("closed")


async def test_a_transport_that_fails_or_hangs_when_it_closes_is_logged() -> None:
    for close, logged in ((OSError("broken"), "OSError: broken"), (100.0, "it took longer than 10 s")):
        alice = Runtime("alice", transport=SlowTransport(close), logger=(node := Node("x")).logger)
        async with alice:
            pass
        assert "closing the transport failed" in node.logged
        assert logged in node.logged


def test_a_start_can_be_cancelled_anywhere_and_undoes_what_it_did() -> None:
    async def scenario(point: CancellationPoint) -> None:
        diary: list[str] = []
        transport = SlowTransport()
        services = [Noted("one", diary, start=1.0, stop=0.5), Noted("two", diary, start=1.0, stop=0.5)]
        alice = Runtime("alice", services, transport=transport, logger=Node("x").logger)
        if await point.cancel(alice.start()):
            assert diary.count("one started") == diary.count("one stopped")
            assert diary.count("two started") == diary.count("two stopped")
            assert transport.diary in ([], ["started", "closed"])
            assert nothing_is_left()
            diary.clear()
            await alice.start()
        await alice.stop()
        assert "two stopped" in diary
        assert nothing_is_left()

    everywhere(scenario)


def test_a_stop_can_be_cancelled_anywhere_and_leaves_nothing() -> None:
    async def scenario(point: CancellationPoint) -> None:
        diary: list[str] = []
        async with mesh("bob") as (hub, [bob], _):
            tasks_before = asyncio.all_tasks()
            stash = Stash()
            alice = Node("alice", Noted("one", diary, stop=1.0), stash, Noted("two", diary, stop=1.0), hub=hub)
            await alice.start()
            asked = asyncio.create_task(bob.call(SLEEP, 2.0, to="alice"))
            await settle()
            cancelled = await point.cancel(alice.stop())
            [answer] = await asyncio.gather(asked, return_exceptions=True)
            assert asyncio.all_tasks() == tasks_before, "cancelled or not, all has ended when stop() returns"
            assert hub.nodes == ("bob",)
            assert diary.count("one stopping") == diary.count("two stopping") == 1
            assert balanced(alice)
            assert isinstance(answer, PeerLost) if stash.cancelled else answer == 2.0
            assert cancelled or not stash.cancelled

    everywhere(scenario)


async def test_a_stop_that_is_cancelled_again_and_again_ends_sooner_and_sooner() -> None:
    diary: list[str] = []
    stash = Stash()
    alice = Node("alice", Noted("one", diary, stop=9.0), stash, Noted("two", diary, stop=9.0), grace=9)
    await alice.start()
    asked = asyncio.create_task(alice.call(SLEEP, 100.0, to="alice", timeout=200))
    await settle()
    stopping = asyncio.create_task(alice.stop())
    for second in (1, 2, 3):
        await asyncio.sleep(1)
        assert not stopping.done()
        stopping.cancel()
        await settle()
        expected = {1: "two stopping", 2: "one stopping", 3: "one stopping"}[second]
        assert diary[-1] == expected
    await asyncio.wait([stopping, asked])
    assert stopping.cancelled()
    assert now() < 4
    assert nothing_is_left()
    assert "stop() was cut short" in alice.logged


async def test_a_stop_that_is_cancelled_in_each_step_of_the_loop_ends() -> None:
    alice = Runtime("alice", [Stash()])
    await alice.start()
    stopping = asyncio.create_task(alice.stop())
    await asyncio.sleep(0)
    for _ in range(1000):
        stopping.cancel()
        await asyncio.sleep(0)
    assert stopping.cancelled()


async def test_a_body_that_is_cancelled_drains_with_all_its_grace() -> None:
    stash = Stash()

    async def body() -> None:
        async with Node("alice", stash, grace=5) as alice:
            alice_calls = asyncio.create_task(alice.call(SLEEP, 3.0, to="alice"))
            await asyncio.sleep(1)
            await alice_calls

    task = asyncio.create_task(body())
    await asyncio.sleep(0.5)
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()
    assert stash.cancelled == [], "its caller was not"


async def test_a_body_under_a_deadline_that_has_passed_stops_without_grace() -> None:
    stash = Stash()
    with anyio.move_on_after(1):
        async with Node("alice", stash, grace=50) as alice:
            asked = asyncio.create_task(alice.call(SLEEP, 30.0, to="alice", timeout=60))
            await asyncio.sleep(1000)
    assert now() == 1
    assert stash.cancelled == [30.0]
    await asyncio.wait([asked])
    assert isinstance(asked.exception(), PeerLost)
    assert nothing_is_left()


async def test_the_exception_of_a_body_passes_through() -> None:
    diary: list[str] = []
    with pytest.raises(KeyError, match="mine"):
        async with Node("alice", Noted("one", diary)):
            raise KeyError("mine")
    assert diary[-1] == "one stopped"


async def test_stop_is_harmless_when_nothing_runs_and_when_it_is_called_twice() -> None:
    alice = Node("alice", Noted("one", [], stop=1.0))
    await alice.stop()
    await alice.start()
    await asyncio.gather(alice.stop(), alice.stop())
    await alice.stop()
    assert now() == 1


async def test_a_handler_can_stop_its_own_runtime() -> None:
    class Ends(Service):
        name = "ends"

        @handles(TEASE)
        async def end(self, msg: Message[str]) -> None:
            await self.rt.stop()

    async with Node("alice", Ends()) as alice:
        await alice.emit(TEASE, "stop")
        await alice.wait()
        assert now() == 0
        assert repr(alice).endswith("stopped)")
        with pytest.raises(Closed):
            await alice.emit(TEASE, "again")


async def test_wait_returns_when_it_has_stopped_and_needs_a_start() -> None:
    alice = Node("alice")
    with pytest.raises(RuntimeError, match="node 'alice' is not running"):
        await alice.wait()
    async with alice:
        waiting = asyncio.create_task(alice.wait())
        with anyio.move_on_after(1) as scope:
            await alice.wait()
        assert scope.cancelled_caught
        assert not waiting.done()
    await waiting
    await alice.wait()


async def test_who_waits_for_a_runtime_of_which_the_start_is_cancelled_is_told() -> None:
    alice = Node("alice", Noted("slow", [], start=10.0))
    starting = asyncio.create_task(alice.start())
    await asyncio.sleep(1)
    waiting = asyncio.create_task(alice.wait())
    await asyncio.sleep(1)
    starting.cancel()
    await waiting
    await asyncio.wait([starting])
    assert starting.cancelled()


async def test_hundreds_of_starts_and_stops_leave_nothing() -> None:
    hub = MemoryHub()
    async with Node("bob", Stash(), hub=hub) as bob:
        before = asyncio.all_tasks()
        for _ in range(300):
            async with Runtime("alice", [Stash()], transport=MemoryTransport(hub), logger=bob.logger) as alice:
                await alice.call(STORE, Store("x"), to="bob")
        assert len(asyncio.all_tasks() - before) <= 1, "bob has an idle worker now"
        assert hub.nodes == ("bob",)
        assert bob.stats().handled == 300


def test_a_loop_that_ends_without_stop_ends_the_runtime_too() -> None:
    """As `asyncio.run` does it: every task is cancelled once."""
    diary: list[str] = []

    async def main() -> None:
        await Node("alice", Noted("one", diary), Stash()).start()

    asyncio.run(main())
    assert diary[-1] == "one stopped"


def test_logger_options_are_those_of_the_logger() -> None:
    with pytest.raises(TypeError, match=r"disabled .* names of services"):
        Runtime("alice", disabled_loggers=cast("Any", "stash"))
    given = Logger(output=Node("x").output)
    assert Runtime("alice", logger=given).logger is given
    with pytest.raises(ValueError, match="are for a logger of its own: set them where you make it"):
        Runtime("alice", logger=given, verbose_loggers=["stash"])
