import asyncio
import contextvars
from collections.abc import Callable, Coroutine
from typing import Any

import anyio
import pytest
from hypothesis import given, strategies as st

from meshkit.errors import Closed, Overloaded
from meshkit.runtime.mailbox import Mailbox
from meshkit.runtime.supervisor import Supervisor
from meshkit.testing import CancellationPoint, SimLoop, run, simulated
from meshkit.testing._sim_faults import Faults
from tests.runtime.nodes import everywhere

Handler = Callable[[Any], Coroutine[Any, Any, None]]


def thing(value: Any, size: int = 0, key: object = None) -> Any:
    """Return `value` with what a mailbox wants to know of it."""
    made = type("Thing", (type(value),), {})(value)
    made.size, made.key = size, key
    return made


class Boxed:
    """A mailbox with a supervisor, and a record of what its handler began and ended."""

    def __init__(
        self,
        *,
        max_mailbox: int = 10,
        max_bytes: int = 1000,
        max_concurrent: int = 3,
        handler: Handler | None = None,
    ) -> None:
        self.supervisor = Supervisor("meshkit:alice:x", lambda *_: None)
        self.box: Mailbox[Any] = Mailbox(
            "mailbox",
            self._run,
            self.supervisor.spawn,
            max_mailbox=max_mailbox,
            max_bytes=max_bytes,
            max_concurrent=max_concurrent,
        )
        self.begun: list[Any] = []
        self.ended: list[Any] = []
        self.most = 0
        self._handler = handler or asyncio.sleep

    async def _run(self, item: Any, scope: anyio.CancelScope) -> None:
        self.begun.append(item)
        self.scope = scope
        self.most = max(self.most, self.box.running)
        await self._handler(item)
        self.ended.append(item)

    async def put(self, item: Any) -> None:
        await self.box.reserve()
        self.box.put_reserved(thing(item))

    async def end(self) -> None:
        self.box.close()
        assert await self.supervisor.end(1.0) == []


async def test_items_begin_in_order_and_run_at_the_same_time_up_to_the_limit() -> None:
    boxed = Boxed(max_concurrent=3)
    for seconds in (9, 4, 3, 5, 1):
        boxed.box.offer(thing(seconds))
    boxed.box.open()
    await boxed.box.quiet()
    assert boxed.begun == [9, 4, 3, 5, 1]
    assert boxed.ended == [3, 4, 1, 5, 9]
    assert boxed.most == 3
    assert asyncio.get_running_loop().time() == 9
    await boxed.end()


async def test_with_one_worker_each_item_ends_before_the_next_begins() -> None:
    boxed = Boxed(max_concurrent=1)
    boxed.box.open()
    for seconds in (3, 2, 1):
        boxed.box.offer(thing(seconds))
    await boxed.box.quiet()
    assert boxed.ended == [3, 2, 1]
    assert asyncio.get_running_loop().time() == 6
    await boxed.end()


async def test_nothing_begins_before_it_is_opened() -> None:
    boxed = Boxed()
    boxed.box.offer(thing(0))
    await asyncio.sleep(1)
    assert boxed.begun == []
    boxed.box.open()
    await boxed.box.quiet()
    assert boxed.ended == [0]
    await boxed.end()


async def test_an_idle_mailbox_keeps_one_worker_and_an_unused_one_none() -> None:
    boxed = Boxed(max_concurrent=10)
    boxed.box.open()
    assert not len_of(boxed)
    for _ in range(10):
        boxed.box.offer(thing(1))
    await asyncio.sleep(0.5)
    assert len_of(boxed) == 10
    await asyncio.sleep(1)
    assert len_of(boxed) == 1
    boxed.box.offer(thing(0))
    await boxed.box.quiet()
    assert len_of(boxed) == 1
    await boxed.end()


def len_of(boxed: Boxed) -> int:
    return sum(task in boxed.supervisor for task in asyncio.all_tasks())


async def test_workers_have_names() -> None:
    boxed = Boxed()
    boxed.box.open()
    boxed.box.offer(thing(1))
    boxed.box.offer(thing(1))
    await asyncio.sleep(0.5)
    names = {task.get_name() for task in asyncio.all_tasks()}
    assert {"meshkit:alice:x:worker-1", "meshkit:alice:x:worker-2"} <= names
    await boxed.end()


