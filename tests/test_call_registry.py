import asyncio
import random
from collections.abc import Callable
from typing import Any

import anyio
import pytest

from meshkit.call_registry import CallRegistry
from meshkit.errors import CallTimeout
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


@pytest.mark.parametrize("early", [1e-10, 0.5])
async def test_a_reply_just_before_the_timeout_is_returned_even_in_the_same_pass_of_the_loop(early: float) -> None:
    registry: CallRegistry[str] = CallRegistry(timeout=5.0)
    assert await registry.call(answering(registry, "just in time", 5.0 - early)) == "just in time"


async def test_a_reply_right_after_the_timeout_is_late() -> None:
    registry: CallRegistry[str] = CallRegistry(timeout=5.0)
    taken: list[bool] = []
    with pytest.raises(CallTimeout):
        await registry.call(lambda call_id: later(5.0 + 1e-6, lambda: taken.append(registry.resolve(call_id, "no"))))
    await asyncio.sleep(1)
    assert taken == [False]
    assert registry.stats().late == 1


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
