import asyncio
import pickle
import random
from collections.abc import Callable, Generator
from typing import Any

import anyio
import pytest

from meshkit.call_registry import CallEnded, CallRegistry, CallRegistryStats, ReplyIgnored
from meshkit.errors import CallTimeout, Closed, Overloaded, PeerLost
from meshkit.events import Event
from meshkit.testing import VirtualTimeLoop, run


def clock() -> float:
    return asyncio.get_running_loop().time()


def later(seconds: float, do: Callable[..., object], *args: object) -> None:
    asyncio.get_running_loop().call_later(seconds, do, *args)


def answering(registry: CallRegistry[Any], response: object, seconds: float) -> Callable[[str], None]:
    """Return a `send` whose request is answered after so many seconds."""
    return lambda call_id: later(seconds, registry.resolve, call_id, response)


def nowhere(call_id: str) -> None:
    """Send a request that nobody answers."""


# --- replies -----------------------------------------------------------------------------------------------


async def test_a_call_returns_the_response_that_names_its_id() -> None:
    registry: CallRegistry[str] = CallRegistry()
    sent: list[str] = []
    calls = [asyncio.create_task(registry.call(sent.append)) for _ in range(3)]
    await asyncio.sleep(1)
    assert len(registry) == 3
    for number, call_id in reversed(list(enumerate(sent))):
        assert call_id in registry
        assert registry.resolve(call_id, f"response {number}")
        assert call_id not in registry
    assert await asyncio.gather(*calls) == ["response 0", "response 1", "response 2"]


@pytest.mark.parametrize("response", [None, False, ValueError("as a value"), [], asyncio.sleep])
async def test_any_object_can_be_a_response(response: object) -> None:
    registry: CallRegistry[object] = CallRegistry()
    assert await registry.call(answering(registry, response, 1.0)) is response


async def test_a_response_that_comes_while_sending_is_returned_without_waiting() -> None:
    registry: CallRegistry[str] = CallRegistry()
    call = registry.call(lambda call_id: registry.resolve(call_id, "at once"))
    with pytest.raises(StopIteration) as stop:  # it ends at its first step: it has not suspended
        call.send(None)
    assert stop.value.value == "at once"
    assert len(registry) == 0


async def test_ids_are_128_random_bits_as_text() -> None:
    registry: CallRegistry[None] = CallRegistry()
    sent: list[str] = []

    def send(call_id: str) -> None:
        sent.append(call_id)
        registry.resolve(call_id, None)

    for _ in range(100):
        await registry.call(send)
    assert len(set(sent)) == 100
    assert all(len(call_id) == 32 and int(call_id, 16) >= 0 for call_id in sent)
    assert len({call_id[0] for call_id in sent}) > 4, "also the first bits are random"


async def test_ids_come_from_rng_where_one_is_given() -> None:
    sent: list[str] = []
    for _ in range(2):
        registry: CallRegistry[None] = CallRegistry(rng=random.Random(7))

        def send(call_id: str, registry: CallRegistry[None] = registry) -> None:
            sent.append(call_id)
            registry.resolve(call_id, None)

        await registry.call(send)
        await registry.call(send)
    assert sent[:2] == sent[2:]
    assert sent[0] != sent[1]
    assert sent[0] == f"{random.Random(7).getrandbits(128):032x}"


async def test_an_earlier_request_is_repeated_under_its_id() -> None:
    registry: CallRegistry[str] = CallRegistry(timeout=1.0)
    sent: list[str] = []
    with pytest.raises(CallTimeout):
        await registry.call(sent.append)

    def send_again(call_id: str) -> None:
        sent.append(call_id)
        registry.resolve(call_id, "the second time")

    assert await registry.call(send_again, id=sent[0]) == "the second time"
    assert sent[0] == sent[1]


async def test_an_id_that_is_pending_is_refused_and_the_call_that_has_it_goes_on() -> None:
    registry: CallRegistry[str] = CallRegistry()
    first = asyncio.create_task(registry.call(nowhere, id="7"))
    await asyncio.sleep(1)
    with pytest.raises(ValueError, match="'7' is pending already"):
        await registry.call(nowhere, id="7")
    assert len(registry) == 1
    registry.resolve("7", "mine")
    assert await first == "mine"


# --- time --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("timeout", [0.001, 0.1, 0.25, 1.0, 2.7182818, 30.0, 86_400.0])
@pytest.mark.parametrize("start", [0.0, 0.2, 12345.678])
async def test_a_call_without_response_ends_exactly_at_its_timeout(timeout: float, start: float) -> None:
    await asyncio.sleep(start)
    registry: CallRegistry[None] = CallRegistry(timeout=timeout, name="storage")
    start = clock()
    with pytest.raises(CallTimeout) as caught:
        await registry.call(nowhere)
    assert clock() == start + timeout
    assert (caught.value.name, caught.value.timeout) == ("storage", timeout)
    assert isinstance(caught.value, TimeoutError)
    assert caught.value.executed == "maybe"
    assert str(caught.value).startswith("storage: no result within ")
    assert len(registry) == 0