async def test_handlers_that_do_not_wait_let_others_run_now_and_then() -> None:
    async def at_once(_: Any) -> None: ...

    boxed = Boxed(max_mailbox=1000, max_concurrent=1, handler=at_once)
    for number in range(1000):
        boxed.box.offer(thing(number))
    boxed.box.open()
    turns = 0
    while boxed.box.busy:
        await asyncio.sleep(0)
        turns += 1
    assert turns > 1000 / Mailbox.FAIRNESS
    await boxed.end()


async def test_whoever_waits_for_room_gets_it_in_order_and_nobody_overtakes() -> None:
    boxed = Boxed(max_mailbox=1, max_concurrent=1)
    boxed.box.offer(thing(1))
    waiting = [asyncio.create_task(boxed.put(item)) for item in (2, 3)]
    await asyncio.sleep(0)
    assert not boxed.box.has_room()
    boxed.box.open()
    await asyncio.sleep(0.5)
    assert len(boxed.box) == 1, "the first one waited for the place that became free"
    assert not boxed.box.has_room()
    await asyncio.gather(*waiting)
    await boxed.box.quiet()
    assert boxed.ended == [1, 2, 3]
    await boxed.end()


async def test_who_is_given_a_place_has_it_before_anybody_else_can_take_it() -> None:
    boxed = Boxed(max_mailbox=1)
    boxed.box.offer(thing("a"))
    waiting = asyncio.create_task(boxed.put("b"))
    await asyncio.sleep(0)
    assert boxed.box.discard(thing("a"))
    assert not boxed.box.has_room(), "the place is promised, though nothing is in it"
    await waiting
    assert boxed.box.close() == ["b"]


def test_a_cancelled_waiter_gives_its_place_to_the_next() -> None:
    async def scenario(point: CancellationPoint) -> None:
        boxed = Boxed(max_mailbox=1)
        boxed.box.offer(thing("a"))
        asyncio.get_running_loop().call_later(1, boxed.box.discard, thing("a"))
        first = asyncio.create_task(point.cancel(boxed.put("b")))
        await asyncio.sleep(0)
        second = asyncio.create_task(boxed.put("c"))
        if not await first:
            assert boxed.box.discard(thing("b"))
        await second
        assert not boxed.box.has_room()
        assert boxed.box.close() == ["c"]

    everywhere(scenario)


async def test_a_worker_does_not_wait_for_room_in_its_own_mailbox() -> None:
    async def put_two_more(item: Any) -> None:
        if item == "first":
            await boxed.put("second")
            with pytest.raises(Overloaded, match="mailbox: full, it holds 1 already"):
                await boxed.put("third")

    boxed = Boxed(max_mailbox=1, max_concurrent=1, handler=put_two_more)
    boxed.box.offer(thing("first"))
    boxed.box.open()
    await boxed.box.quiet()
    assert boxed.ended == ["first", "second"]
    await boxed.end()


async def test_close_fails_those_who_wait_and_returns_what_nobody_has_begun() -> None:
    boxed = Boxed(max_mailbox=2)
    boxed.box.offer(thing("a"))
    boxed.box.offer(thing("b"))
    waiting = asyncio.create_task(boxed.put("c"))
    await asyncio.sleep(0)
    assert boxed.box.close() == ["a", "b"]
    with pytest.raises(Closed, match="mailbox is closed"):
        await waiting
    with pytest.raises(Closed):
        await boxed.put("d")
    assert not boxed.box.has_room()
    assert boxed.box.close() == []


async def test_a_waiter_may_be_cancelled_and_closed_upon_at_once() -> None:
    for close_first in (True, False):
        boxed = Boxed(max_mailbox=1)
        boxed.box.offer(thing("a"))
        waiting = asyncio.create_task(boxed.put("b"))
        await asyncio.sleep(0)
        if close_first:
            boxed.box.close()
        waiting.cancel()
        boxed.box.close()
        await asyncio.wait([waiting])
        assert waiting.cancelled()


async def test_a_waiter_that_is_cancelled_as_a_place_becomes_free_does_not_get_it() -> None:
    boxed = Boxed(max_mailbox=1)
    boxed.box.offer(thing("a"))
    first, second = (asyncio.create_task(boxed.put(item)) for item in ("b", "c"))
    await asyncio.sleep(0)
    first.cancel()
    boxed.box.discard(thing("a"))
    await second
    assert first.cancelled()
    assert boxed.box.close() == ["c"]


