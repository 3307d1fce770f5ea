"""The runtime in an application that is there already: whatever enters and leaves it, and in which tasks."""

import asyncio
import contextlib
import gc
import itertools
import subprocess
import sys
import textwrap
import tracemalloc
from collections.abc import AsyncIterator
from typing import Any, Self

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from meshkit.errors import Closed
from meshkit.runtime import Identity, Service, ServiceFailed
from meshkit.testing import CancellationPoint, VirtualTimeLoop, run
from meshkit.transports import MemoryHub
from tests.runtime.nodes import SLEEP, STORE, TEASE, Node, Stash, Store, StoreAck, everywhere

# --- a fixture of pytest


@pytest.fixture
async def node() -> AsyncIterator[Node]:
    async with Node("alice", Stash()) as rt:
        yield rt


async def test_it_lives_across_the_yield_of_a_fixture(node: Node) -> None:
    assert await node.call(STORE, Store("map", b"123"), to="alice") == StoreAck(3)
    assert "running" in repr(node)


@pytest.mark.real_time
async def test_it_lives_across_the_yield_of_a_fixture_in_real_time(node: Node) -> None:
    assert await node.call(STORE, Store("map", b"123"), to="alice") == StoreAck(3)


def test_a_fixture_may_enter_and_leave_it_in_different_tasks() -> None:
    async def fixture() -> AsyncIterator[Node]:
        async with Node("alice", Stash()) as rt:
            yield rt

    async def main() -> None:
        generator = fixture()

        async def go_on() -> Node | None:
            return await anext(generator, None)

        rt = await asyncio.create_task(go_on())
        assert rt is not None
        assert await rt.call(STORE, Store("map"), to="alice") == StoreAck(0)
        assert await asyncio.create_task(go_on()) is None
        assert "stopped" in repr(rt)

    run(main)


# --- an ASGI application


class Server:
    """What an ASGI server does: the lifespan in one task, each request in another."""

    def __init__(self, app: Any) -> None:
        self._app = app
        self._to_app: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._from_app: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._state: dict[str, Any] = {}

    async def __aenter__(self) -> Self:
        scope = {"type": "lifespan", "asgi": {"version": "3.0"}, "state": self._state}
        self._lifespan = asyncio.create_task(self._app(scope, self._to_app.get, self._from_app.put))
        await self._tell("startup")
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._tell("shutdown")
        await self._lifespan

    async def _tell(self, what: str) -> None:
        await self._to_app.put({"type": f"lifespan.{what}"})
        answer = await self._from_app.get()
        if answer["type"] != f"lifespan.{what}.complete":
            with contextlib.suppress(Exception):
                await self._lifespan
            raise RuntimeError(answer["message"])

    async def get(self, path: str) -> bytes:
        messages: list[dict[str, Any]] = []

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message: dict[str, Any]) -> None:
            messages.append(message)

        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "GET",
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "headers": [],
            "state": self._state.copy(),
        }
        await asyncio.create_task(self._app(scope, receive, send))
        return b"".join(message.get("body", b"") for message in messages)


def app_of(rt: Node) -> Starlette:
    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with rt:
            app.state.rt = rt
            yield

    async def store(request: Request) -> JSONResponse:
        node: Node = request.app.state.rt
        ack = await node.call(STORE, Store("a", request.path_params["data"].encode()), to=node.node)
        return JSONResponse({"size": ack.size})

    async def nap(request: Request) -> JSONResponse:
        return JSONResponse(await request.app.state.rt.call(SLEEP, 3.0, to=request.app.state.rt.node))

    return Starlette(routes=[Route("/store/{data}", store), Route("/nap", nap)], lifespan=lifespan)


async def test_it_lives_in_the_lifespan_of_an_asgi_application() -> None:
    rt = Node("alice", Stash())
    async with Server(app_of(rt)) as server:
        sizes = await asyncio.gather(*(server.get("/store/" + n * "x") for n in range(1, 50)))
        assert sizes == [b'{"size":%d}' % n for n in range(1, 50)]
    assert "stopped" in repr(rt)