async def test_each_call_may_have_a_timeout_of_its_own() -> None:
    registry: CallRegistry[None] = CallRegistry(timeout=30.0)
    ended: list[tuple[float, float]] = []

    async def call(timeout: float | None) -> None:
        with pytest.raises(CallTimeout) as caught:
            await registry.call(nowhere, timeout=timeout)
        ended.append((caught.value.timeout, clock()))

    await asyncio.gather(*(call(timeout) for timeout in (None, 5.0, 0.1, 100.0, 5.01)))
    assert ended == [(0.1, 0.1), (5.0, 5.0), (5.01, 5.01), (30.0, 30.0), (100.0, 100.0)]


@pytest.mark.parametrize("order", ["reply first", "timer first"])
async def test_a_reply_in_the_moment_of_the_timeout_is_returned_or_counted_as_late(order: str) -> None:
    registry: CallRegistry[str] = CallRegistry(timeout=5.0)
    taken: list[bool] = []

    def send(call_id: str) -> None:
        if order == "reply first":
            later(5.0, lambda: taken.append(registry.resolve(call_id, "just in time")))
        else:
            later(5.0, lambda: later(0, lambda: taken.append(registry.resolve(call_id, "just too late"))))

    try:
        response = await registry.call(send)
    except CallTimeout:
        await asyncio.sleep(0)
        assert taken == [False]
        assert registry.stats().late == 1
    else:
        assert response == "just in time"
        assert taken == [True]
        assert order == "reply first"
    assert clock() == 5.0


async def test_a_reply_that_is_in_the_slot_already_when_time_runs_out_is_returned() -> None:
    registry: CallRegistry[str] = CallRegistry(timeout=5.0)

    async def slow_send(call_id: str) -> None:
        registry.resolve(call_id, "long there")
        await asyncio.sleep(3600)

    assert await registry.call(slow_send) == "long there"
    assert clock() == 5.0


async def test_ten_thousand_pending_calls_have_one_timer_and_no_tasks() -> None:
    registry: CallRegistry[None] = CallRegistry(timeout=30.0)
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualTimeLoop)
    sent: list[str] = []
    rng = random.Random(1)

    async def call() -> None:
        await registry.call(sent.append, timeout=rng.uniform(0.1, 100.0))

    calls = [asyncio.create_task(call()) for _ in range(10_000)]
    await asyncio.sleep(0.05)
    assert len(registry) == 10_000
    assert len(loop.live_timers()) == 1
    assert len(asyncio.all_tasks()) == 10_000 + 1
    for call_id in sent[:-1]:
        registry.resolve(call_id, None)
    assert len(loop.live_timers()) == 1
    registry.resolve(sent[-1], None)
    assert len(loop.live_timers()) == 0, "none is left where nothing is pending"
    await asyncio.gather(*calls)


async def test_a_timeout_of_the_enclosing_scope_ends_a_call() -> None:
    registry: CallRegistry[None] = CallRegistry()
    with pytest.raises(TimeoutError) as caught, anyio.fail_after(2.0):
        await registry.call(nowhere)
    assert not isinstance(caught.value, CallTimeout)
    assert clock() == 2.0
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(1.0):
            await registry.call(nowhere)
    assert clock() == 3.0
    assert (len(registry), registry.stats().cancelled) == (0, 2)


# --- sending -----------------------------------------------------------------------------------------------


async def test_a_call_is_pending_before_it_is_sent() -> None:
    registry: CallRegistry[None] = CallRegistry()

    def send(call_id: str) -> None:
        assert call_id in registry
        registry.resolve(call_id, None)

    await registry.call(send)


async def test_an_awaitable_that_send_returns_is_awaited() -> None:
    registry: CallRegistry[str] = CallRegistry()

    async def send(call_id: str) -> None:
        await asyncio.sleep(1)
        later(1, registry.resolve, call_id, "after sending")

    assert await registry.call(send) == "after sending"
    assert clock() == 2.0
    assert await registry.call(lambda call_id: asyncio.ensure_future(send(call_id))) == "after sending"


async def test_whatever_else_send_returns_is_ignored() -> None:
    registry: CallRegistry[str] = CallRegistry()

    def send(call_id: str) -> int:
        registry.resolve(call_id, "response")
        return 42

    assert await registry.call(send) == "response"


async def test_a_reply_that_comes_while_an_async_send_goes_on_is_kept() -> None:
    registry: CallRegistry[str] = CallRegistry()

    async def send(call_id: str) -> None:
        registry.resolve(call_id, "early")
        await asyncio.sleep(3)

    assert await registry.call(send) == "early"
    assert clock() == 3.0, "a send is not cut because there is a response: it may be in the middle of a frame"