async def test_what_has_begun_cannot_be_discarded() -> None:
    boxed = Boxed(max_concurrent=1)
    boxed.box.open()
    boxed.box.offer(thing(1))
    boxed.box.offer(thing(2))
    await asyncio.sleep(0.5)
    assert not boxed.box.discard(thing(1))
    assert boxed.box.discard(thing(2))
    assert not boxed.box.discard(thing(3))
    await boxed.box.quiet()
    assert boxed.ended == [1]
    await boxed.end()


async def test_a_mailbox_is_quiet_when_the_last_item_is_discarded_or_closed_away() -> None:
    boxed = Boxed()
    boxed.box.offer(thing(1))
    quiet = asyncio.create_task(boxed.box.quiet())
    await asyncio.sleep(1)
    assert not quiet.done()
    boxed.box.discard(thing(1))
    await quiet
    boxed.box.offer(thing(2))
    quiet = asyncio.create_task(boxed.box.quiet())
    await asyncio.sleep(1)
    boxed.box.close()
    await quiet


async def test_when_a_worker_is_cancelled_from_inside_the_others_go_on_with_what_waits() -> None:
    async def cancel_own_task(item: Any) -> None:
        if item == "bad":
            task = asyncio.current_task()
            assert task is not None
            task.cancel()
        await asyncio.sleep(0)

    boxed = Boxed(max_concurrent=1, handler=cancel_own_task)
    boxed.box.open()
    for item in ("bad", "good", "bad", "good"):
        boxed.box.offer(thing(item))
    await boxed.box.quiet()
    assert boxed.begun == ["bad", "good", "bad", "good"]
    assert boxed.ended == ["good", "good"]
    await boxed.end()


async def test_a_handler_that_cancels_its_own_task_as_it_ends_does_not_harm_the_next_item() -> None:
    async def cancel_own_task(item: Any) -> None:
        if item == "bad":
            task = asyncio.current_task()
            assert task is not None
            task.cancel()
        else:
            await asyncio.sleep(0)

    boxed = Boxed(max_concurrent=1, handler=cancel_own_task)
    boxed.box.open()
    for item in ("bad", "good", "bad", "good"):
        boxed.box.offer(thing(item))
    await boxed.box.quiet()
    assert boxed.begun == boxed.ended == ["bad", "good", "bad", "good"]
    await boxed.end()


class Incomparable:
    def __eq__(self, other: object) -> bool:
        raise ValueError("they are arrays")

    __hash__ = None  # type: ignore[assignment]


async def test_what_a_handler_does_to_its_context_befalls_no_other_item() -> None:
    user: contextvars.ContextVar[object] = contextvars.ContextVar("user", default="nobody")
    seen: list[object] = []

    async def set_user(item: Any) -> None:
        seen.append(user.get())
        token = user.set(Incomparable() if item == "odd" else item)
        await asyncio.sleep(0)
        if item == "tidy":
            user.reset(token)
        elif item == "given up":
            boxed.scope.cancel()
            await asyncio.sleep(5)

    boxed = Boxed(max_concurrent=1, handler=set_user)
    boxed.box.open()
    for item in ("tidy", "tidy", "plain", "odd", "given up", "tidy"):
        boxed.box.offer(thing(item))
    await boxed.box.quiet()
    assert seen == ["nobody"] * 6
    assert boxed.ended == ["tidy", "tidy", "plain", "odd", "tidy"]
    await boxed.end()


async def test_a_handler_that_leaves_its_context_as_it_was_keeps_its_worker() -> None:
    user: contextvars.ContextVar[str] = contextvars.ContextVar("user")
    workers: set[object] = set()

    async def tidy(item: Any) -> None:
        workers.add(asyncio.current_task())
        user.reset(user.set(item))

    boxed = Boxed(max_concurrent=1, handler=tidy)
    boxed.box.open()
    for item in range(100):
        boxed.box.offer(thing(item))
    await boxed.box.quiet()
    assert len(workers) == 1
    await boxed.end()