async def test_a_request_in_flight_when_the_application_shuts_down_is_finished() -> None:
    async with Server(app_of(Node("alice", Stash(), grace=5))) as server:
        nap = asyncio.create_task(server.get("/nap"))
        await asyncio.sleep(1)
    assert await nap == b"3.0"
    assert asyncio.get_running_loop().time() == 3


async def test_a_service_that_does_not_start_keeps_the_application_from_starting() -> None:
    class Broken(Service):
        name = "broken"

        async def start(self) -> None:
            raise OSError("no disk")

    with pytest.raises(RuntimeError, match="service 'broken' on node 'alice' failed: OSError: no disk"):
        async with Server(app_of(Node("alice", Broken()))):
            raise AssertionError("it has started")


# --- a script, a shell


def test_a_plain_script_needs_nothing_else() -> None:
    script = """
        import asyncio
        from meshkit.runtime import Message, Runtime, Service, handles, request

        UPPER = request("text:upper", str, reply=str)

        class Text(Service):
            name = "text"

            @handles(UPPER)
            async def upper(self, msg: Message[str]) -> str:
                return msg.payload.upper()

        async def main() -> None:
            async with Runtime("alice", [Text()]) as rt:
                print(await rt.call(UPPER, "boo", to="alice"))

        asyncio.run(main())
    """
    ended = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "BOO\n", "")


async def test_each_step_may_be_a_task_of_its_own() -> None:
    rt = Node("alice", Stash())
    await asyncio.create_task(rt.start())
    assert await asyncio.create_task(rt.call(STORE, Store("map"), to="alice")) == StoreAck(0)
    await asyncio.create_task(rt.stop())
    with pytest.raises(Closed):
        await asyncio.create_task(rt.call(STORE, Store("map"), to="alice"))
    await asyncio.create_task(rt.start())
    await asyncio.create_task(rt.__aexit__(None, None, None))


def test_each_cell_of_a_notebook_runs_the_loop_anew_and_between_them_it_stands_still() -> None:
    loop = VirtualTimeLoop()
    try:
        cell = loop.run_until_complete
        rt = Node("alice", Stash(), hub=MemoryHub())
        cell(rt.start())
        assert cell(rt.call(STORE, Store("map"), to="alice")) == StoreAck(0)
        nap = loop.create_task(rt.call(SLEEP, 60.0, to="alice", timeout=100))
        cell(asyncio.sleep(30))
        assert not nap.done()
        assert cell(nap) == 60.0
        cell(rt.stop())
        assert not asyncio.all_tasks(loop)
    finally:
        loop.close()


async def test_who_starts_it_may_end_before_it() -> None:
    rt = Node("alice", Stash())

    async def start_under_a_deadline() -> None:
        async with asyncio.timeout(1):
            await rt.start()

    await asyncio.create_task(start_under_a_deadline())
    await asyncio.sleep(10)
    assert await rt.call(STORE, Store("map"), to="alice") == StoreAck(0)
    await rt.stop()


async def test_it_outlives_the_task_group_in_which_it_was_started() -> None:
    rt = Node("alice", Stash())
    with pytest.raises(ExceptionGroup):
        async with asyncio.TaskGroup() as group:
            await rt.start()
            group.create_task(_fail())
            await asyncio.sleep(10)
    assert await rt.call(STORE, Store("map"), to="alice") == StoreAck(0)
    await rt.stop()


async def _fail() -> None:
    raise ZeroDivisionError


# --- several in one loop


async def test_two_in_one_loop_have_nothing_to_do_with_each_other() -> None:
    async with Node("alice", first := Stash()) as one, Node("alice", second := Stash()) as other:
        await one.emit(TEASE, "one")
        await other.emit(TEASE, "other")
        await asyncio.sleep(0.1)
        assert [msg.payload for msg in first.teases] == ["one"]
        assert [msg.payload for msg in second.teases] == ["other"]
        await one.stop()
        assert await other.call(STORE, Store("map"), to="alice") == StoreAck(0)
        assert other.stats().handled == 2


