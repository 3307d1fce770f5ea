"""How calls end otherwise: errors, the limit, closing; who is told; and where a registry may be used."""

import asyncio
import contextlib
import gc
import pickle
import weakref
from collections.abc import Generator
from typing import Any

import anyio
import pytest

from meshkit.call_registry import CallEnded, CallRegistry, CallRegistryStats, ReplyIgnored
from meshkit.errors import CallTimeout, Closed, Overloaded, PeerLost
from meshkit.events import Event
from meshkit.testing import VirtualTimeLoop, run
from tests.test_call_registry import answering, clock, fail, later, nowhere

# --- errors ------------------------------------------------------------------------------------------------


class Empty(Exception):
    def __bool__(self) -> bool:
        return False


@pytest.mark.parametrize("error", [PeerLost(node="bob"), ExceptionGroup("", [ValueError()]), Empty()])
async def test_the_error_given_to_reject_is_raised_in_the_caller(error: Exception) -> None:
    registry: CallRegistry[None] = CallRegistry()
    with pytest.raises(type(error)) as caught:
        await registry.call(lambda call_id: later(1, registry.reject, call_id, error))
    assert caught.value is error
    assert clock() == 1.0
    assert registry.stats().rejected == 1


async def test_an_error_that_was_given_to_reject_is_not_kept_alive_by_the_call_that_raised_it() -> None:
    registry: CallRegistry[None] = CallRegistry()
    gone: list[weakref.ref[Exception]] = []

    def send(call_id: str) -> None:
        error = PeerLost(node="bob")
        gone.append(weakref.ref(error))
        registry.reject(call_id, error)

    gc.disable()
    try:
        with contextlib.suppress(PeerLost):
            await registry.call(send)
        assert gone[0]() is None, "there is no cycle that only the garbage collector could end"
    finally:
        gc.enable()


async def test_rejecting_and_closing_cut_an_async_send_at_once() -> None:
    async def stuck(call_id: str) -> None:
        await asyncio.sleep(3600)

    registry: CallRegistry[None] = CallRegistry()
    later(1, registry.reject, "1", PeerLost(node="bob"))
    later(2, registry.close)
    with pytest.raises(PeerLost):
        await registry.call(stuck, id="1")
    assert clock() == 1.0
    with pytest.raises(Closed):
        await registry.call(stuck, id="2")
    assert clock() == 2.0


@pytest.mark.parametrize(
    "error",
    [
        asyncio.CancelledError(),
        KeyboardInterrupt(),
        SystemExit(1),
        GeneratorExit(),
        BaseExceptionGroup("", [asyncio.CancelledError()]),
        StopIteration(1),
        ValueError,
        "an error",
        None,
    ],
)
async def test_what_no_call_can_raise_is_a_type_error_and_the_call_goes_on(error: Any) -> None:
    registry: CallRegistry[str] = CallRegistry()

    def send(call_id: str) -> None:
        with pytest.raises(TypeError, match="a call can raise any instance of Exception"):
            registry.reject(call_id, error)
        registry.resolve(call_id, "goes on")

    assert await registry.call(send) == "goes on"


# --- the limit, closing ------------------------------------------------------------------------------------


async def test_one_call_more_than_max_pending_is_refused_and_not_sent() -> None:
    registry: CallRegistry[str] = CallRegistry(max_pending=2, name="storage")
    sent: list[str] = []
    calls = [asyncio.create_task(registry.call(sent.append)) for _ in range(2)]
    await asyncio.sleep(1)
    with pytest.raises(Overloaded) as caught:
        await registry.call(sent.append)
    assert (caught.value.name, caught.value.limit, caught.value.executed) == ("storage", 2, "no")
    assert len(sent) == 2
    registry.resolve(sent[0], "room again")
    later(1, lambda: [registry.resolve(call_id, "all") for call_id in sent[1:]])
    assert await registry.call(sent.append) == "all"
    await asyncio.gather(*calls)
    assert registry.stats() == CallRegistryStats(0, 3, 0, 0, 0, 0, 0, 1, 0, 0, 0)


async def test_closing_fails_everything_pending_at_once_and_every_call_after_it() -> None:
    registry: CallRegistry[None] = CallRegistry(name="storage")
    calls = [asyncio.create_task(registry.call(nowhere)) for _ in range(1000)]
    await asyncio.sleep(1)
    registry.close()
    assert len(registry) == 0
    errors = await asyncio.gather(*calls, return_exceptions=True)
    assert all(isinstance(error, Closed) and error.executed == "maybe" for error in errors)
    assert len({id(error) for error in errors}) == 1000, "each is freshly made"
    assert clock() == 1.0
    sent: list[str] = []
    with pytest.raises(Closed) as caught:
        await registry.call(sent.append)
    assert (caught.value.name, caught.value.executed, sent) == ("storage", "no", [])
    registry.close()
    assert registry.stats().closed == 1000