async def test_an_async_send_is_bounded_by_the_same_timeout() -> None:
    registry: CallRegistry[None] = CallRegistry(timeout=5.0)
    cut: list[float] = []

    async def stuck(call_id: str) -> None:
        try:
            await asyncio.sleep(3600)
        finally:
            cut.append(clock())

    with pytest.raises(CallTimeout):
        await registry.call(stuck)
    assert cut == [5.0]

    async def slow(call_id: str) -> None:
        await asyncio.sleep(4)

    with pytest.raises(CallTimeout):
        await registry.call(slow)
    assert clock() == 10.0, "waiting for the response has only what is left"


async def test_an_async_send_that_survives_its_cancellation_cannot_prolong_the_call_for_long() -> None:
    registry: CallRegistry[None] = CallRegistry(timeout=5.0)

    async def stubborn(call_id: str) -> None:
        with anyio.CancelScope(shield=True):
            await asyncio.sleep(7)

    with pytest.raises(CallTimeout):
        await registry.call(stubborn)
    assert clock() == 7.0


async def test_what_is_called_inside_an_async_send_sees_the_deadline() -> None:
    registry: CallRegistry[None] = CallRegistry(timeout=5.0)
    await asyncio.sleep(1)
    seen: list[float] = []

    async def send(call_id: str) -> None:
        seen.append(anyio.current_effective_deadline())
        registry.resolve(call_id, None)

    await registry.call(send)
    with anyio.move_on_after(2.0):
        await registry.call(send)
    assert seen == [6.0, 3.0]
    assert anyio.current_effective_deadline() == float("inf")


async def fail(call_id: str) -> None:
    await asyncio.sleep(1)
    raise ConnectionResetError("broken pipe")


def fail_at_once(call_id: str) -> None:
    raise ConnectionResetError("broken pipe")


@pytest.mark.parametrize("send", [fail, fail_at_once])
async def test_an_error_of_send_is_raised_and_leaves_nothing(send: Callable[[str], object]) -> None:
    registry: CallRegistry[None] = CallRegistry()
    with pytest.raises(ConnectionResetError):
        await registry.call(send, id="1")
    assert len(registry) == 0
    assert registry.stats().send_failed == 1
    assert registry.resolve("1", None) is False
    assert registry.stats().late == 1


def test_an_error_of_send_after_the_response_does_not_hide_it_and_is_reported() -> None:
    reported: list[Any] = []

    async def main() -> None:
        registry: CallRegistry[str] = CallRegistry(name="storage")
        asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context))

        async def send(call_id: str) -> None:
            registry.resolve(call_id, "it worked")
            await fail(call_id)

        assert await registry.call(send) == "it worked"
        assert registry.stats().replied == 1

    run(main)
    assert [str(context["exception"]) for context in reported] == ["broken pipe"]
    assert reported[0]["message"] == "meshkit: storage: send failed after its call had ended"


async def test_a_plain_send_that_returns_nothing_costs_no_scope_and_no_suspension() -> None:
    registry: CallRegistry[str] = CallRegistry()
    call = registry.call(nowhere, id="1")
    waiting = call.send(None)
    assert asyncio.isfuture(waiting)
    registry.resolve("1", "response")
    with pytest.raises(StopIteration):
        call.send(None)


# --- errors ------------------------------------------------------------------------------------------------


async def test_the_error_given_to_reject_is_raised_in_the_caller() -> None:
    registry: CallRegistry[None] = CallRegistry()
    error = PeerLost(node="bob")
    with pytest.raises(PeerLost) as caught:
        await registry.call(lambda call_id: later(1, registry.reject, call_id, error))
    assert caught.value is error
    assert clock() == 1.0
    assert registry.stats().rejected == 1


async def test_an_error_that_counts_as_false_is_raised_too() -> None:
    class Empty(Exception):
        def __bool__(self) -> bool:
            return False

    registry: CallRegistry[None] = CallRegistry()
    with pytest.raises(Empty):
        await registry.call(lambda call_id: registry.reject(call_id, Empty()))


async def test_all_calls_to_one_peer_can_be_failed_by_their_ids() -> None:
    registry: CallRegistry[str] = CallRegistry()
    sent: dict[str, list[str]] = {"alice": [], "bob": []}
    calls = {peer: [asyncio.create_task(registry.call(ids.append)) for _ in range(3)] for peer, ids in sent.items()}
    await asyncio.sleep(1)
    assert all(registry.reject(call_id, PeerLost(node="bob")) for call_id in sent["bob"])
    lost = await asyncio.gather(*calls["bob"], return_exceptions=True)
    assert [type(error) for error in lost] == [PeerLost] * 3
    assert len(registry) == 3
    for call_id in sent["alice"]:
        registry.resolve(call_id, "still there")
    assert await asyncio.gather(*calls["alice"]) == ["still there"] * 3


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


async def test_groups_of_exceptions_can_be_raised() -> None:
    registry: CallRegistry[None] = CallRegistry()
    with pytest.raises(ExceptionGroup):
        await registry.call(lambda call_id: registry.reject(call_id, ExceptionGroup("", [ValueError()])))


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
    assert [(event.id, event.outcome, event.seconds) for event in events if isinstance(event, CallEnded)] == [
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