@given(
    st.integers(1, 4),
    st.integers(1, 4),
    st.lists(
        st.tuples(
            st.sampled_from(["put", "wait", "cancel", "discard", "pause"]), st.integers(0, 3), st.integers(0, 10)
        ),
        max_size=40,
    ),
)
def test_whatever_happens_each_item_is_handled_once_and_in_order(
    max_mailbox: int, max_concurrent: int, program: list[tuple[str, int, int]]
) -> None:
    """Items are (number, seconds); the model is the list of what was accepted, in order of acceptance."""

    async def main() -> None:
        async def handler(item: tuple[int, int]) -> None:
            await asyncio.sleep(item[1])

        boxed = Boxed(max_mailbox=max_mailbox, max_concurrent=max_concurrent, handler=handler)
        accepted: list[tuple[int, int]] = []
        discarded: list[tuple[int, int]] = []
        putting: list[asyncio.Task[None]] = []

        async def put_waiting(item: tuple[int, int]) -> None:
            await boxed.box.reserve()
            boxed.box.put_reserved(thing(item))
            accepted.append(item)

        for number, (verb, argument, at) in enumerate(program):
            if number == len(program) // 3:
                boxed.box.open()
            item = (number, argument)
            if verb == "put" and boxed.box.has_room():
                boxed.box.offer(thing(item))
                accepted.append(item)
            elif verb == "wait":
                putting.append(asyncio.create_task(put_waiting(item)))
            elif verb == "cancel" and putting:
                putting[at % len(putting)].cancel()
            elif verb == "discard" and accepted:
                chosen = accepted[at % len(accepted)]
                if boxed.box.discard(thing(chosen)):
                    discarded.append(chosen)
                    assert chosen not in boxed.begun
            elif verb == "pause":
                await asyncio.sleep(argument / 2)
            assert len(boxed.box) <= max_mailbox
            assert boxed.box.running <= max_concurrent
        boxed.box.open()
        await asyncio.gather(*putting, return_exceptions=True)
        await boxed.box.quiet()
        kept = [item for item in accepted if item not in discarded]
        assert boxed.begun == kept
        assert sorted(boxed.ended) == sorted(kept)
        assert boxed.box.has_room()
        await boxed.end()

    run(main)


@given(
    st.integers(1, 4),
    st.booleans(),
    st.lists(st.tuples(st.sampled_from(["put", "cancel", "turn", "pause"]), st.integers(0, 3), st.integers(0, 10))),
)
def test_whichever_worker_is_cancelled_wherever_it_is_all_items_begin_and_one_worker_is_left(
    max_concurrent: int, eager: bool, program: list[tuple[str, int, int]]
) -> None:
    """Where it has just been woken, is idle, runs a handler, or lets others run in between."""

    async def main() -> None:
        if eager:
            asyncio.get_running_loop().set_task_factory(getattr(asyncio, "eager_task_factory", None))
        boxed = Boxed(max_mailbox=1000, max_concurrent=max_concurrent)
        boxed.box.FAIRNESS = 2
        boxed.box.open()
        accepted: list[int] = []

        def put(seconds: int) -> None:
            assert boxed.box.offer(thing(seconds))
            accepted.append(seconds)

        for verb, argument, at in program:
            workers = [task for task in asyncio.all_tasks() if task in boxed.supervisor]
            assert len(workers) <= max_concurrent
            if verb == "put":
                for _ in range(argument + 1):
                    put(at % 3)
            elif verb == "cancel" and workers:
                sorted(workers, key=asyncio.Task.get_name)[at % len(workers)].cancel()
            elif verb == "turn":
                for _ in range(argument):
                    await asyncio.sleep(0)
            elif verb == "pause":
                await asyncio.sleep(argument / 2)
        await asyncio.sleep(3 * len(accepted))
        assert boxed.begun == accepted
        assert boxed.most <= max_concurrent
        for seconds in (1, 0, 0, 0):
            put(seconds)
            await asyncio.sleep(0.5)
            assert boxed.begun == accepted, "one that is idle is woken"
        await asyncio.sleep(1)
        assert len_of(boxed) == 1
        await boxed.end()

    run(main)


# --- where a simulation lets workers begin late


@pytest.mark.parametrize("ends", [False, True])
def test_what_waits_for_a_worker_that_begins_late_is_begun_in_order_or_given_back_at_the_end(
    monkeypatch: pytest.MonkeyPatch, ends: bool
) -> None:
    monkeypatch.setattr(Faults, "ARMED", 1.0)
    monkeypatch.setattr(Faults, "FIRES", 1.0)

    async def main(sim: SimLoop) -> None:
        boxed = Boxed(max_concurrent=2)
        boxed.box.open()
        for seconds in (3, 2, 1):
            boxed.box.offer(thing(seconds))
        await asyncio.sleep(Mailbox.LATE / 2)
        assert boxed.begun == []
        if ends:
            assert boxed.box.close() == [3, 2, 1]
        else:
            await boxed.box.quiet()
            assert boxed.begun == [3, 2, 1]
            assert sim.fired == {"mailbox: a new worker begins late": 2}
        await boxed.end()

    simulated(1, main, buggify=True)