async def test_closing_while_sending_ends_the_call() -> None:
    registry: CallRegistry[None] = CallRegistry()
    with pytest.raises(Closed) as caught:
        await registry.call(lambda _: registry.close())
    assert caught.value.executed == "maybe"


async def test_a_response_that_was_there_before_closing_is_returned() -> None:
    registry: CallRegistry[str] = CallRegistry()
    call = asyncio.create_task(registry.call(nowhere, id="1"))
    await asyncio.sleep(1)
    registry.resolve("1", "in time")
    registry.close()
    assert await call == "in time"


# --- replies that nobody waits for -------------------------------------------------------------------------


async def test_late_duplicate_and_unknown_replies_are_counted_and_no_errors() -> None:
    events: list[Event] = []
    registry: CallRegistry[str] = CallRegistry(timeout=1.0, name="storage", observer=events.append)
    assert registry.resolve("never called", "forged") is False
    with pytest.raises(CallTimeout):
        await registry.call(nowhere, id="1")
    assert registry.resolve("1", "late") is False
    assert registry.reject("1", ValueError("late too")) is False
    await registry.call(lambda call_id: registry.resolve(call_id, "first"), id="2")
    assert registry.resolve("2", "second") is False
    assert registry.reject("2", ValueError("third")) is False
    stats = registry.stats()
    assert (stats.late, stats.duplicate, stats.unknown) == (2, 2, 1)
    assert events == [
        ReplyIgnored("storage", "never called", "unknown"),
        CallEnded("storage", "1", "timed_out", 1.0),
        ReplyIgnored("storage", "1", "late"),
        ReplyIgnored("storage", "1", "late"),
        CallEnded("storage", "2", "replied", 0.0),
        ReplyIgnored("storage", "2", "duplicate"),
        ReplyIgnored("storage", "2", "duplicate"),
    ]


async def test_a_duplicate_that_comes_before_the_caller_has_run_changes_nothing() -> None:
    registry: CallRegistry[str] = CallRegistry()
    call = asyncio.create_task(registry.call(nowhere, id="1"))
    await asyncio.sleep(1)
    assert registry.resolve("1", "first")
    assert not registry.resolve("1", "second")
    assert not registry.reject("1", ValueError())
    assert await call == "first"


# --- observers ---------------------------------------------------------------------------------------------


async def test_every_call_ends_with_one_event() -> None:
    events: list[Event] = []
    registry: CallRegistry[None] = CallRegistry(max_pending=1, name="storage", observer=events.append)
    later(1, registry.resolve, "1", None)
    await registry.call(nowhere, id="1")
    later(1, registry.reject, "2", ValueError())
    with pytest.raises(ValueError):
        await registry.call(nowhere, id="2")
    with pytest.raises(CallTimeout):
        await registry.call(nowhere, id="3", timeout=2.0)
    with anyio.move_on_after(3.0):
        await registry.call(nowhere, id="4")
    with pytest.raises(ConnectionResetError):
        await registry.call(fail, id="5")
    with pytest.raises(Overloaded):
        await registry.call(lambda _: registry.call(nowhere, id="6"), id="7")
    later(1, registry.close)
    with pytest.raises(Closed):
        await registry.call(nowhere, id="8")
    assert [(event.id, event.outcome, event.duration) for event in events if isinstance(event, CallEnded)] == [
        ("1", "replied", 1.0),
        ("2", "rejected", 1.0),
        ("3", "timed_out", 2.0),
        ("4", "cancelled", 3.0),
        ("5", "send_failed", 1.0),
        ("6", "refused", 0.0),
        ("7", "send_failed", 0.0),
        ("8", "closed", 1.0),
    ]
    assert registry.stats() == CallRegistryStats(0, 1, 1, 1, 1, 2, 1, 1, 0, 0, 0)
    assert pickle.loads(pickle.dumps(events)) == events


def test_an_observer_that_raises_disturbs_nothing_and_is_reported() -> None:
    reported: list[Any] = []

    def broken(event: Event) -> None:
        raise ZeroDivisionError

    async def main() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context["exception"]))
        registry: CallRegistry[str] = CallRegistry(timeout=1.0, observer=broken)
        assert await registry.call(answering(registry, "response", 0.5)) == "response"
        with pytest.raises(CallTimeout):
            await registry.call(nowhere)
        assert registry.resolve("?", "response") is False
        assert len(registry) == 0

    run(main)
    assert [type(error) for error in reported] == [ZeroDivisionError] * 3