async def test_when_one_fails_the_other_goes_on() -> None:
    class Dying(Service):
        name = "dying"
        max_restarts = 1

        async def start(self) -> None:
            self.spawn(self.die)

        async def die(self) -> None:
            await asyncio.sleep(1)
            raise ZeroDivisionError

    async with Node("alice", Stash()) as other:
        with pytest.raises(ServiceFailed):
            async with Node("bob", Dying()):
                await asyncio.sleep(100)
        assert await other.call(STORE, Store("map"), to="alice") == StoreAck(0)


def test_one_inside_the_other_may_be_left_in_any_order() -> None:
    async def main() -> None:
        hub = MemoryHub()
        alice, bob = (Node(name, Stash(), hub=hub) for name in ("alice", "bob"))
        await alice.__aenter__()
        await bob.__aenter__()
        await alice.__aexit__(None, None, None)
        assert [*bob.peers] == []
        await bob.__aexit__(None, None, None)

    run(main)


# --- nothing is left


async def once(hub: MemoryHub, identities: tuple[Identity | None, Identity | None]) -> None:
    one, other = identities
    async with Node("alice", Stash(), hub=hub, identity=one) as alice, Node("bob", Stash(), hub=hub, identity=other):
        bob = next(iter(alice.peers))
        assert await alice.call(STORE, Store("map"), to=bob) == StoreAck(0)
        await alice.emit(TEASE, "boo")


def counted() -> tuple[int, int]:
    """Return how many objects there are for the garbage collector, and how many blocks of memory."""
    gc.collect()
    return len(gc.get_objects()), sys.getallocatedblocks()


@pytest.mark.parametrize(
    ("identities", "rounds"),
    [((None, None), 1000), ((Identity.from_seed(b"a" * 32), Identity.from_seed(b"b" * 32)), 200)],
    ids=["plain", "proved"],
)
def test_a_thousand_starts_and_stops_leave_nothing(identities: tuple[Any, Any], rounds: int) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualTimeLoop)
        hub = MemoryHub()
        for _ in range(50):
            await once(hub, identities)
        objects, blocks = counted()
        for _ in range(rounds - 150):
            await once(hub, identities)
        objects_after, blocks_after = counted()
        assert objects_after - objects < 10
        assert blocks_after - blocks < 50, "a block in each round would be a leak"

        tracemalloc.start()  # it makes everything six times slower
        try:
            traced: list[int] = []
            for _ in range(5):
                for _ in range(20):
                    await once(hub, identities)
                gc.collect()
                traced.append(tracemalloc.get_traced_memory()[0])
            grown = [after - before for before, after in itertools.pairwise(traced)]
            assert min(grown) < 800, "40 bytes in each round would be a leak; what grows only now and then is none"
        finally:
            tracemalloc.stop()
        await asyncio.sleep(1)
        assert asyncio.all_tasks() == {asyncio.current_task()}
        assert loop.live_timers() == []

    run(main)


def test_a_start_that_is_cancelled_at_any_await_leaves_nothing_and_can_be_repeated() -> None:
    class Slow(Stash):
        def __init__(self) -> None:
            super().__init__()
            self.up = 0

        async def start(self) -> None:
            await asyncio.sleep(1)
            self.spawn(asyncio.sleep, 100, name="background")
            await asyncio.sleep(0)
            self.up += 1

        async def stop(self) -> None:
            await asyncio.sleep(1)
            self.up -= 1

    async def scenario(point: CancellationPoint) -> None:
        hub, slow = MemoryHub(), Slow()
        async with Node("bob", Stash(), hub=hub) as bob:
            rt = Node("alice", slow, hub=hub)
            if await point.cancel(rt.start()):
                assert hub.nodes == ("bob",)
                assert not slow.up
                await rt.start()
            assert await bob.call(STORE, Store("map"), to="alice") == StoreAck(0)
            await rt.stop()
            assert not slow.up
        assert asyncio.all_tasks() == {asyncio.current_task()}

    everywhere(scenario)