async def test_an_observer_may_use_the_registry() -> None:
    registry: CallRegistry[str] = CallRegistry(observer=lambda _: registry.close())
    calls = [asyncio.create_task(registry.call(nowhere, id=str(number))) for number in range(3)]
    await asyncio.sleep(1)
    registry.resolve("0", "response")
    assert await calls[0] == "response"
    assert [type(error) for error in await asyncio.gather(*calls[1:], return_exceptions=True)] == [Closed, Closed]


# --- loops, construction -----------------------------------------------------------------------------------


def test_it_works_in_two_loops_one_after_the_other() -> None:
    registry: CallRegistry[str] = CallRegistry(timeout=5.0)

    async def main() -> None:
        assert await registry.call(answering(registry, "response", 1.0)) == "response"
        with pytest.raises(CallTimeout):
            await registry.call(nowhere)
        assert clock() == 6.0

    run(main)
    run(main)
    assert registry.stats().timed_out == 2


def test_what_a_closed_loop_has_left_pending_does_not_disturb_the_next_one() -> None:
    registry: CallRegistry[str] = CallRegistry(timeout=5.0)
    left: Generator[Any, Any, Any] | Any = None

    async def leave() -> None:
        nonlocal left
        await asyncio.sleep(100)
        left = registry.call(nowhere, id="1")
        left.send(None)  # begun, and never continued, as if the loop had been stopped in the middle

    loop = VirtualTimeLoop()
    loop.run_until_complete(leave())
    loop.close()

    async def main() -> None:
        with pytest.raises(CallTimeout):
            await registry.call(nowhere)
        assert clock() == 5.0, "not at a time of the other loop"
        assert len(registry) == 0

    run(main)
    left.close()
    assert len(registry) == 0


def test_what_comes_for_calls_of_a_closed_loop_is_late_and_no_error() -> None:
    registry: CallRegistry[str] = CallRegistry()
    loop = asyncio.new_event_loop()
    left = [loop.create_task(registry.call(nowhere, id=str(number))) for number in range(4)]
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()
    assert len(registry) == 4
    assert registry.resolve("0", "too late") is False
    assert registry.reject("1", ValueError()) is False
    assert registry.stats().late == 2
    registry.close()
    assert len(registry) == 0
    for call in left:
        call.get_coro().close()
        call._log_destroy_pending = False  # type: ignore[attr-defined]  # it was left on purpose


def test_another_loop_cannot_take_it_while_calls_are_pending_on_the_first() -> None:
    registry: CallRegistry[str] = CallRegistry(name="storage")
    first = VirtualTimeLoop()
    call = first.create_task(registry.call(nowhere, id="1"))
    first.run_until_complete(asyncio.sleep(1))

    async def main() -> None:
        with pytest.raises(RuntimeError, match="storage: calls are pending on another event loop"):
            await registry.call(nowhere)

    run(main)
    registry.resolve("1", "still waiting")
    assert first.run_until_complete(call) == "still waiting"
    first.close()


def test_it_is_made_anywhere_and_says_what_it_is() -> None:
    registry: CallRegistry[str] = CallRegistry(name="storage", timeout=2.5, max_pending=7)
    assert repr(registry) == "CallRegistry('storage', 0 of 7 pending, timeout=2.5)"
    registry.close()
    assert repr(registry) == "CallRegistry('storage', closed, timeout=2.5)"
    assert len(registry) == 0


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"timeout": 0}, ValueError, "timeout must be finite and more than zero seconds, not 0"),
        ({"timeout": -1.0}, ValueError, "timeout must be"),
        ({"timeout": float("nan")}, ValueError, "timeout must be"),
        ({"timeout": float("inf")}, ValueError, "timeout must be"),
        ({"timeout": "5"}, TypeError, "timeout must be a number of seconds, not '5'"),
        ({"max_pending": 0}, ValueError, "max_pending must be at least 1, not 0"),
        ({"max_pending": 1.5}, TypeError, "max_pending must be a whole number, not 1.5"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        CallRegistry[None](**arguments)


@pytest.mark.parametrize("timeout", [0.0, -1.0, float("nan"), float("inf")])
async def test_a_bad_timeout_of_a_call_is_named_and_nothing_is_sent(timeout: float) -> None:
    registry: CallRegistry[None] = CallRegistry()
    sent: list[str] = []
    with pytest.raises(ValueError, match="timeout must be"):
        await registry.call(sent.append, timeout=timeout)
    assert (len(registry), sent) == (0, [])
